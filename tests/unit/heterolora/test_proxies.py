"""Scores of modules: formulas against plain loops and autograd, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.heterolora.proxies import (
    PROXIES,
    MetricLimit,
    alpha_test,
    check_proxy,
    check_scores,
    constant,
    fisher,
    grad_norm,
    proxy_score,
    snip,
)
from salient_ds.heterolora.shortcut import Shortcut
from salient_ds.heterolora.switched import SwitchedLinear


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, G_A, G_B = draw(3, 5), draw(4, 3, seed=1), draw(3, 5, seed=2), draw(4, 3, seed=3)


def test_formulas() -> None:
    def total(*pairs: tuple[Tensor, Tensor]) -> float:
        return sum(
            abs(w * g) for W, G in pairs for w, g in zip(W.flatten().tolist(), G.flatten().tolist(), strict=True)
        )

    assert math.isclose(float(snip(A, B, G_A, G_B)), total((A, G_A), (B, G_B)))
    assert math.isclose(proxy_score("synflow", -A, B, G_A, G_B, scaling=1.0), total((A, G_A), (B, G_B)))
    norms = [math.sqrt(sum(g * g for g in G.flatten().tolist())) for G in (G_A, G_B)]
    assert math.isclose(float(grad_norm(G_A, G_B)), sum(norms))
    assert not math.isclose(float(grad_norm(G_A, G_B)), math.hypot(*norms))
    assert constant() == 1.0


def model(alpha: float = 16.0, warm: bool = True) -> tuple[SwitchedLinear, Callable[[Tensor], Tensor]]:
    """One adapted layer and the loss of one batch."""
    torch.manual_seed(0)
    layer = SwitchedLinear(nn.Linear(5, 4, dtype=torch.float64), 3, alpha / 3, dtype=torch.float64)
    layer.lora_A.data = A.clone()
    layer.lora_B.data = B.clone() if warm else torch.zeros_like(B)
    return layer, lambda x: F.mse_loss(layer(x), x[:, :4].sin())


def gradients(layer: SwitchedLinear, loss: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B])
    return found[0], found[1]


def test_snip_is_the_slope_of_masks() -> None:
    """Its definition: the loss' derivative by an all-ones mask on each weight."""
    layer, loss = model()
    x = draw(7, 5, seed=4)
    G = gradients(layer, loss(x))
    mask_A, mask_B = torch.ones_like(A, requires_grad=True), torch.ones_like(B, requires_grad=True)
    masked = {"lora_A": layer.lora_A * mask_A, "lora_B": layer.lora_B * mask_B}
    output = torch.func.functional_call(layer, masked, x)
    by_mask = torch.autograd.grad(F.mse_loss(output, x[:, :4].sin()), [mask_A, mask_B])
    assert math.isclose(float(snip(A, B, *G)), float(by_mask[0].abs().sum() + by_mask[1].abs().sum()))


def test_fisher_is_the_square_of_the_slope_by_gates() -> None:
    """A gate on each of the module's inner products, one sample per batch."""
    layer, _ = model()
    expected = found = 0.0
    for x in draw(6, 5, seed=4).split(1):
        gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
        output = layer.base(x) + F.linear(F.linear(x, layer.lora_A) * gate * layer.scaling, layer.lora_B)
        (slope,) = torch.autograd.grad(output.square().sum(), gate)
        expected += 0.5 * float(slope.square().sum())
        found += float(fisher(A, gradients(layer, layer(x).square().sum())[0]))
    assert math.isclose(found, expected)
    assert found > 0


def test_gradients_are_summed_before_the_score() -> None:
    """Why processes must add their gradients and not their scores."""
    layer, loss = model()
    parts = [gradients(layer, loss(x)) for x in draw(8, 5, seed=4).split(4)]
    summed = [a + b for a, b in zip(*parts, strict=True)]
    for score in (lambda G: grad_norm(*G), lambda G: snip(A, B, *G)):
        assert float(score(summed)) < 0.999 * sum(float(score(part)) for part in parts)


@pytest.mark.parametrize("proxy", ["grad_norm", "snip", "synflow"])
def test_untrained_modules(proxy: str) -> None:
    """With B = 0 only GRAD-NORM sees anything, and only B's gradient."""
    layer, loss = model(warm=False)
    G = gradients(layer, loss(draw(7, 5, seed=4)))
    score = proxy_score(proxy, A, layer.lora_B.detach(), *G, scaling=layer.scaling)
    assert score == (float(G[1].norm()) if proxy == "grad_norm" else 0.0)


def test_scale_free_takes_alpha_out() -> None:
    """At B = 0 the score is proportional to alpha / r with the same factors; scale-free it does not depend on it."""
    plain, free = [], []
    for alpha in (4.0, 16.0):
        layer, loss = model(alpha, warm=False)
        G = gradients(layer, loss(draw(7, 5, seed=4)))
        plain.append(proxy_score("grad_norm", A, layer.lora_B.detach(), *G, scaling=layer.scaling))
        free.append(proxy_score("grad_norm", A, layer.lora_B.detach(), *G, scaling=layer.scaling, scale_free=True))
    assert math.isclose(plain[1], 4 * plain[0])
    assert math.isclose(free[1], free[0])
    assert math.isclose(
        proxy_score("snip", A, B, G_A, G_B, scaling=5.0, scale_free=True) * 5,
        proxy_score("snip", A, B, G_A, G_B, scaling=5.0),
    )


def test_a_shortcut_and_a_layer_with_the_same_update_score_alike() -> None:
    """Scale-free, a shortcut of alpha 4 beside a linear layer of alpha 16 is not at a disadvantage."""
    torch.manual_seed(1)
    layer = SwitchedLinear(nn.Linear(5, 5, dtype=torch.float64), 3, 16 / 3, dtype=torch.float64)
    shortcut = Shortcut("shortcut_sa", 5, 3, 4 / 3, dtype=torch.float64)
    shortcut.lora_A.data = layer.lora_A.data.clone()
    x = draw(7, 5, seed=4)
    loss = (layer(x) + shortcut(x)).sin().square().sum()
    leaves = [layer.lora_A, layer.lora_B, shortcut.lora_A, shortcut.lora_B]
    G = torch.autograd.grad(loss, leaves)
    found = [
        proxy_score("grad_norm", leaves[i], leaves[i + 1], G[i], G[i + 1], scaling=m.scaling, scale_free=free)
        for free in (False, True)
        for i, m in ((0, layer), (2, shortcut))
    ]
    assert math.isclose(found[0], 4 * found[1])
    assert math.isclose(found[2], found[3])


def test_low_precision_factors_are_scored_in_double() -> None:
    """A sum of 2**12 products of 2**-12 each is 1 in float64, and would stop growing in bf16."""
    weight, gradient = torch.full((1, 4096), 2.0**-6).bfloat16(), torch.full((1, 4096), 2.0**-6).bfloat16()
    assert float(snip(weight, weight.T, gradient, gradient.T * 0)) == 1.0
    tiny = torch.full((2, 2), 1e-30)
    assert float(grad_norm(tiny, tiny * 0)) > 1e-30  # its square is 0 in float32


@pytest.mark.parametrize("levels", [1, 7, 10])
def test_alpha_test_finds_the_first_level_within_the_limit(levels: int) -> None:
    for first in range(levels + 1):
        asked: list[float] = []

        def metric(importance: float, first: int = first, asked: list[float] = asked) -> float:
            asked.append(importance)
            return 1.0 if round(importance * levels) >= first else 0.5

        assert alpha_test(metric, MetricLimit.of(1.0, 0.01, "accuracy"), levels) == first
        assert len(asked) <= math.ceil(math.log2(levels + 1))
        assert all(0 <= value < 1 for value in asked)


def test_limits() -> None:
    accuracy = MetricLimit.of(0.8, 0.01, "accuracy")
    assert not accuracy.crossed(0.793)
    assert accuracy.crossed(0.791)
    static = MetricLimit.of(20.0, 0.01, "perplexity", "static")
    assert (static.crossed(20.19), static.crossed(20.21)) == (False, True)
    dynamic = MetricLimit.of(20.0, 0.01, "perplexity", "dynamic")
    assert math.isclose(dynamic.value, 20.0005)
    assert all(limit.crossed(math.nan) for limit in (accuracy, static, dynamic))
    assert static.crossed(math.inf)
    assert not static.crossed(1.0)


NAMES = ["a", "b", "c"]


def verdict(proxy: str, scores: list[float], trained: list[bool] | None = None) -> str:
    trained_M = None if trained is None else torch.tensor(trained)
    found = check_scores(proxy, NAMES, torch.tensor(scores, dtype=torch.float64), trained_M)
    assert (found.kind == "ok") == (found.reason == "")
    return found.kind


def test_verdicts() -> None:
    for proxy in PROXIES:
        assert verdict(proxy, [1.0, 2.0, 0.5], [True] * 3) == "ok"
        assert verdict(proxy, [1.0, math.nan, 0.5]) == "non_finite"
        assert verdict(proxy, [1.0, math.inf, 0.5]) == "non_finite"
    for proxy in ("snip", "synflow", "fisher"):
        assert verdict(proxy, [0.0] * 3) == verdict(proxy, [0.0] * 3, [False] * 3) == "degenerate"
        assert verdict(proxy, [0.0, 1.0, 0.0], [False, True, False]) == "locked_in"
        assert verdict(proxy, [0.0, 1.0, 0.0], [True] * 3) == verdict(proxy, [0.0, 1.0, 0.0]) == "ok"
    for proxy in ("constant", "grad_norm", "alpha_test"):
        assert verdict(proxy, [0.0] * 3, [False] * 3) == "ok"


def test_reasons_name_modules_and_numbers() -> None:
    found = check_scores("grad_norm", NAMES, torch.tensor([1.0, math.nan, math.inf]))
    assert "2 of 3 modules (b, ...)" in found.reason
    found = check_scores("snip", NAMES, torch.tensor([0.0, 1, 1]), torch.tensor([False, True, True]))
    assert "1 of 3 modules have not been trained" in found.reason


def test_unknown_proxies() -> None:
    for proxy in PROXIES:
        check_proxy(proxy)
    with pytest.raises(ValueError, match="'gradnorm' is unknown: choose one of constant, grad_norm"):
        check_proxy("gradnorm")
    with pytest.raises(ValueError, match="scores a whole network"):
        check_proxy("jacob_cov")
