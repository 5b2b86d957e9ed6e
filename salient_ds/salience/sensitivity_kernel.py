"""The update of AdaLoRA's statistic in one pass over memory, as a Triton kernel.

:func:`salient_ds.salience.sensitivity.update` is the definition. Its eight elementwise operations move 80 bytes per
element; this kernel reads four numbers and writes two, 24 bytes. Triton comes with PyTorch's builds for GPUs.

Shape legend: n = elements.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch without GPUs
    triton = None

BLOCK = 1024
AVAILABLE = triton is not None
"""Whether the kernel can be compiled here."""

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _update(value_n, grad_n, mean_n, spread_n, n, beta1, alpha1, beta2, alpha2, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        value = tl.load(value_n + at, mask=inside).to(tl.float32)
        now = tl.abs(value * tl.load(grad_n + at, mask=inside).to(tl.float32))
        # the same roundings as torch's kernels: a product, then a product and a sum in one
        mean = tl.fma(now, alpha1, tl.load(mean_n + at, mask=inside) * beta1)
        spread = tl.fma(tl.abs(now - mean), alpha2, tl.load(spread_n + at, mask=inside) * beta2)
        tl.store(mean_n + at, mean, mask=inside)
        tl.store(spread_n + at, spread, mask=inside)


def update_span(
    sensitivity_n: Tensor, uncertainty_n: Tensor, value_n: Tensor, grad_n: Tensor, beta1: float, beta2: float
) -> None:
    """Take one step into both averages, in place. All four are contiguous; the averages are fp32.

    Call it only if :data:`AVAILABLE`.
    """
    n = value_n.numel()
    if n == 0:
        return
    assert all(t.is_contiguous() for t in (sensitivity_n, uncertainty_n, value_n, grad_n))
    kernel: Any = _update
    grid = (triton.cdiv(n, BLOCK),)
    kernel[grid](value_n, grad_n, sensitivity_n, uncertainty_n, n, beta1, 1 - beta1, beta2, 1 - beta2, BLOCK=BLOCK)
