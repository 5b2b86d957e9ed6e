"""Does the loaded model have a row for everything that the data looks up? Asked once, before the first step."""

from __future__ import annotations

from typing import Any

from torch import nn

from salient_ds.adapters.survey import survey
from salient_ds.data.tasks.dataset import TaskDataset
from salient_ds.models.limits import limits
from salient_ds.run.inputs import Inputs


def refuse_misfits(model: nn.Module, inputs: Inputs, max_length: int) -> None:
    """Compare token ids and lengths of the data with the model's tables.

    ``salient-ds check`` says the same earlier where it can, but a training process may be started without it.

    Raises:
        ValueError: a token id or a position has no row. The lookup would fail in the middle of training, or on a GPU
            read something else.
    """
    sizes = limits(model, survey(model).towers)
    parts = [("the training data", inputs.train), ("the held-out data", inputs.held_out)]
    problems = [sizes.position_problem(max_length), sizes.token_problem(inputs.collator.pad_token_id, "padding")]
    for name, data in parts:
        problems.append(sizes.token_problem(_largest(data), name))
    if inputs.task is not None and sizes.positions:
        problems += inputs.task.length_problems(max_length, sizes.longest)
    found = list(dict.fromkeys(problem for problem in problems if problem is not None))
    if found:
        raise ValueError("; ".join(found))


def _largest(data: Any) -> int:
    """The largest token id of a data set; 0 if there is none."""
    if isinstance(data, TaskDataset):
        return data.largest_token
    return max((int(example["input_ids"].max()) for example in data or ()), default=0)
