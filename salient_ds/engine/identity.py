"""Compares the run that wrote a checkpoint with the run that wants to resume from it. Imports no torch.

The *identity* of a run holds everything that changes its training, as plain JSON. It is stored in the manifest of every
checkpoint. A difference refuses the resume, unless the user asked for the new value with ``--change KEY`` and the key
is in :data:`CHANGEABLE`.

What a checkpoint does not record is not compared, but named: older versions of this package recorded less. Choices that
change no more than rounding (number of processes, ZeRO stage, micro-batch, attention kernel, recomputation) are not
part of an identity.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGEABLE: dict[str, tuple[str, ...]] = {
    "train.lr": ("lr", "initial_lr"),
    "train.sigma_lr": ("lr", "initial_lr"),
    "train.lr_schedule": ("lr", "initial_lr"),
    "train.lr_warmup": ("lr", "initial_lr"),
    "train.weight_decay": ("weight_decay",),
    "train.betas": ("betas",),
    "train.eps": ("eps",),
    "train.max_grad_norm": (),
    "train.neftune_alpha": (),
}
"""Keys that ``--change`` accepts, and the entries of the optimizer's parameter groups that follow from each. Those of
the checkpoint must not replace the new ones. (Clipping and noise are no entries of a group.)"""

_ADDED: dict[str, Any] = {"train.neftune_alpha": 0.0}
"""Options that older versions did not have, and what their runs did."""

DATA_SETTINGS = "data_settings"
"""Part of an identity that only explains why the training data differ. By itself it may differ: a file may move."""

_LABELS = {"total_steps": "number of steps", "global_batch_size": "train.global_batch_size", "seed": "train.seed",
           "data": "training data"}  # fmt: skip
"""What a message calls parts of the identity that are not named like the key of the run file."""


@dataclass(frozen=True)
class Difference:
    """A key with another value in the checkpoint (``there``) than in the run (``here``); None: it is not set."""

    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.there!r} there, {self.here!r} here"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    differences: list[Difference]
    unknown: list[Difference]
    """Keys that the checkpoint does not record; ``there`` is None."""

    def refusal(self, path: Path, changes: Collection[str]) -> str | None:
        """Why a run cannot resume from checkpoint ``path``; None if every difference is in ``changes``."""
        wrong = [item for item in self.differences if item.key not in changes]
        if not wrong:
            return None
        remedy = "resume with the configuration it was made with, "
        if all(item.key in CHANGEABLE for item in wrong):
            options = " ".join(f"--change {item.key}" for item in wrong)
            remedy += f"take the new values with {options}, "
        listed = "; ".join(map(str, wrong))
        return f"{path} belongs to another run ({listed}): {remedy}or choose another output_dir"

    def changed(self, changes: Collection[str]) -> list[Difference]:
        """The differences that ``changes`` allow. A value that the checkpoint does not record counts as changed."""
        return [item for item in [*self.differences, *self.unknown] if item.key in changes]


def compare(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Comparison:
    """Compare the identity of a checkpoint with the parts of this run's identity that are known so far."""
    now: dict[str, Any] = json.loads(json.dumps(here))
    old = "precision" not in saved.get("train", {})
    differences, unknown = [], []
    for key, value in now.items():
        if key == DATA_SETTINGS:
            continue
        if key not in saved and key != "train":  # of the training settings, each is named
            unknown.append(Difference(_LABELS.get(key, key), None, value))
            continue
        for item in _walk(_LABELS.get(key, key), saved.get(key, _ABSENT), value):
            if item.there is _ABSENT and item.key in _ADDED:
                item = Difference(item.key, _ADDED[item.key], item.here)
                if item.there == item.here:
                    continue
            # older versions recorded a method's options before "auto" was resolved
            unresolved = old and item.key.startswith("method.") and item.there == "auto"
            if item.there is _ABSENT or unresolved:
                unknown.append(Difference(item.key, None, item.here))
            elif item.key == _LABELS["data"]:
                differences += _explained(item, saved.get(DATA_SETTINGS, {}), now.get(DATA_SETTINGS, {}))
            else:
                differences.append(item)
    return Comparison(differences, unknown)


_ABSENT: Any = object()


def _walk(key: str, there: Any, here: Any) -> Iterator[Difference]:
    if isinstance(here, dict) and (there is _ABSENT or isinstance(there, dict)):
        saved = {} if there is _ABSENT else there
        if "name" in saved and "name" in here and saved["name"] != here["name"]:  # other options have other names
            yield Difference(f"{key}.name", saved["name"], here["name"])
            return
        for name, value in here.items():
            yield from _walk(f"{key}.{name}", saved.get(name, _ABSENT), value)
        for name in sorted(saved.keys() - here.keys()):
            yield Difference(f"{key}.{name}", saved[name], None)
    elif there is _ABSENT or there != here:
        yield Difference(key, there, here)


def _explained(item: Difference, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """The settings that made the training data differ; the data's fingerprint itself if all settings are equal."""
    keys = [key for key in here if key in there and there[key] != here[key]]
    return [Difference(key, there[key], here[key]) for key in keys] or [item]


def completed(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An identity without section ``train``, as older versions wrote it, with what the optimizer's groups tell."""
    if "train" in saved or not groups:
        return dict(saved)
    group = next((g for g in groups if g.get("name") == "factors"), groups[0])
    known = {"lr": group.get("initial_lr", group.get("lr")), "weight_decay": group.get("weight_decay"),
             "betas": group.get("betas"), "eps": group.get("eps")}  # fmt: skip
    if any(g.get("name") == "singular_values" for g in groups):
        known["sigma_lr"] = 1.0  # they had the learning rate of the factors
    train = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {**saved, "train": {key: value for key, value in train.items() if value is not None}}
