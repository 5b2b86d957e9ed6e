"""Evaluates held-out data on all processes: the mean loss per target, and for tasks predictions and metrics.

Every row is counted once, whatever the number of processes. What the model says about a row goes to the main process
with the row's number, which decodes and scores as if there were no other process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from salient_ds.data.tasks.base import Prediction
from salient_ds.data.tasks.dataset import TaskDataset
from salient_ds.engine.reports import MicroBatch
from salient_ds.run.inputs import Inputs, evaluation_batches
from salient_ds.zero.collectives import from_main, sum_numbers, to_main, world

GENERATED = "generated"
Rows = dict[int, dict[str, np.ndarray]]
"""Row number -> outputs by name, without padding."""


@dataclass(frozen=True)
class Speaker:
    """A model as evaluation uses it."""

    forward: Callable[..., Any]
    """Called with a batch; returns transformers' output with a loss, if there are labels."""
    generate: Callable[..., torch.Tensor]
    """Called with a batch and with settings of transformers' ``generate``; returns token ids (B, T)."""
    partitioned: bool = False
    """Whether processes need one another in every forward pass, so that all have to take the same number of them."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found. The same on all processes, but for ``predictions``."""

    loss: float | None
    """Mean loss per target; None if rows have no label."""
    scores: dict[str, float]
    """Metrics of the task by name; empty for instructions and for rows without a label."""
    predictions: tuple[Prediction, ...] = ()
    """One per example, in order. On the main process only."""

    @property
    def values(self) -> dict[str, float]:
        """Loss and metrics."""
        return ({} if self.loss is None else {"loss": self.loss}) | self.scores

    def text(self) -> str:
        """The same for people."""
        parts = [] if self.loss is None else [f"held-out loss {self.loss:.4f}"]
        return ", ".join(parts + [f"{name} {value:.4f}" for name, value in self.scores.items()])


def evaluate(inputs: Inputs, speaker: Speaker, size: int, device: torch.device, tokenizer: Any, **more: Any) -> Outcome:
    """Evaluate ``inputs.held_out``. Collective: all processes call it.

    Args:
        size: rows per forward pass.
        tokenizer: turns generated tokens into text.
        more: further arguments of the forward pass.

    Raises:
        ValueError: on all processes, if the task cannot score what came out.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    rows: Rows = {}
    here, data = world(), inputs.scored
    with torch.no_grad():
        for batch in evaluation_batches(inputs, here.global_rank, here.world_size, size, device):
            out: Any = None
            if data is None or data.labelled or GENERATED not in data.task.outputs:
                out = speaker.forward(**batch.inputs, **more)
            if batch.num_targets and getattr(out, "loss", None) is not None:
                total += out.loss.double() * batch.num_targets
                count += batch.num_targets
            if data is not None:
                rows |= _outputs(data, batch, out, speaker)
    loss_sum, targets = sum_numbers([float(total), float(count)], device)
    loss = loss_sum / targets if targets else None
    if data is None:
        return Outcome(loss, {})
    return _scored(data, rows, loss, device, tokenizer)


def _outputs(data: TaskDataset, batch: MicroBatch, out: Any, speaker: Speaker) -> Rows:
    """What the model says about each row of a batch. A batch without rows of its own takes part all the same."""
    found: dict[str, Any] = {name: out[name] for name in data.task.outputs if name != GENERATED}
    if GENERATED in data.task.outputs:
        source = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        settings = getattr(data.task, "generation", {})
        found[GENERATED] = speaker.generate(**source, **settings, synced_gpus=speaker.partitioned)
    arrays = {name: value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
              for name, value in found.items()}  # fmt: skip
    return {row: dict(_cut(arrays, place, int(data.lengths[row]))) for place, row in enumerate(batch.indices)}


def _cut(arrays: dict[str, np.ndarray], place: int, length: int) -> Iterator[tuple[str, np.ndarray]]:
    """The outputs of one row of a batch. Those per token are cut to the row's own length."""
    for name, array in arrays.items():
        yield name, array[place][:length] if name.endswith("_logits") else array[place]


def _scored(data: TaskDataset, rows: Rows, loss: float | None, device: torch.device, tokenizer: Any) -> Outcome:
    everyone = to_main(rows)
    problem: str | None = None
    scores: dict[str, float] = {}
    predictions: list[Prediction] = []
    if everyone is not None:
        every = {row: outputs for part in everyone for row, outputs in part.items()}
        assert len(every) == sum(map(len, everyone)) == len(data), "every row is evaluated exactly once"
        columns = {name: [every[row][name] for row in range(len(data))] for name in data.task.outputs}
        try:
            predictions = data.decode(columns, tokenizer)
            scores = data.score(predictions) if data.labelled else {}
        except ValueError as error:
            problem = str(error)
    problem, scores = from_main([problem, scores], device)
    if problem is not None:
        raise ValueError(problem)
    return Outcome(loss, scores, tuple(predictions))
