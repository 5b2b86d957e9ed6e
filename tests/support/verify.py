"""Load what was exported with the libraries that users load it with, and compare logits.

Shape legend: B = batch, T = tokens, C = classes or vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.export.disk_names import CLASS_OF_TASK_TYPE
from salient_ds.export.meta import RECORD_FILE

Inputs = Mapping[str, Tensor]
Reference = Tensor | Callable[[Inputs], Tensor]
"""Logits of the training model for the same inputs, or a function that computes them."""


def verify_peft(
    directory: Path,
    base_path: Path | str | nn.Module,
    inputs: Inputs,
    reference: Reference,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Largest absolute difference between ``reference`` and the base model with the adapter loaded by PEFT.

    Args:
        base_path: checkpoint directory, hub name, or a loaded base model (which PEFT changes in place).
        inputs: keyword arguments of the model's forward; see :func:`probe_inputs`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: PEFT finds no weights in the file for some adapted module, or shapes of the logits differ.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("verifying needs PEFT, which is optional here: pip install peft") from error
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    base = base_path
    if not isinstance(base, nn.Module):
        base = load_model(base, config["task_type"], dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(directory))
    missing = [str(item.message) for item in caught if "missing adapter keys" in str(item.message)]
    if missing:
        raise ValueError(f"adapter {str(directory)!r} is incomplete for this base model: {missing[0]}")
    return max_difference(model, inputs, reference)


def verify_merged(
    directory: Path, inputs: Inputs, reference: Reference, dtype: torch.dtype | str = torch.float32
) -> float:
    """Largest absolute difference between ``reference`` and the merged model, loaded by transformers."""
    task_type = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))["task_type"]
    return max_difference(load_model(directory, task_type, dtype), inputs, reference)


def load_model(path: Path | str, task_type: str, dtype: torch.dtype | str) -> nn.Module:
    """``from_pretrained`` of the class that belongs to a PEFT task type.

    Raises:
        ValueError: for an unknown task type.
    """
    import transformers

    if task_type not in CLASS_OF_TASK_TYPE:
        raise ValueError(f"task_type={task_type!r} is unknown: use one of {', '.join(CLASS_OF_TASK_TYPE)}")
    auto: Any = getattr(transformers, CLASS_OF_TASK_TYPE[task_type])
    model: nn.Module = auto.from_pretrained(str(path), dtype=dtype)
    return model


@torch.no_grad()
def max_difference(model: nn.Module, inputs: Inputs, reference: Reference) -> float:
    """max |logits - reference| in fp32, the model in evaluation mode.

    Raises:
        ValueError: if the shapes differ.
    """
    found = logits_of(model.eval()(**inputs))
    expected = reference(inputs) if callable(reference) else reference
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)}, the reference {tuple(expected.shape)}"
        raise ValueError(f"logits have shape {shapes}: another head, or other inputs?")
    return float((found.float() - expected.float()).abs().max())


def logits_of(output: Any) -> Tensor:
    """Logits of a transformers output, (B, T, C) or (B, C); start and end logits of answers are stacked."""
    if "logits" in output:
        logits: Tensor = output["logits"]
        return logits
    return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)


def probe_inputs(vocab_size: int, task_type: str, length: int = 16, batch: int = 2) -> dict[str, Tensor]:
    """Fixed pseudo-random token ids in [0, vocab_size); decoder input as well for encoder-decoder models."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, vocab_size, (batch, length), generator=generator) for _ in range(2)]
    inputs = {"input_ids": draw[0], "attention_mask": torch.ones_like(draw[0])}
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = draw[1]
    return inputs
