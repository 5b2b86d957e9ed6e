"""The held-out data of a run: evaluated with the model as it is trained now, and compared with the best so far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from salient_ds.config.run import RunConfig
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.models.kernels import loss_only
from salient_ds.run.best import best_of
from salient_ds.run.evaluating import Outcome, Speaker, evaluate
from salient_ds.run.inputs import Inputs
from salient_ds.zero.collectives import world


class HeldOut:
    """Evaluates, and remembers what came out. Equal on all processes."""

    def __init__(self, config: RunConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.best = best_of(config)
        """What ``train.best_metric`` follows; None: nothing."""
        self.outcome: Outcome | None = None
        """The last evaluation, without its predictions."""

    @property
    def exhausted(self) -> bool:
        """Whether the run has waited long enough for a better evaluation (``train.patience``)."""
        return self.best is not None and self.best.exhausted

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far, whose checkpoint is kept."""
        return None if self.best is None else self.best.step

    def evaluate(self, inputs: Inputs, engine: AllocatingEngine, tokenizer: Any, stage: int) -> bool:
        """Evaluate. Collective: all processes call it.

        Args:
            stage: ZeRO stage of the base.

        Returns:
            Whether this is the best evaluation so far.
        """
        inner, size = engine.engine, self.config.train.micro_batch_size
        speaker = Speaker(inner, engine.adapted.generate, world().world_size > 1 and stage == 3)
        inner.eval()
        try:
            found = evaluate(inputs, speaker, size, engine.device, tokenizer, **loss_only(self.config.speed))
        finally:
            inner.train()
        self.outcome = replace(found, predictions=())
        counts = self.best is not None and self._at_final_ranks(engine)
        return counts and self.best is not None and self.best.take(found, engine.step)

    def _at_final_ranks(self, engine: AllocatingEngine) -> bool:
        """Whether the ranks are as many as at the end, so that this step may become the run's result.

        Otherwise the best step of a method that prunes would be one from before it pruned.
        """
        events, held = engine.method.events, engine.decisions.held
        if not events or engine.step >= events[-1].step:
            return True
        final = self.config.method.final_total(engine.initial_layout, self.total_steps)
        return held.hold and held.total == final  # without hold, dropped rows may still grow back

    def text(self) -> str:
        """The last evaluation, for people."""
        assert self.outcome is not None
        return self.outcome.text() + (f" ({self.best.text()})" if self.best is not None else "")

    def shown(self, inputs: Inputs) -> str:
        """The task's own metric, for the progress line; empty if there is none."""
        name = inputs.task.main_metric if inputs.task is not None else ""
        assert self.outcome is not None
        return f"{name} {self.outcome.scores[name]:.4f}" if name in self.outcome.scores else ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best.state()} if self.best is not None else {}

    def restore(self, extra: dict[str, Any]) -> None:
        """Go on from what a checkpoint has."""
        if self.best is not None:
            self.best.restore(extra.get("best"))

    def facts(self) -> dict[str, Any]:
        """What summary.json says: the last evaluation, and the best one."""
        return {"evaluation": self.outcome.values if self.outcome is not None else None, **self.state()}

    def result(self, last: Path, folder: Path) -> Path:
        """The checkpoint to export: of the best evaluation, if one was followed, else ``last``."""
        return last if self.best_step is None else folder / f"step-{self.best_step:08d}"
