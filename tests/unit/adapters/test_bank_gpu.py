"""On a GPU Gram matrices are bf16 products with fp32 results: packed and separate adapters still agree."""

from __future__ import annotations

import pytest
import torch

from tests.unit.adapters.test_bank import SALIENT, WIDTH, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("ragged", [False, True])
def test_packed_equals_separate_in_bf16(ragged: bool) -> None:
    device = torch.device("cuda")
    pair = [make(SALIENT, packed) for packed in (False, True)]
    mask_N = torch.rand(pair[0].layout.total, generator=torch.Generator().manual_seed(4)) > 0.4
    found = []
    for adapted in pair:
        adapted.trained.to(device, torch.bfloat16)
        for adapter in adapted.adapters.values():
            adapter.to(device)
        if ragged:
            adapted.set_mask(mask_N, gate=True)
        adapted.model.train()
        assert adapted.penalty is not None
        adapted.penalty.arm(1.0, device)
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)).to(device, torch.bfloat16)
        out = adapted.trained(x)
        out.float().square().sum().backward()
        grads = []
        for adapter in adapted.adapters.values():
            for where in adapter.factors().values():
                assert where.parameter.grad is not None
                numel = int(torch.Size(where.shape).numel())
                grads.append(where.parameter.grad.view(-1)[where.offset : where.offset + numel].float().cpu())
        found.append((out.detach().float().cpu(), torch.cat(grads), adapted.penalty.norms_M2))
    (out, grads, norms), (out_packed, grads_packed, norms_packed) = found
    torch.testing.assert_close(out_packed, out, atol=0.1, rtol=0.03)
    torch.testing.assert_close(norms_packed, norms, atol=1e-3, rtol=1e-3)
    assert torch.nn.functional.cosine_similarity(grads_packed, grads, dim=0) > 0.999
