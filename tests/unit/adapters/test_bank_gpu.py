"""On a GPU Gram matrices are bf16 products with fp32 results: packed and separate adapters still agree."""

from __future__ import annotations

import pytest
import torch

from salient_ds.adapters.stacked_penalty import add_penalty_gradient
from tests.unit.adapters.test_bank import METHODS, SALIENT, WIDTH, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["salientlora", "lora2", "lora2_wide"])
def test_packed_equals_separate_in_bf16(name: str, ragged: bool) -> None:
    device = torch.device("cuda")
    pair = [make(METHODS[name], packed) for packed in (False, True)]
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


def test_the_recorded_penalty_follows_values_masks_and_scale() -> None:
    """The first pass with given masks runs kernel by kernel, the second records them, later ones replay that."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    adapted = make(SALIENT, packed=True)
    adapted.trained.to(device, torch.bfloat16)
    adapted.model.train()
    penalty = adapted.penalty
    assert penalty is not None and adapted.packed is not None
    bank = adapted.packed.banks[0]
    masks = torch.rand(2, adapted.layout.total, generator=torch.Generator().manual_seed(4)) > 0.4
    for index in range(8):
        if index in (0, 4):
            adapted.set_mask(masks[index // 4], gate=True)
            for adapter in adapted.adapters.values():
                adapter.to(device)
        bank.factors.data.mul_(1.1)
        penalty.arm(2.0 if index >= 6 else 1.0, device)
        bank._refresh()
        flat = bank.factors.detach()
        found, wanted = torch.ones_like(flat), torch.ones_like(flat)
        for stack in bank._stacks:
            add_penalty_gradient(penalty, stack, flat, wanted)
        norms = penalty.norms_M2.clone()
        penalty.arm(penalty.gradient_scale, device)
        bank._add_penalty(penalty, found)
        torch.testing.assert_close(penalty.norms_M2, norms)
        torch.testing.assert_close(
            found, wanted, atol=0.02, rtol=0.01
        )  # one sum of two bf16 numbers, rounded elsewhere
        assert (bank._penalty_graph._graph is not None) == (index not in (0, 4, 6))
        assert not torch.equal(found, torch.ones_like(flat))


def test_norms_outlive_graphs_that_are_launched_after_their_own() -> None:
    """One bank is recorded anew among others: what it notes must not lie where theirs compute."""
    device = torch.device("cuda")
    adapted = make(SALIENT, packed=True)
    adapted.trained.to(device, torch.bfloat16)
    adapted.model.train()
    penalty = adapted.penalty
    assert penalty is not None and adapted.packed is not None
    banks = list(adapted.packed.banks)[::-1]  # as in a backward pass
    assert len(banks) == 2
    for index in range(6):
        if index == 3:  # only what the first of them holds
            for adapter in banks[0]._adapters:
                adapter.set_mask(torch.arange(adapter.rank) % 2 == 0, gate=True)
        for bank in banks:
            bank.factors.data.mul_(1.05)
            bank._refresh()
        penalty.arm(1.0, device)
        for bank in banks:
            for stack in bank._stacks:
                add_penalty_gradient(penalty, stack, bank.factors.detach(), torch.zeros_like(bank.factors))
        wanted = penalty.norms_M2.clone()
        penalty.arm(1.0, device)
        for bank in banks:
            bank._add_penalty(penalty, torch.zeros_like(bank.factors))
        torch.testing.assert_close(penalty.norms_M2, wanted)
