"""The model that training will build, as far as it is known before: layers, tables and size.

For plain LLaMA-like models they follow from config.json. For others, transformers builds the model without its weights
in a process of its own, and the answer is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from salient_ds.adapters.adaptable import Adaptable
from salient_ds.adapters.full import Parts
from salient_ds.check.helper_process import ask, reply
from salient_ds.check.model_files import ModelFiles
from salient_ds.check.model_shapes import architecture, derived_linear_shapes
from salient_ds.config.run import ModelConfig
from salient_ds.models.limits import Limits
from salient_ds.models.meta_model import AUTO_CLASSES

_SOURCES = (
    "adapters/survey.py",
    "adapters/adaptable.py",
    "adapters/full.py",
    "models/limits.py",
    "models/meta_model.py",
)
"""Files whose change makes cached answers worthless."""
_PLAIN_TASKS = ("causal-lm", "sequence-classification", "regression")
"""Tasks for which LLaMA-like models have their layers at the same places."""


@dataclass(frozen=True)
class BuiltModel:
    adaptable: Adaptable
    limits: Limits
    parameters: int | None
    """Number of parameters (elements); None if it was not counted."""
    parts: Parts = field(default_factory=Parts)
    """What can be trained in full. Empty for a plain causal language model."""
    attention: tuple[str, ...] = ()
    """Attention implementations that the model has; empty: all."""


def built_model(
    model: ModelConfig, files: ModelFiles, quick: bool = False, *, classes: int = 1, closely: bool = False
) -> BuiltModel | str:
    """What training will build from ``files``, or why that is not known.

    Args:
        quick: start no process; use what is known without.
        classes: outputs of a classifier.
        closely: every module has to be known, not only the layers that are usually adapted.

    Raises:
        ValueError: transformers has no class of this model for the run's task.
    """
    plain = None if closely else plain_model(files.config, model.task, classes)
    if files.directory is None or "model_type" not in files.config:
        return "there is no config.json to build it from"
    if model.trust_remote_code and "auto_map" in files.config:
        return "its code is not part of transformers (model.trust_remote_code)"
    if plain is not None:
        return plain
    place = _cache_file(files.directory / "config.json", f"{model.task}, {classes}")
    answer = _read(place)
    if answer is None:
        if quick:
            return "it has to be built for that"
        try:
            question = {"folder": str(files.directory), "auto_class": AUTO_CLASSES[model.task], "classes": classes}
            answer = ask(__name__, question)
        except ValueError as error:
            return str(error)
        _write(place, answer)
    if "refused" in answer:
        raise ValueError(f"model.path={model.path!r}: {answer['refused']}")
    if "unknown" in answer:
        return str(answer["unknown"])
    return BuiltModel(
        Adaptable.from_json(answer["adaptable"]),
        Limits(**answer["limits"]),
        answer["parameters"],
        Parts.from_json(answer["parts"]),
        tuple(answer["attention"]),
    )


def plain_model(config: Mapping[str, Any], task: str = "causal-lm", classes: int = 1) -> BuiltModel | None:
    """The same for a family whose layers follow from config.json; None for any other."""
    numbers, shapes = architecture(config), derived_linear_shapes(config)
    if numbers is None or not shapes or task not in _PLAIN_TASKS:
        return None
    words = Limits(embedding="model.embed_tokens", rows=numbers.vocab_size, width=numbers.hidden_size)
    score = Parts() if task == "causal-lm" else Parts({"score": classes * numbers.hidden_size}, ("score",))
    return BuiltModel(Adaptable(shapes), words, None, score)


def cache_folder() -> Path:
    """Where answers are kept: ``$XDG_CACHE_HOME/salient_ds/models``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "salient_ds" / "models"


def _cache_file(config: Path, task: str) -> Path | None:
    """The file for this config.json, this transformers and this version of the code that looks; None without them."""
    package = Path(__file__).parents[1]
    try:
        parts = [config.read_bytes(), *((package / name).read_bytes() for name in _SOURCES)]
        parts += [metadata.version("transformers").encode(), metadata.version("torch").encode(), task.encode()]
    except (OSError, metadata.PackageNotFoundError):
        return None
    return cache_folder() / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.json"


def _read(place: Path | None) -> dict[str, Any] | None:
    try:
        answer = json.loads(place.read_text(encoding="utf-8")) if place is not None else None
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _write(place: Path | None, answer: Mapping[str, Any]) -> None:
    """Keep an answer. Without a place to write, it is asked for again the next time."""
    if place is None or "unknown" in answer:
        return
    partial = place.with_suffix(f".{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(answer), encoding="utf-8")
        partial.replace(place)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def describe(folder: str, auto_class: str, classes: int = 1) -> dict[str, Any]:
    """Build the model without weights and describe it. Needs torch and transformers.

    Returns:
        Keys "adaptable", "limits", "parameters", "parts", "attention". Or "refused" with a sentence, if training could
        not load the model. Or "unknown" with a reason, if the model cannot be built here.
    """
    from salient_ds.adapters.full import parts
    from salient_ds.adapters.survey import survey, whole_shape
    from salient_ds.models.limits import limits
    from salient_ds.models.meta_model import NoSuchModel, attention_of, build_without_weights

    try:
        model = build_without_weights(folder, auto_class, classes)
    except NoSuchModel as error:
        return {"refused": str(error)}
    except ValueError as error:
        return {"unknown": str(error)}
    found = survey(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"adaptable": found.to_json(), "limits": limits(model, found.towers).to_json(), "parameters": size,
            "parts": parts(model, whole_shape).to_json(), "attention": attention_of(type(model))}  # fmt: skip


if __name__ == "__main__":
    reply(describe(**json.loads(sys.argv[1])))
