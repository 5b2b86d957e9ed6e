"""Looks through a model for what can be adapted. The model may be without weights (on the meta device)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from torch import nn

from salient_ds.adapters.adaptable import Adaptable, FusedExperts
from salient_ds.adapters.full import head_modules, is_inside

ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]

_PLAIN = ("Linear", "FalconLinear")
"""Classes that compute x W^T + b and nothing else. FalconLinear only multiplies and adds in two operations."""
_TOWER = re.compile(r"(^|_)(vision|visual|image|img|video|pixel|audio|speech|sound|multi_?modal|mm)(_|$)")
"""Names of parts for images and sound."""
_READS_WEIGHT = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\s*\.\s*(?:dtype|device|shape|size|data|ndim)\b)")
_UNREACHED = {
    "pooler": "a causal language model does not run it",
    "indexer": "it only chooses what is attended to, and gets no gradient",
    "encoder_attn": "it attends to an encoder, which a causal language model runs without",
    "cross_attn": "it attends to another model's states, which text alone does not have",
    "crossattention": "it attends to another model's states, which text alone does not have",
}
"""Parts of a decoder's path -> why nothing in them can be trained."""
_READ_ONLY_IF = {"BloomAttention": "slow_but_exact", "BloomMLP": "slow_but_exact"}
"""Classes that read weights only if this entry of the configuration is set."""
_IN_HEAD = "it belongs to the head, which is trained in full or not at all (adapter.train_head)"
_BYPASSED = "code of the model uses its weight without calling the layer, and so would not see an adapter"


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter that is not partitioned."""
    return tuple(parameter.shape)


def survey(model: nn.Module, shape_of: ShapeOf = whole_shape) -> Adaptable:
    """The linear layers of ``model`` by path, and what surrounds them.

    Args:
        shape_of: gives the shape of a whole parameter, if ZeRO-3 may have partitioned it.
    """
    towers = _towers(model)
    output, head = _embedding(model, "get_output_embeddings"), head_modules(model)
    linears, unfit = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            in_head = any(is_inside(path, part) for part in head)
            reason = _IN_HEAD if in_head else _why_unfit(model, path, module)
            if reason is None:
                linears[path] = (module.out_features, module.in_features)
            else:
                unfit[path] = reason
    towers = [tower for tower in towers if any(f"{path}.".startswith(f"{tower}.") for path in [*linears, *unfit])]
    return Adaptable(linears, tuple(towers), _experts(model, towers, shape_of), unfit)


def linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer of that path."""
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _why_unfit(model: nn.Module, path: str, module: nn.Linear) -> str | None:
    """Why an adapter cannot wrap a linear layer; None if it can."""
    kind = type(module)
    if kind.__name__ not in _PLAIN and kind.forward is not nn.Linear.forward:
        return f"{kind.__name__} computes more than a matrix product"
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", True) is False:
        unreached = next((reason for part, reason in _UNREACHED.items() if part in path.split(".")), None)
        if unreached is not None:
            return unreached
    parent, _, name = path.rpartition(".")
    owner = type(model.get_submodule(parent))
    condition = _READ_ONLY_IF.get(owner.__name__)
    if condition is not None and not getattr(config, condition, False):
        return None
    return _BYPASSED if name in _weights_read_by(cast("Any", owner)) else None


@cache
def _weights_read_by(kind: Any) -> frozenset[str]:
    """Names of the children whose weights the methods of a module class use directly."""
    found: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            if not inspect.isfunction(function) or "init" in name or "reset" in name:
                continue
            try:
                found |= set(_READS_WEIGHT.findall(inspect.getsource(function)))
            except (OSError, TypeError):  # no source: nothing can be said
                continue
    return frozenset(found)


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    """What ``model.get_input_embeddings()`` or ``get_output_embeddings()`` returns; None if that is not possible."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _towers(model: nn.Module) -> list[str]:
    """Paths of the parts for images and sound: outermost ones, in model order.

    They go by their name, or are models of their own that read something else than token ids. In a model with a
    text model inside, everything beside that is one.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    words = paths.get(id(_embedding(model, "get_input_embeddings")), "")
    text, head = _text_model(model, paths), _embedding(model, "get_output_embeddings")
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or module is head or is_inside(words, path) or any(is_inside(path, tower) for tower in found):
            continue
        beside = bool(text) and not is_inside(path, text) and not is_inside(text, path)
        reads = getattr(module, "main_input_name", "input_ids")
        if beside or reads != "input_ids" or _TOWER.search(path.rpartition(".")[2].lower()):
            found.append(path)
    return found


def _text_model(model: Any, paths: dict[int, str]) -> str:
    """Path of the text model inside a model of several parts; empty if it has no such part."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ""
    text_type, base = config.get_text_config().model_type, getattr(model, "base_model", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if text_type == config.model_type or not hasattr(decoder, "main_input_name") or decoder in (model, base):
        return ""
    return paths.get(id(decoder), "")


def _experts(model: nn.Module, towers: list[str], shape_of: ShapeOf) -> FusedExperts | None:
    """The fused experts of the language model."""
    found: dict[str, tuple[int, ...]] = {}
    counts: list[int] = []
    for path, module in model.named_modules():
        named = "Expert" in type(module).__name__ or "experts" in path.split(".")
        if not named or isinstance(module, nn.Linear | nn.Embedding) or any(is_inside(path, tower) for tower in towers):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = shape_of(parameter)
            if len(shape) > 1 and not name.endswith("bias"):
                found[f"{path}.{name}"] = shape
                counts.append(shape[0] if len(shape) > 2 else int(getattr(module, "num_experts", 0) or 0))
    if not found:
        return None
    axes = len(next(iter(found.values())))
    return FusedExperts(tuple(found), max(counts), axes, tuple(sorted(_names_of_experts(model, found))))


def _names_of_experts(model: nn.Module, parameters: dict[str, Any]) -> set[str]:
    """What the matrices in fused parameters are called, here and in checkpoints that transformers converts."""
    own = {name.removesuffix(".weight").rpartition(".")[2] for name in parameters}
    names = own | {f"{part}_proj" for name in own if name == "gate_up_proj" for part in ("gate", "up")}
    if not hasattr(model, "base_model_prefix"):
        return names
    from transformers.conversion_mapping import get_model_conversion_mapping

    for conversion in get_model_conversion_mapping(model):  # type: ignore[arg-type]
        targets = {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in conversion.target_patterns}
        if targets & own:
            sources = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
            names |= {name for pattern in sources if (name := pattern.rpartition(".")[2]).isidentifier()}
    return names
