"""Adds a trained adapter to a loaded base model for evaluation: from an exported folder, or from a checkpoint.

Adapters of this package need no other library. Those that PEFT trained are loaded by PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from salient_ds.adapters.ranked_linear import PlainLinear
from salient_ds.adapters.survey import linear
from salient_ds.export.fold import LoraPair, fold
from salient_ds.export.lora_config import LoraConfig, read_lora_config
from salient_ds.export.meta import RECORD_FILE
from salient_ds.heterolora.export import SETTINGS, load_shortcuts, refuse_shortcuts
from salient_ds.run.export import read_factors, read_in_full

_PREFIX = "base_model.model."


def add_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` with the adapter in ``folder``, for inference.

    Raises:
        ValueError: it was made for another model, or needs PEFT, which is not installed.
    """
    if (folder / SETTINGS).is_file():
        return load_shortcuts(model, folder)
    if not (folder / RECORD_FILE).is_file():
        return _add_by_peft(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    modules = [name.removesuffix(".lora_A.weight") for name in named if name.endswith(".lora_A.weight")]
    stated = read_lora_config(folder)
    pairs = [_pair(m, named[f"{m}.lora_A.weight"], named[f"{m}.lora_B.weight"], stated) for m in modules]
    in_full = {name: value for name, value in named.items() if ".lora_" not in name}
    apply_pairs(model, pairs, in_full, folder)
    return model


def _pair(module: str, A_rI: Tensor, B_Or: Tensor, stated: LoraConfig) -> LoraPair:
    return LoraPair(module, A_rI.float(), B_Or.float() * stated.scaling(module))


def add_checkpoint(model: nn.Module, checkpoint: Path, norm_after_shortcut: str | None) -> None:
    """Add what a checkpoint of a run trained to ``model``, in place.

    Raises:
        CheckpointError: a file does not have the content that was written.
        ValueError: it was made for another model, or its shortcuts act (they have to be exported first).
    """
    factors = read_factors(checkpoint)
    refuse_shortcuts(factors, "checkpoint", norm_after_shortcut)
    pairs = [pair for pair in map(fold, factors) if pair is not None]
    apply_pairs(model, pairs, read_in_full(checkpoint), checkpoint)


@torch.no_grad()
def apply_pairs(model: nn.Module, pairs: Iterable[LoraPair], in_full: Mapping[str, Tensor], source: Path) -> None:
    """Wrap the adapted layers and replace the parameters that were trained in full, in place.

    Raises:
        ValueError: the model lacks one of them, or has it in another shape; the message names ``source``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, value in in_full.items():
        if name not in parameters or parameters[name].shape != value.shape:
            there = f"{list(parameters[name].shape)} here" if name in parameters else "not in this model"
            raise ValueError(
                f"{source} holds {name!r} of shape {list(value.shape)}, {there}: give the base model and the task that "
                "it was trained with"
            )
        parameters[name].data.copy_(value)
    for pair in pairs:
        if not isinstance(modules.get(pair.name), nn.Linear):
            raise ValueError(
                f"{source} adapts {pair.name!r}, which is no linear layer of this model: wrong base model?"
            )
        base = linear(model, pair.name)
        wrapped = PlainLinear(base, pair.rank, 1.0, dtype=base.weight.dtype, device=base.weight.device)
        wrapped.lora_A.copy_(pair.A_rI)
        wrapped.lora_B.copy_(pair.B_Or)
        parent, _, child = pair.name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped)


def _add_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} is an adapter of PEFT, which is not installed here: pip install peft") from error
    try:
        loaded: nn.Module = PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:  # sizes that do not fit
        raise ValueError(f"PEFT cannot load {folder}: {str(error).splitlines()[-1].strip()}") from error
    return loaded
