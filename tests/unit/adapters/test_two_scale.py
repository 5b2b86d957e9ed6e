"""The two-scale adapter: forward, mask, export as a plain pair, and the penalty's gradient against autograd.

Shape legend: I = in, O = out features, R = rank, k = inner width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.two_scale import TwoScaleLinear, two_scale_pair
from salient_ds.export.fold import AdapterFactors, delta_weight, fold

WIDE, TALL = 11, 7


def adapter_of(rank: int, k: int, penalty: OrthogonalityPenalty | None = None, std: float = 0.3) -> TwoScaleLinear:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    adapter = TwoScaleLinear(nn.Linear(WIDE, TALL), rank, k, 2.0, init_std=std, generator=g, penalty=penalty)
    return adapter.double()


def awake(adapter: TwoScaleLinear) -> TwoScaleLinear:
    with torch.no_grad():
        adapter.lora_E.copy_(torch.linspace(-1, 2, adapter.rank))
    return adapter


def dense_update(adapter: TwoScaleLinear, mask_R: Tensor) -> Tensor:
    """scaling * bb aa diag(E * mask) B A, (O, I)."""
    inner_RR = torch.diag(adapter.lora_E * mask_R)
    return adapter.scaling * adapter.lora_bb @ adapter.lora_aa @ inner_RR @ adapter.lora_B @ adapter.lora_A


def test_a_fresh_adapter_changes_nothing() -> None:
    adapter = TwoScaleLinear(nn.Linear(WIDE, TALL), 4, 3, 2.0)
    x_BI = torch.randn(5, WIDE)
    assert torch.equal(adapter(x_BI), adapter.base(x_BI))
    assert not adapter.lora_E.any()


def test_initial_spread() -> None:
    adapter = TwoScaleLinear(nn.Linear(300, 300), 64, 64, 1.0, generator=torch.Generator().manual_seed(0))
    for name in ("A", "B", "aa", "bb"):
        factor = getattr(adapter, f"lora_{name}")
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(factor.detach().mean())) < 0.002


@pytest.mark.parametrize(("rank", "k"), [(4, 2), (2, 4), (3, 3), (1, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_forward_and_gate(rank: int, k: int, gated: bool) -> None:
    adapter = awake(adapter_of(rank, k))
    mask_R = torch.arange(rank) % 2 == 0
    adapter.rank_mask_R.copy_(mask_R)
    adapter.gated = gated
    x_BI = torch.randn(2, 5, WIDE, dtype=torch.float64)
    update_OI = dense_update(adapter, mask_R if gated else torch.ones_like(mask_R))
    torch.testing.assert_close(adapter(x_BI), adapter.base(x_BI) + x_BI @ update_OI.T)
    adapter(x_BI).sum().backward()
    assert adapter.lora_E.grad is not None
    assert ((adapter.lora_E.grad == 0) == (gated & ~mask_R)).all()


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(isinstance(a, Tensor) and a.numel() == out.numel() for a in args):
            self.largest = max(self.largest, out.numel())
        return out


def test_the_dense_product_is_never_formed() -> None:
    adapter = TwoScaleLinear(nn.Linear(60, 50), 4, 3, 1.0, penalty=OrthogonalityPenalty(1, 0.1, "mean_norm", 5))
    adapter.base.weight.requires_grad_(False)
    x_BI = torch.randn(2, 60)
    adapter._penalty[0].arm(1.0, torch.device("cpu"))
    with LargestTensor() as mode:
        adapter(x_BI).sum().backward()
    assert 0 < mode.largest <= 3 * 60 < 50 * 60


def test_addresses() -> None:
    adapter = adapter_of(4, 2)
    shapes = {name: (a.shape, a.rank_axis, a.parameter.shape) for name, a in adapter.factors().items()}
    assert shapes == {
        "A": ((2, WIDE), None, (2, WIDE)), "B": ((4, 2), 0, (4, 2)), "E": ((4,), 0, (4,)),
        "aa": ((2, 4), 1, (2, 4)), "bb": ((TALL, 2), None, (TALL, 2)),
    }  # fmt: skip


@pytest.mark.parametrize(("rank", "k"), [(5, 2), (3, 4)])
def test_folds_into_a_plain_pair_of_the_live_rank(rank: int, k: int) -> None:
    adapter = awake(adapter_of(rank, k))
    mask_R = torch.arange(rank) != 1
    A_RI, B_OR = two_scale_pair(adapter.lora_A, adapter.lora_B, adapter.lora_aa, adapter.lora_bb)
    factors = AdapterFactors("m", A_RI, adapter.lora_E.detach(), B_OR, mask=mask_R, scaling=adapter.scaling)
    pair = fold(factors)
    assert pair is not None and pair.rank == rank - 1
    torch.testing.assert_close(delta_weight(pair), dense_update(adapter, mask_R).float())


def plain_penalty(adapter: TwoScaleLinear, mask_R: Tensor, form: str) -> Tensor:
    """The five terms as one would write them, dense, with the masked ranks cut out; mean of norms or sum of squares."""
    A, bb = adapter.lora_A, adapter.lora_bb
    B, aa = adapter.lora_B[mask_R], adapter.lora_aa[:, mask_R]
    narrow = adapter.rank < adapter.inner_width

    def off(gram: Tensor) -> Tensor:
        return (gram - torch.eye(len(gram), dtype=gram.dtype)).norm()

    own = [off(A @ A.T), off(B @ B.T if narrow else B.T @ B), off(aa.T @ aa if narrow else aa @ aa.T), off(bb.T @ bb)]
    terms = torch.stack([*own, ((A.T @ B.T) @ (aa.T @ bb.T)).norm()])
    return terms.square().sum() if form == "squared" else terms.mean()


@pytest.mark.parametrize("form", ["mean_norm", "squared"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rank", "k"), [(6, 2), (2, 5), (4, 4), (1, 1)])
def test_penalty_gradient_is_that_of_autograd(rank: int, k: int, gated: bool, form: Any) -> None:
    coefficient, scale = 0.3, 8.0
    penalty = OrthogonalityPenalty(1, coefficient, form, terms=5)
    adapter = awake(adapter_of(rank, k, penalty)).float()
    mask_R = torch.arange(rank) != 1
    adapter.rank_mask_R.copy_(mask_R)
    adapter.gated = gated
    live_R = mask_R if gated else torch.ones_like(mask_R)
    x_BI, names = torch.randn(5, WIDE), ("A", "B", "aa", "bb")
    parameters = [getattr(adapter, f"lora_{name}") for name in names]
    penalty.arm(scale, torch.device("cpu"))
    adapter(x_BI).square().sum().backward()
    found = [p.grad.clone() for p in parameters]
    penalty.disarm()
    adapter.zero_grad()
    expected = coefficient * plain_penalty(adapter, live_R, form)
    torch.testing.assert_close(penalty.value(), expected.detach())
    (adapter(x_BI).square().sum() + scale * expected).backward()
    for name, mine, parameter in zip(names, found, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_planes_become_orthogonal() -> None:
    """With R >= 2 k all five terms can vanish, and descending the penalty alone gets there."""
    penalty = OrthogonalityPenalty(1, 1.0, "squared", terms=5)
    adapter = adapter_of(6, 2, penalty).float()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.03)
    x_BI = torch.zeros(1, WIDE)
    for _ in range(300):
        penalty.arm(1.0, torch.device("cpu"))
        optimizer.zero_grad()
        (adapter(x_BI).sum() * 0).backward()
        optimizer.step()
    assert penalty.norms_M2 is not None and (penalty.norms_M2 < 1e-3).all()
    assert float((adapter.lora_aa @ adapter.lora_B).detach().norm()) < 1e-3


def test_the_floor_of_the_cross_term_for_small_ranks() -> None:
    """R <= k: with orthonormal factors the cross term is sqrt(R), whatever the planes."""
    penalty = OrthogonalityPenalty(1, 1.0, "mean_norm", terms=5)
    adapter = adapter_of(2, 3, penalty).float()
    with torch.no_grad():
        for name in ("A", "B", "aa", "bb"):
            nn.init.orthogonal_(getattr(adapter, f"lora_{name}"))
    penalty.arm(1.0, torch.device("cpu"))
    adapter(torch.zeros(1, WIDE)).sum().backward()
    assert penalty.norms_M2 is not None
    torch.testing.assert_close(penalty.norms_M2[0, 4], torch.tensor(2.0).sqrt())
    assert (penalty.norms_M2[0, :4] < 1e-5).all()


def test_a_cross_term_of_zero_adds_nothing() -> None:
    """Outer factors that cannot see the planes: the norm is 0 although aa B is not."""
    penalty = OrthogonalityPenalty(1, 1.0, "mean_norm", terms=5)
    adapter = adapter_of(6, 2, penalty).float()
    with torch.no_grad():
        adapter.lora_bb.zero_()
    penalty.arm(1.0, torch.device("cpu"))
    (adapter(torch.zeros(1, WIDE)).sum() * 0).backward()
    assert penalty.norms_M2 is not None and penalty.norms_M2[0, 4] == 0
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) < 10 for g in grads)


def test_coefficient_zero_measures_and_adds_nothing() -> None:
    penalty = OrthogonalityPenalty(1, 0.0, "mean_norm", terms=5)
    adapter = adapter_of(4, 2, penalty).float()
    penalty.arm(1.0, torch.device("cpu"))
    (adapter(torch.ones(1, WIDE)).sum() * 0).backward()
    assert adapter.lora_A.grad is not None and not adapter.lora_A.grad.any()
    assert penalty.norms_M2 is not None and (penalty.norms_M2 > 0).all() and float(penalty.value()) == 0
