"""Builds a model without its weights, on the meta device: names, shapes and modules as in training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
}
"""transformers' auto class that loads each task's head."""


def attention_of(kind: Any) -> tuple[str, ...]:
    """The attention implementations that a model class of transformers has.

    Args:
        kind: the class, or several of one auto mapping.
    """
    one = kind[0] if isinstance(kind, tuple) else kind
    names = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    return ("eager", *(name for name, flag in names.items() if getattr(one, flag, False)))


def attention_problem(wanted: str, there: tuple[str, ...]) -> str | None:
    """One sentence if a model lacks the attention implementation ``wanted`` (``model.attn_implementation``)."""
    if wanted in there:
        return None
    return (
        f"model.attn_implementation={wanted}: this model has {' and '.join(there)} attention only, choose one of these"
    )


class NoSuchModel(ValueError):
    """transformers knows the model, but has no class of it for the task."""


def build_without_weights(folder: Path | str, auto_class: str, classes: int | None = None) -> Any:
    """The model that ``auto_class`` would load from ``folder``. Code from the folder is never run.

    Args:
        folder: directory with a config.json.
        auto_class: name of a class of transformers, such as "AutoModelForCausalLM".
        classes: outputs of a classifier (default: as config.json says).

    Raises:
        NoSuchModel: the auto class does not know this kind of model.
        ValueError: the model cannot be built from config.json alone.
    """
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if classes is not None and auto_class == AUTO_CLASSES["sequence-classification"]:
            config.num_labels = classes
    except Exception as error:
        raise ValueError(f"transformers cannot read {Path(folder) / 'config.json'}: {_first_line(error)}") from error
    if type(config) not in auto._model_mapping:
        raise NoSuchModel(
            f"model_type={config.model_type!r} has no class for {auto_class}: choose a model with a language-modelling "
            "head, or its text model"
            if auto_class == AUTO_CLASSES["causal-lm"]
            else f"model_type={config.model_type!r} has no class for {auto_class}: choose another model or model.task"
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"transformers cannot build the model from its config.json: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
