"""FlashAttention's variable-length function in plain PyTorch, put where transformers keeps the real one.

It shows what transformers hands to flash attention: where examples begin, and which window. It says nothing about the
kernels themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Arguments as in flash_attn 2; q (tokens, heads, width), k and v (tokens, heads or fewer, width)."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
    borders, parts = cu_seqlens_q.tolist(), []
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        query, key, value = (x[first:last].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        seen = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        seen = seen.triu(-window_size[0]) if window_size[0] >= 0 else seen
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


def refuse(*args: Any, **options: Any) -> Tensor:
    raise AssertionError("attention over whole rows: nobody told it where examples begin")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers take "flash_attention_2" for installed, and use :func:`attend`."""
    from transformers import PreTrainedModel
    from transformers import modeling_flash_attention_utils as flash

    def supported(self: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
        return bool(self._supports_flash_attn)

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", supported)
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": refuse,
        "_flash_varlen_fn": attend,
        "_flash_with_kvcache_fn": None,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(attend),
    }.items():
        monkeypatch.setattr(flash, name, value)
