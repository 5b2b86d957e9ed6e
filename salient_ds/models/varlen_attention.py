"""Variable-length attention for packed rows (option ``speed.packed_attention: varlen``).

transformers keeps packed examples apart by a dense mask (B, 1, S, S), with which attention computes every pair of
tokens of a row. Here the kernel is told where examples begin and computes only pairs within them: flash_attn's where it
is installed, else PyTorch's (``torch.nn.attention.varlen``). On a CPU each example is attended to by itself, which is
what tests compare with.

Shape legend: B = rows, S = tokens per row, H = heads, K = heads of keys and values, D = head dimension, T = B S,
E = examples (segments), padding included.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.models.attention import plainly_causal
from salient_ds.models.packing import group_of

NAME = "salient_ds_varlen"
"""transformers does not know the name, and so makes no masks for it."""
BORDERS = "cu_seq_lens_q"
"""Name of the model's optional input: first tokens of the segments in the flattened rows, and T (int32, (E + 1,))."""
_MULTIPLE = 32
"""Borders are filled up with empty segments to a multiple of this, so that compiled layers see few different sizes."""


def use_varlen_attention(model: nn.Module, device: torch.device) -> bool:
    """Let a decoder with attention "sdpa" attend by segments, if it is known to need its mask for attention only.

    On a GPU also its precision has to be bf16 or fp16, and its attention without dropout.

    Returns:
        Whether it does so now; else it keeps the dense mask.
    """
    config: Any = model.config
    group = group_of(config.model_type)
    known = group is not None and group.own_masks and plainly_causal(model, config)
    if config._attn_implementation != "sdpa" or not known or getattr(config, "attention_dropout", 0.0):
        return False
    if device.type == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
        return False
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return bool(config._attn_implementation == NAME)


def uses_varlen_attention(model: nn.Module) -> bool:
    """Whether :func:`use_varlen_attention` has changed ``model``."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def borders(position_ids_BS: Tensor) -> Tensor:
    """Borders of the segments (:data:`BORDERS`) from position_ids that restart. On the CPU this waits for nothing.

    The zeros at the end of a row are its padding, and become one segment.
    """
    rows, size = position_ids_BS.shape
    start_BS = position_ids_BS == 0
    inside_BS = (position_ids_BS != 0).flip(1).cumsum(1).flip(1) > 0  # a later token of the row has a position
    first_of_padding = (~inside_BS).long().cumsum(1) == 1
    start_BS = start_BS & (inside_BS | first_of_padding)
    start_BS[:, 0] = True
    start_E = start_BS.reshape(-1).nonzero().view(-1)
    count = -(-(len(start_E) + 1) // _MULTIPLE) * _MULTIPLE
    out = start_E.new_full((count,), rows * size, dtype=torch.int32)
    out[: len(start_E)] = start_E
    return out


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: (B, H, S, D), (B, K, S, D) twice -> (B, S, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    borders_E, positions = kwargs.get(BORDERS), kwargs.get("position_ids")
    if attention_mask is not None or key.shape[2] != query.shape[2] or (borders_E is None and positions is None):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    rows, heads, size, width = query.shape
    if borders_E is None:
        assert positions is not None
        borders_E = borders(positions.expand(rows, size))
    q, k, v = (t.transpose(1, 2).reshape(rows * size, -1, width) for t in (query, key, value))
    scale = width**-0.5 if scaling is None else scaling
    kernel = _kernel() if query.is_cuda else one_by_one
    return kernel(q, k, v, borders_E, size, scale).view(rows, size, heads, width), None


def one_by_one(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, borders_E: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention of each segment by itself, (T, H, D)."""
    grouped = query_THD.shape[1] != key_TKD.shape[1]
    marks = borders_E.tolist()
    found = []
    for start, end in zip(marks[:-1], marks[1:], strict=True):
        if end > start:
            q, k, v = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (query_THD, key_TKD, value_TKD))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    return _flash_attn if importlib.util.find_spec("flash_attn") is not None else _torch_varlen


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, borders_E: Tensor, longest: int, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        query, key, value, borders_E, borders_E, longest, longest, softmax_scale=scale, causal=True
    )
    return out


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, borders_E: Tensor, longest: int, scale: float) -> Tensor:
    """PyTorch's kernel. Versions differ in their arguments: 2.11 has is_causal or window_size, and may lack scale."""
    from torch.nn.attention.varlen import varlen_attn

    known = _arguments(varlen_attn)
    more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        more["scale"] = scale
    elif scale != query.shape[-1] ** -0.5:
        query = query * (scale * query.shape[-1] ** 0.5)
    copies = query.shape[1] // key.shape[1]
    if copies > 1:  # heads that share keys and values
        key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
    out: Any = varlen_attn(query, key, value, borders_E, borders_E, longest, longest, **more)
    return out[0] if isinstance(out, tuple) else out


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
