"""The growing adapter: three states of a row, and the score of the whole matrix against dense autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salient_ds.adapters.growing import RESERVE_SIGMA, GrowingLinear
from salient_ds.adapters.inject import inject
from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.methods.increlora.options import IncreLoRAConfig

CPU = torch.device("cpu")
WIDE, TALL, ROWS = 6, 5, 7


def adapter_of(start: int = 2, reserve: int = 2, scale: bool = True, **options: Any) -> GrowingLinear:
    torch.manual_seed(0)
    adapter = GrowingLinear(
        nn.Linear(WIDE, TALL), ROWS, start, reserve, 8.0, init_std=0.5, generator=torch.Generator().manual_seed(1),
        **options,
    )  # fmt: skip
    if scale:
        with torch.no_grad():
            adapter.lora_E.copy_(torch.linspace(0.5, 1.5, ROWS))
    return adapter


def first(active: int) -> Tensor:
    return torch.arange(ROWS) < active


def dense(adapter: GrowingLinear, sigma_R: Tensor, active: int) -> Tensor:
    """alpha / r B diag(sigma) A."""
    return 8.0 / active * (adapter.lora_B * sigma_R) @ adapter.lora_A


def test_three_states() -> None:
    adapter, x = adapter_of(), torch.randn(3, 4, WIDE)
    for active, final in ((2, False), (3, False), (6, False), (6, True), (7, False)):
        adapter.set_mask(first(active), True, final)
        sigma = torch.where(first(active), adapter.lora_E, torch.zeros(ROWS))
        if not final:
            sigma = torch.where(first(active + 2) & ~first(active), RESERVE_SIGMA, sigma)
        torch.testing.assert_close(adapter.sigma(), sigma)
        expected = adapter.base(x) + x @ dense(adapter, sigma, active).t()
        torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-6)
        assert adapter.scaling == 8.0 / active


def test_gradients_by_state() -> None:
    """Active rows learn everything, reserve rows their vectors, the others nothing, not even from the penalty."""
    adapter = adapter_of(penalty=OrthogonalityPenalty(1, 0.1, "mean_norm"))
    adapter._penalty[0].arm(1.0, CPU)
    adapter(torch.randn(3, 4, WIDE)).square().sum().backward()
    assert adapter.lora_E.grad is not None and adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
    assert (adapter.lora_E.grad != 0).tolist() == [True] * 2 + [False] * 5
    assert adapter.lora_A.grad.ne(0).any(1).tolist() == [True] * 4 + [False] * 3
    assert adapter.lora_B.grad.ne(0).any(0).tolist() == [True] * 4 + [False] * 3


def test_reserve_learns_from_the_task() -> None:
    adapter = adapter_of()
    adapter(torch.randn(3, 4, WIDE)).square().sum().backward()
    assert adapter.lora_A.grad is not None
    reserve, off = adapter.lora_A.grad[2:4].norm(), adapter.lora_A.grad[4:].norm()
    assert 0 < reserve < 1e-2 and off == 0


def test_growth_divides_what_is_there() -> None:
    adapter, x = adapter_of(1, 0), torch.randn(4, WIDE)
    with torch.no_grad():
        adapter.lora_E[1] = 0
    before = adapter(x) - adapter.base(x)
    adapter.set_mask(first(2), True, False)
    torch.testing.assert_close(adapter(x) - adapter.base(x), before / 2)


def score_by_hand(adapter: GrowingLinear, x: Tensor, weight: Tensor) -> Tensor:
    update = dense(adapter, adapter.sigma(), int(adapter.rank_mask_R.sum())).detach().requires_grad_()
    loss = ((adapter.base(x) + x @ update.t()).sin() * weight).sum()
    (grad,) = torch.autograd.grad(loss, update)
    return (update * grad).abs().sum() / math.sqrt(WIDE * TALL)


@pytest.mark.parametrize("block_bytes", [1, 48, 100, 144, 10**6])
@pytest.mark.parametrize("recompute", [False, True])
def test_score_equals_dense_autograd(block_bytes: int, recompute: bool) -> None:
    scores = ModuleScores(3, block_bytes)
    adapter = adapter_of(scores=scores, penalty=OrthogonalityPenalty(3, 0.1, "mean_norm"))
    adapter.penalty_slot = 1
    x, weight = torch.randn(2, 3, 4, WIDE), torch.randn(3, 4, TALL)
    scores.arm(8.0, CPU, None)
    for part in x:  # two micro-batches, with a loss scale
        part.requires_grad_()
        y = checkpoint(adapter, part, use_reentrant=False) if recompute else adapter(part)
        ((y.sin() * weight).sum() * 8.0).backward()
    expected = torch.stack([score_by_hand(adapter, part, weight) for part in x]).sum().detach()
    assert float(expected) > 0.5
    torch.testing.assert_close(scores.score_M, torch.tensor([0.0, float(expected), 0.0]).double(), rtol=1e-5, atol=0)


def test_score_leaves_gradients_alone() -> None:
    grads = []
    for armed in (False, True):
        scores = ModuleScores(1, 100)
        adapter, x = adapter_of(scores=scores), torch.linspace(-1, 1, 2 * WIDE).view(2, WIDE).requires_grad_()
        if armed:
            scores.arm(1.0, CPU, None)
        adapter(x).square().sum().backward()
        assert bool(scores.score_M.any()) == armed
        grads.append([x.grad, adapter.lora_A.grad, adapter.lora_B.grad, adapter.lora_E.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_block_is_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from salient_ds.adapters import module_score as module

    shapes, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda a, b: shapes.append((len(a), b.shape[1])) or product(a, b))
    scores = ModuleScores(1, 2 * 2 * 4 * WIDE)  # two rows of gradient, two of the update
    adapter = adapter_of(scores=scores)
    scores.arm(1.0, CPU, None)
    adapter(torch.randn(4, WIDE)).sum().backward()
    assert shapes == [(2, WIDE), (2, WIDE), (1, WIDE)]


def test_average_comes_before_the_absolute_value() -> None:
    """Two processes that pull in opposite directions: the mean of scores is large, the score of the mean is zero."""
    seen: list[Tensor] = []

    def cancel(block: Tensor) -> None:
        seen.append(block.clone())
        block.zero_()

    scores = ModuleScores(1, 100)
    adapter = adapter_of(scores=scores)
    scores.arm(1.0, CPU, cancel)
    adapter(torch.randn(4, WIDE)).sum().backward()
    assert sum(block.numel() for block in seen) == WIDE * TALL and scores.score_M.item() == 0


def test_nothing_is_scored_in_evaluation_or_unarmed() -> None:
    scores = ModuleScores(1, 100)
    adapter, x = adapter_of(scores=scores), torch.randn(4, WIDE)
    adapter(x).sum().backward()
    scores.arm(1.0, CPU, None)
    adapter.eval()(x).sum().backward()
    scores.disarm()
    adapter.train()(x).sum().backward()
    assert scores.score_M.item() == 0


def test_injected_model_starts_next_to_its_base() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDE, TALL), nn.Linear(TALL, 4)), torch.randn(3, WIDE)
    before = model(x).detach()
    config = AdapterConfig(target_modules="all-linear", rank=ROWS, alpha=8.0)
    adapted = inject(model, config, IncreLoRAConfig(target_rank=4, top_h=1), 0, torch.float32)
    assert adapted.scores is not None and adapted.layout.ranks == (4 + 3, 7)
    for adapter in adapted.adapters.values():
        assert isinstance(adapter, GrowingLinear) and (adapter.reserve, adapter.scaling) == (2, 8.0)
        assert adapter.rank_mask_R.tolist() == [True] + [False] * 6
        assert adapter.reserve_mask_R.tolist() == [False, True, True] + [False] * 4
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-5)
    assert not torch.equal(model(x).detach(), before)  # the reserve's 1e-5
    adapted.set_mask(torch.tensor([i % 7 < 3 for i in range(14)]), True, False)
    assert [a.scaling for a in adapted.adapters.values()] == [8.0 / 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_is_the_first_rows_of_the_same_draw(dtype: torch.dtype) -> None:
    whole, small = adapter_of(dtype=dtype), adapter_of(dtype=dtype, room=5, scale=False)
    assert (small.rank, small.most, whole.most) == (5, ROWS, ROWS)
    assert torch.equal(small.lora_A, whole.lora_A[:5]) and torch.equal(small.lora_B, whole.lora_B[:, :5])
    assert small.rank_mask_R.tolist() == [True] * 2 + [False] * 3 and len(small.lora_E) == 5
    assert small.reserve_mask_R.tolist() == [False, False, True, True, False]
    starts = small.start_values()
    assert all(value.dtype == torch.float32 for value in starts.values())
    assert torch.equal(starts["A"], whole.lora_A.float()) and torch.equal(starts["B"], whole.lora_B.float())
    assert starts["E"].tolist() == [0.0] * ROWS


def test_rows_off_change_nothing() -> None:
    """Output, gradients and the penalty's are those of an adapter with room for all rows."""
    grads = []
    x = torch.randn(3, WIDE)
    for room in (None, 4):
        adapter = adapter_of(room=room, scale=False, penalty=OrthogonalityPenalty(1, 0.1, "mean_norm"))
        with torch.no_grad():
            adapter.lora_E[:2] = 1.5
        adapter._penalty[0].arm(1.0, CPU)
        y = adapter(x)
        y.square().sum().backward()
        assert adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
        grads.append([y.detach(), adapter.lora_A.grad[:4], adapter.lora_B.grad[:, :4]])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
