"""The benchmark's plain loop clips and steps as textbook mixed precision does."""

from __future__ import annotations

import pytest
import torch
from salient_eval.bench.plain_engine import PlainEngine


@pytest.mark.parametrize("bound", [0.0, 0.01, 1e6])
def test_clipped_in_fp32_while_it_is_cast(bound: float) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(7, 5, bias=False).to(torch.bfloat16)
    master = module.weight.detach().float().requires_grad_()
    x = torch.randn(3, 7).to(torch.bfloat16)
    groups = [{"params": list(module.parameters())}]
    engine = PlainEngine(module, groups, lambda g: torch.optim.AdamW(g, lr=0.1, eps=1e-3), bound, autocast=False)
    engine.backward(module(x).square().sum())
    assert module.weight.grad is not None
    master.grad = module.weight.grad.float()
    if bound:
        norm = torch.nn.utils.clip_grad_norm_([master], bound)
    engine.update()
    torch.optim.AdamW([master], lr=0.1, eps=1e-3).step()
    assert engine.masters is not None
    torch.testing.assert_close(engine.masters.masters[0].data, master.data)
    torch.testing.assert_close(engine.masters.masters[0].grad, master.grad)
    torch.testing.assert_close(module.weight.data, master.data.to(torch.bfloat16))
    if bound:
        torch.testing.assert_close(engine.get_global_grad_norm(), norm)
