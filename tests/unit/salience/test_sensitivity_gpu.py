"""One pass over memory gives the statistic that eight operations give."""

from __future__ import annotations

import pytest
import torch

from salient_ds.salience.sensitivity import init, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_eight_operations(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    draw = torch.Generator(device).manual_seed(0)
    sizes = [1, 1023, 1024, 100_003]
    eager, fused = (init([torch.zeros(n, device=device) for n in sizes]) for _ in range(2))
    for _ in range(6):
        values = [torch.randn(n, device=device, generator=draw) for n in sizes]
        grads = [torch.randn(n, device=device, generator=draw).to(dtype) for n in sizes]
        update(eager, values, [g.float() for g in grads], 0.85, 0.9)
        update(fused, values, grads, 0.85, 0.9, fused=True)
    for a, b in zip(eager.sensitivity + eager.uncertainty, fused.sensitivity + fused.uncertainty, strict=True):
        assert a.any()
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-7)
