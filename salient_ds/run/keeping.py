"""When a run saves a checkpoint, and how far that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salient_ds.config.train import TrainConfig
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import StepReport
from salient_ds.engine.saving import Saver
from salient_ds.engine.shard_files import step_of
from salient_ds.zero.collectives import world
from salient_ds.zero.frozen import FrozenWeights

BUSY, DUE = "a checkpoint is being written", "a checkpoint is due"
"""Flags of the engine. The clock of the main process counts."""


class Keeper:
    """The checkpoints of a run (``train.save_every``, ``train.keep_checkpoints``). All processes call its methods."""

    def __init__(
        self,
        engine: AllocatingEngine,
        folder: Path,
        train: TrainConfig,
        identity: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            folder: the run's ``checkpoints`` directory.
            identity: what must be equal in a run that resumes.
        """
        self.engine, self.train, self.identity = engine, train, identity
        self.last: Path | None = None
        """The last checkpoint that was begun. It may still be written."""
        self.frozen = FrozenWeights(engine.adapted.model)
        """They are compared with what they are now whenever a checkpoint is written."""
        self._saver = Saver(folder, train.keep_checkpoints, self.frozen)
        self._clock, self._began = clock, clock()
        engine.flags |= {BUSY: lambda: self._saver.busy, DUE: self._is_due}

    def _is_due(self) -> bool:
        seconds = self.train.save_seconds
        waits = seconds is None or world().global_rank > 0 or self._saver.busy
        return not waits and self._clock() - self._began >= (seconds or 0)

    def after_step(self, report: StepReport) -> None:
        """Go on with the checkpoint that is being written. It becomes whole as soon as all processes have written.

        Raises:
            CheckpointError: on all processes, if any of them could not write it.
        """
        self._saver.advance(BUSY in report.raised)

    def wants(self, report: StepReport) -> bool:
        """Whether to save after this step."""
        every = self.train.save_steps
        return DUE in report.raised or bool(every and self.engine.step % every == 0)

    def save(self, extra: dict[str, Any], best_step: int | None) -> Path:
        """Begin a checkpoint of this step, unless that was done, and return its directory.

        Args:
            extra: state of the training loop.
            best_step: step of a further checkpoint to keep.
        """
        if self.last is None or step_of(self.last) != self.engine.step:
            self.last = self._saver.start(self.engine.state, self.identity, extra, best_step)
            self._began = self._clock()
        return self.last

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            CheckpointError: on all processes, if any of them could not write it.
        """
        self._saver.wait()

    def close(self) -> None:
        """Let this process end what it writes. Calls no collective, so that it may follow any error."""
        self._saver.close()
