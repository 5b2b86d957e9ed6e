"""LoRA+ with ratio c is LoRA with c times the alpha: what the methods page says, checked with plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def trained(scaling: float, ratio: float, steps: int = 12) -> Tensor:
    """The update s B A after some steps of Adam, where B learns ``ratio`` times as fast as A."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    B = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [A], "lr": 1e-2}, {"params": [B], "lr": 1e-2 * ratio}], weight_decay=0.0, eps=1e-30
    )
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ A.T @ B.T * scaling - y).square().mean().backward()
        optimizer.step()
    return (scaling * B @ A).detach()


@pytest.mark.parametrize("ratio", [4.0, 16.0])
def test_ratio_is_alpha(ratio: float) -> None:
    torch.testing.assert_close(trained(2.0, ratio), trained(2.0 * ratio, 1.0), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(trained(2.0, ratio), trained(2.0, 1.0), rtol=1e-2)
