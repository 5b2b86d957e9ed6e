"""Lower bound for the time of a training step: its matrix products at the rate that the machine really reaches.

Shape legend: i = in features, o = out features, r = rank, h = width of attention, s = tokens per sequence,
n = tokens per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from salient_ds.adapters.targets import match_targets
from salient_ds.check.model_shapes import architecture, derived_linear_shapes

_FROM_EMBEDDING = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.v_proj",
)
"""Layers whose input is the output of the frozen embedding, so that no input gradient is needed."""


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one step on one process. A multiplication and an addition count as two.

    Not counted are recomputation, elementwise operations, the optimizer and the orthogonality penalty: none of these
    has to be a matrix product of that size, or has to be done at all.
    """

    frozen: int
    """Frozen matrices: forward pass and input gradients."""
    head: int
    """Output embedding: forward pass and input gradients."""
    attention: int
    """Attention scores and weighted sums over unmasked pairs: forward pass and the gradients of both operands."""
    adapters: int
    """Low-rank products of every adapter: forward pass, input gradients and weight gradients."""

    @property
    def total(self) -> int:
        return self.frozen + self.head + self.attention + self.adapters

    def seconds(self, flops_per_second: float) -> float:
        """The lower bound in seconds at the given rate."""
        return self.total / flops_per_second

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def step_flops(
    config: Mapping[str, Any],
    target_modules: str | Sequence[str],
    rank: int,
    batch: int,
    seq: int,
    inner_width: int | None = None,
) -> StepFlops:
    """Count the operations of one training step of a causal LLaMA-family model with adapters of rank ``rank``.

    Args:
        config: the model's config.json.
        target_modules: adapted layers, as in the run configuration.
        batch: sequences on this process.
        seq: tokens per sequence.
        inner_width: k of LoRA^2, whose adapter is i -> k -> r -> k -> o; None for the usual i -> r -> o.

    Raises:
        ValueError: the shapes of this model family are not known.
    """
    arch = architecture(config)
    if arch is None:
        raise ValueError(
            f"model_type={config.get('model_type')!r}: its floor cannot be counted, use a LLaMA-family shape"
        )
    shapes = derived_linear_shapes(config)
    tokens = batch * seq
    frozen = sum(2 * o * i * (1 if name in _FROM_EMBEDDING else 2) for name, (o, i) in shapes.items())
    adapters = 0
    for name, (o, i) in match_targets(shapes, target_modules):
        width = inner_width or rank
        adapters += 6 * (width * (i + o) + (2 * inner_width * rank if inner_width else 0))
        adapters -= 2 * width * i if name in _FROM_EMBEDDING else 0
    pairs = batch * seq * (seq + 1) // 2
    return StepFlops(
        frozen=frozen * tokens,
        head=4 * arch.hidden_size * arch.vocab_size * tokens,
        attention=arch.layers * pairs * arch.heads * arch.head_dim * 2 * (2 + 4),
        adapters=adapters * tokens,
    )


def matrix_rate(device_type: str, dtype_name: str, size: int | None = None, repeats: int = 20) -> dict[str, Any]:
    """Measure the rate of one large square matrix product on random data: the median over ``repeats`` runs.

    Returns:
        ``{"dtype", "size", "flops_per_second"}``.
    """
    import torch

    on_gpu = device_type == "cuda"
    size = size or (8192 if on_gpu else 768)
    dtype = getattr(torch, dtype_name)
    left, right = (torch.randn(size, size, device=device_type, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeats + 5):
        wait()
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        wait()
        seconds.append(time.perf_counter() - began)
    return {"dtype": dtype_name, "size": size, "flops_per_second": 2 * size**3 / statistics.median(seconds[5:])}
