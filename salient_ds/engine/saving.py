"""Writes checkpoints while training goes on.

A save has three parts. The step's own thread notes what there is to copy (:mod:`salient_ds.engine.snapshot`). A thread
of each process copies it to host memory, checks that it is finite and writes it. Once no process is writing any more,
the main process lists all files in the manifest and renames ``step-N.partial`` to ``step-N``, also in a thread.
Collectives are called by the step's thread only. A failed or killed save leaves earlier checkpoints untouched.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salient_ds.engine.sealing import (
    Written,
    make_folder,
    remove_debris,
    remove_others,
    seal,
    tensor_pieces,
    write_file,
)
from salient_ds.engine.shard_files import CheckpointError, find_checkpoints
from salient_ds.engine.snapshot import Snapshot, manifest_facts
from salient_ds.engine.state import AllocationState
from salient_ds.zero.collectives import all_succeeded, from_everyone, world
from salient_ds.zero.frozen import FrozenWeights

NOT_FINITE, CHANGED = "not finite: ", "changed: "
"""How reports of values begin, as opposed to those of a disk."""


@dataclass
class _Job:
    """A save that is under way."""

    step: int
    partial: Path
    final: Path
    facts: dict[str, Any]
    spare: int | None
    state: AllocationState
    thread: threading.Thread | None = None
    sealing: bool = False
    failure: str | None = None
    written: Written = field(default_factory=dict)

    def run(self, work: Callable[[], None]) -> None:
        """Do ``work`` in a thread, and keep what goes wrong."""

        def guarded() -> None:
            try:
                work()
            except Exception as error:  # torch and safetensors have error types of their own for a full disk
                self.failure = str(error) or type(error).__name__

        self.thread = threading.Thread(target=guarded, name=f"checkpoint-{self.step}", daemon=True)
        self.thread.start()


class Saver:
    """The checkpoints of one run. All processes call its methods, after the same steps."""

    def __init__(self, folder: Path, keep: int, frozen: FrozenWeights | None = None) -> None:
        """
        Args:
            folder: the run's ``checkpoints`` directory, on a file system that all processes share.
            keep: how many whole checkpoints to keep.
            frozen: weights that must not have changed when a checkpoint is written.
        """
        self.folder, self.keep, self.frozen = folder, keep, frozen
        self._job: _Job | None = None

    @property
    def busy(self) -> bool:
        """Whether this process is copying or writing. It may ask without the others."""
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    def start(self, state: AllocationState, identity: dict[str, Any], extra: dict[str, Any], spare: int | None) -> Path:
        """Begin a checkpoint, once the one before it is whole.

        Checkpoints of later steps are removed afterwards: they are of a run that was not continued.

        Args:
            identity: facts that must be the same in a run that resumes from it (method, model, layout).
            extra: small state of the training loop, equal on all processes.
            spare: step of a checkpoint to keep besides the last ones.

        Returns:
            The directory that the checkpoint will have.

        Raises:
            CheckpointError: the one before it could not be written, or the folder cannot be created.
        """
        self.wait()
        final = self.folder / f"step-{state.step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        job = self._job = _Job(state.step, partial, final, manifest_facts(state, identity), spare, state)
        if world().global_rank == 0:
            remove_debris(self.folder)
        if not all_succeeded(make_folder(partial), state.device):
            self._fail(job, f"cannot create {partial}")
        snapshot = Snapshot(state, extra)
        state.snapshot = snapshot

        def write() -> None:
            snapshot.take()
            broken = snapshot.not_finite()
            if broken is not None:
                job.failure = f"{NOT_FINITE}{broken}"
                return
            changed = None if self.frozen is None else self.frozen.changed()
            if changed is not None:
                here = f"process {world().global_rank} on {socket.gethostname()}"
                job.failure = f"{CHANGED}{changed} on {here}"
                return
            for name, content in snapshot.objects.items():
                job.written[name] = write_file(partial / name, [content])
            job.written[snapshot.shard] = write_file(partial / snapshot.shard, tensor_pieces(snapshot.tensors))

        job.run(write)
        return final

    def advance(self, anyone_busy: bool) -> None:
        """Go on with a save that is under way, if no process is busy with it. Call it after every step.

        Args:
            anyone_busy: whether :attr:`busy` was true on any process, the same on all.

        Raises:
            CheckpointError: as :meth:`wait`.
        """
        if self._job is not None and not anyone_busy:
            self._next()

    def wait(self) -> None:
        """Wait until the checkpoint that is under way is whole.

        Raises:
            CheckpointError: on all processes, if any of them could not write (disk full), or holds a value that is not
                finite. Older checkpoints survive.
        """
        while self._job is not None:
            self._next()

    def close(self) -> None:
        """Let the thread end before this process does. Calls no collective, so that it may follow any error."""
        job = self._job
        if job is not None and job.thread is not None:
            job.thread.join()

    def _next(self) -> None:
        job = self._job
        assert job is not None
        if job.thread is not None:
            job.thread.join()
            job.thread = None
        reports = from_everyone((job.failure, job.written))
        failure = next((failed for failed, _ in reports if failed is not None), None)
        if failure is not None:
            self._fail(job, failure)
        if job.sealing:
            self._job = None
            return
        job.sealing = True
        if world().global_rank == 0:

            def finish() -> None:
                job.failure = seal(job.partial, job.final, job.facts, [files for _, files in reports])
                if job.failure is None:
                    remove_others(self.folder, job.step, self.keep, job.spare)

            job.run(finish)

    def _fail(self, job: _Job, failure: str) -> None:
        self._job = None
        if world().global_rank == 0:
            shutil.rmtree(job.partial, ignore_errors=True)
        all_succeeded(True, job.state.device)  # wait for the removal before any process looks for checkpoints
        last = _last_whole(self.folder)
        if failure.startswith(NOT_FINITE):
            raise CheckpointError(
                f"checkpoint of step {job.step} was not written, because {failure.removeprefix(NOT_FINITE)}; {last}. "
                "Go on from the last whole one, if there is one, with a lower train.lr: train.lr=VALUE --resume auto "
                "--change train.lr"
            )
        if failure.startswith(CHANGED):
            raise CheckpointError(
                f"checkpoint of step {job.step} was not written, because {failure.removeprefix(CHANGED)}; {last}. "
                "Look at the memory of that node (ECC errors: nvidia-smi -q), leave it out if there are any, and "
                "continue with --resume auto"
            )
        raise CheckpointError(
            f"checkpoint of step {job.step} was not written ({failure}); {last}. "
            f"Free space under {self.folder} and continue with --resume auto"
        )


def _last_whole(folder: Path) -> str:
    whole = find_checkpoints(folder)
    return f"the last whole one is {whole[-1]}" if whole else "there is no earlier one"


def save(
    state: AllocationState,
    folder: Path,
    identity: dict[str, Any],
    extra: dict[str, Any],
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write one checkpoint and wait until it is whole. All processes call this after a step.

    See :meth:`Saver.start` for the arguments, :class:`Saver` for ``folder`` and ``keep``.

    Raises:
        CheckpointError: as :meth:`Saver.wait`.
    """
    saver = Saver(folder, keep)
    path = saver.start(state, identity, extra, spare)
    saver.wait()
    return path
