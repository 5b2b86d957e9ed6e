"""The option ``--change KEY`` of a resumed run: which keys it accepts, and why it refuses the others. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from salient_ds.config.run import ModelConfig, RunConfig
from salient_ds.config.train import TrainConfig
from salient_ds.engine.identity import CHANGEABLE
from salient_ds.strict import did_you_mean

ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--change",
        metavar="KEY",
        help="With --resume: use this run's value of KEY from here on, although the checkpoint was made with another. "
        f"May be repeated. Allowed: {', '.join(CHANGEABLE)}.",
    ),
]

_ORDER = "the order of the rows would be another one, so that some would come twice and others never"
_LENGTH = "the learning-rate schedule and the allocation events are laid out over all steps of the run"
_REFUSED = {
    "method": "statistics and decisions of the steps so far were made with the old options",
    "adapter": "the tensors of the checkpoint belong to the old adapters",
    "model": "the adapters were trained on the old base model",
    "data": _ORDER,
    "train.global_batch_size": _ORDER,
    "train.seed": _ORDER,
    "train.max_steps": _LENGTH,
    "train.epochs": _LENGTH,
    "train.precision": "one run would mix steps that were rounded differently",
    "speed.compaction": "pruned rows that are dropped earlier or later act differently on the others",
}
"""Keys, or their sections, that cannot change in a run, and why."""

_FREE = (
    "output_dir",
    "deepspeed",
    "speed",
    "model.attn_implementation",
    *(f"train.{key}" for key in TrainConfig.model_fields if f"train.{key}" not in CHANGEABLE | _REFUSED),
)
"""Keys, or their sections, that may differ from the checkpoint anyway."""


def change_problems(changes: Sequence[str], resume: str) -> list[str]:
    """What is wrong with the ``--change`` options of a command line, one sentence each."""
    if changes and resume == "never":
        options = " ".join(f"--change {key}" for key in changes)
        return [f"{options} does nothing without --resume: add --resume auto, or leave it out"]
    return [problem for key in changes if (problem := _problem(key)) is not None]


def _problem(key: str) -> str | None:
    if key in CHANGEABLE:
        return None
    allowed = f"allowed are {', '.join(CHANGEABLE)}"
    if not _exists(key):
        full = f"train.{key}"
        hint = f"did you mean {full!r}? " if full in CHANGEABLE else did_you_mean(key, CHANGEABLE, after=" ")
        return f"--change {key} names no key of a run file: {hint}{allowed}"
    if _longest(key, _FREE) > _longest(key, _REFUSED):
        return f"--change {key} is not needed: a resumed run may have another value; leave the option out"
    reason = next(text for place, text in _REFUSED.items() if len(place) == _longest(key, _REFUSED) and _in(key, place))
    return f"--change {key} is not possible, because {reason}: set the old value, or start a new run ({allowed})"


def _exists(key: str) -> bool:
    """Whether a run file may have the key, as far as that is known without its method."""
    section, _, name = key.partition(".")
    known = {"train": TrainConfig.model_fields, "model": ModelConfig.model_fields}
    return section in RunConfig.model_fields and (not name or name in known.get(section, (name,)))


def _in(key: str, place: str) -> bool:
    return key == place or key.startswith(f"{place}.")


def _longest(key: str, places: Sequence[str] | dict[str, str]) -> int:
    return max((len(place) for place in places if _in(key, place)), default=0)
