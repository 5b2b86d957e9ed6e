"""The head of a classifier, a regression or a question-answering model: its settings, and its initial values.

A checkpoint of a pretrained model has no such head. What it lacks is drawn by transformers' own rule for the model, on
the CPU, in fp32 and with a seed of its own. So the values follow from ``train.seed`` alone, at any ZeRO stage and any
number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salient_ds.config.run import ModelConfig

if TYPE_CHECKING:
    from torch import nn


def head_settings(model: ModelConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Entries of the model's configuration that say what the head computes. Empty where the checkpoint says it.

    Args:
        labels: names of the classes, in the order of their numbers.
    """
    if model.task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = list(labels)
    if model.task != "sequence-classification":
        return {}
    settings: dict[str, Any] = {"problem_type": "single_label_classification"}
    if names:
        settings["id2label"] = dict(enumerate(names))
        settings["label2id"] = {name: index for index, name in enumerate(names)}
    return settings


def refuse_mismatched(model: ModelConfig, mismatched: Iterable[Any]) -> None:
    """Refuse a checkpoint in which some weights have other shapes than in the model.

    Args:
        mismatched: name, shape in the checkpoint and shape in the model of each of them.

    Raises:
        ValueError: there is one.
    """
    found = sorted((str(name), tuple(there), tuple(here)) for name, there, here in mismatched)
    if not found:
        return
    name, there, here = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise ValueError(
        f"{name}{more} of {model.path} has shape {list(there)} and this run's model {list(here)}: "
        f"{_REMEDY if there[1:] == here[1:] else 'download it again, or choose the task that it was saved for'}"
    )


_REMEDY = (
    "the checkpoint's head is for another number of classes: take a checkpoint without a head, or one that was trained "
    "for these labels"
)


def head_problem(
    model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], head: Sequence[str], classes: int
) -> str | None:
    """One sentence if the checkpoint has an output layer for another number of classes than the run.

    Args:
        shapes: of the tensors in the checkpoint, by name.
        head: paths of the head's modules.
        classes: of the run.
    """
    for name, shape in shapes.items():
        inside = any(name.startswith(f"{path}.") for path in head if not path.endswith("pooler"))
        if inside and name.endswith(("score.weight", "classifier.weight", "out_proj.weight")) and shape[0] != classes:
            return f"{name} in {model.path} is for {shape[0]} classes and this run has {classes}: {_REMEDY}"
    return None


def label_problem(stored: Mapping[Any, Any], labels: Sequence[str]) -> str | None:
    """One sentence if a head from the checkpoint numbers the same classes in another order than the run.

    Args:
        stored: ``id2label`` of the checkpoint's config.json.
        labels: of the run, in the order of their numbers.
    """
    there = [str(stored[key]) for key in sorted(stored, key=int)]
    plain = [[name.lower() for name in names] for names in (there, labels)]
    if plain[0] == plain[1] or sorted(plain[0]) != sorted(plain[1]):
        return None
    return (
        f"the checkpoint's head numbers its classes {', '.join(there)}, and data.task.labels are {', '.join(labels)}: "
        "give them in the checkpoint's order (rows may hold names), or take a checkpoint without a head"
    )


def split_fresh(model: nn.Module, missing: Iterable[str]) -> tuple[list[str], list[str]]:
    """Divide the weights that a checkpoint lacks into those of the head, and the others."""
    from salient_ds.adapters.full import head_modules, is_inside

    head = head_modules(model)
    names = list(missing)
    fresh = [name for name in names if any(is_inside(name, module) for module in head)]
    return fresh, [name for name in names if name not in fresh]


def draw_head(model: nn.Module, fresh: Sequence[str], seed: int) -> None:
    """Give the parameters ``fresh`` of ``model`` their initial values, in place.

    Collective under ZeRO-3: all processes call it.
    """
    if not fresh:
        return
    import torch

    from salient_ds.adapters.full import head_modules, is_inside
    from salient_ds.zero.internals.partitioned import put_whole

    with torch.device("meta"):
        twin: Any = type(model)(model.config)
    for path in head_modules(model):
        module = twin.get_submodule(path)
        if not any(is_inside(name, path) for name in fresh):
            continue
        module.to_empty(device="cpu")
        digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            for part in [*reversed(list(module.modules()))]:
                twin._init_weights(part)
    for name in fresh:
        put_whole(model.get_parameter(name), twin.get_parameter(name).detach())


def pad_with(model: nn.Module, pad_token_id: int) -> None:
    """Tell the model which token is padding, if it does not know. Decoders that classify read the token before it."""
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id


def head_facts(model: nn.Module, task: str) -> dict[str, Any]:
    """Entries of config.json that belong to a model with this head; empty for causal language models."""
    if task == "causal-lm":
        return {}
    config: Any = model.config
    facts: dict[str, Any] = {"architectures": [type(model).__name__], "pad_token_id": config.pad_token_id}
    if task in ("sequence-classification", "regression"):
        facts |= {"id2label": {str(k): v for k, v in config.id2label.items()}, "label2id": dict(config.label2id),
                  "problem_type": config.problem_type}  # fmt: skip
    return facts
