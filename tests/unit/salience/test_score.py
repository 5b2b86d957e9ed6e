"""Loss weights, magnitudes, normalisations, each against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from salient_ds.salience import score

NAN = float("nan")


def test_losses_from_norms() -> None:
    norms_TM2 = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [2.0, 5.0]]])
    assert score.orthogonality_losses(norms_TM2, per_module=True).tolist() == [[5, 1], [25, 29]]
    assert score.orthogonality_losses(norms_TM2, per_module=False).tolist() == [[2.5, 2.0]]


def test_the_most_orthogonal_step_weighs_most() -> None:
    # sum / L = 8/1, 8/2, 8/4, 8/1 -> min-max between 2 and 8
    losses_KT = torch.tensor([[1.0, 2.0, 4.0, 1.0]], dtype=torch.float64)
    for constant in ("uniform", "nan"):
        assert score.loss_weights(losses_KT, constant)[0].tolist() == pytest.approx([1, 1 / 3, 0, 1])


def test_weights_of_each_history_are_its_own() -> None:
    losses_KT = torch.tensor([[1.0, 2.0], [200.0, 100.0], [3.0, 3.0]], dtype=torch.float64)
    assert score.loss_weights(losses_KT, "uniform").tolist() == [[1, 0], [0, 1], [1, 1]]
    as_code = score.loss_weights(losses_KT, "nan")
    assert as_code[:2].tolist() == [[1, 0], [0, 1]]
    assert as_code[2].isnan().all()


@pytest.mark.parametrize("losses", [[2.0], [7.0, 7.0, 7.0], [0.0, 0.0]])
def test_constant_losses(losses: list[float]) -> None:
    losses_KT = torch.tensor([losses])
    assert (score.loss_weights(losses_KT, "uniform") == 1).all()
    assert score.loss_weights(losses_KT, "nan").isnan().all()


def test_a_loss_of_zero_gets_all_the_weight() -> None:
    weights_KT = score.loss_weights(torch.tensor([[0.0, 1.0, 2.0]]), "uniform")
    assert weights_KT[0].tolist() == pytest.approx([1, 0, 0], abs=1e-30)


def test_magnitude() -> None:
    window_NT = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0]])
    global_KT = torch.tensor([[1.0, 0.5]])
    assert score.magnitude(window_NT, global_KT, [2, 1]).tolist() == [2, 5, 8]
    assert score.magnitude(window_NT, global_KT, [2, 1], signed=True).tolist() == [0, 5, -2]
    own_KT = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert score.magnitude(window_NT, own_KT, [2, 1]).tolist() == [1, 3, 6]
    assert score.magnitude(window_NT, own_KT, [0, 3]).tolist() == [2, 4, 6]


def test_shares() -> None:
    share_N = score.per_module_share(torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0]), [2, 1, 0, 2])
    assert share_N[:3].tolist() == [0.25, 0.75, 1]
    assert share_N[3:].isnan().all()
    assert score.per_module_share(torch.tensor([-1.0, 3.0]), [2]).tolist() == [-0.25, 0.75]
    assert score.global_share(torch.tensor([6.0, 2.0, 0.0])).tolist() == [0.75, 0.25, 0]
    assert score.global_share(torch.zeros(3)).tolist() == [0, 0, 0]


def test_percentiles_share_the_middle_of_a_tie() -> None:
    assert score.percentile(torch.tensor([5.0, 1e24, 5.0, 1.0])).tolist() == [0.5, 0.875, 0.5, 0.125]
    values_N = torch.randn(100)
    assert torch.equal(score.percentile(values_N.exp()), score.percentile(values_N))
    assert score.percentile(torch.tensor([NAN, 1.0])).isnan().tolist() == [True, False]
    assert score.percentile(torch.zeros(0)).shape == (0,)


def test_normalisations() -> None:
    magnitude_N = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    influence_N = torch.tensor([6.0, 0.0, 2.0], dtype=torch.float64)
    printed = score.normalise(magnitude_N, influence_N, "printed", [2, 1], "zero")
    assert [t.tolist() for t in printed] == [[1, 3, 0], [6, 0, 2]]
    released = score.normalise(magnitude_N, influence_N, "released", [2, 1], "zero")
    assert [t.tolist() for t in released] == [[0.25, 0.75, 0], [0.75, 0, 0.25]]
    as_code = score.normalise(magnitude_N, influence_N, "released", [2, 1], "nan")
    assert as_code[0][2].isnan()
    robust = score.normalise(magnitude_N, influence_N, "robust", [2, 1], "zero")
    assert [t.tolist() for t in robust] == [pytest.approx([3 / 6, 5 / 6, 1 / 6]), pytest.approx([5 / 6, 1 / 6, 3 / 6])]


def test_robust_scores_are_not_decided_by_one_huge_influence() -> None:
    magnitude_N = torch.arange(10, dtype=torch.float64)
    influence_N = torch.ones(10, dtype=torch.float64)
    influence_N[0] = 1e24

    def best(how: str) -> int:
        terms = score.normalise(magnitude_N, influence_N, how, [10], "zero")  # type: ignore[arg-type]
        return int(score.combine(*terms, "mix", 0.7).argmax())

    assert best("printed") == 0
    assert best("released") == 0
    assert best("robust") == 9


def test_combination() -> None:
    magnitude_N, influence_N = torch.tensor([1.0]), torch.tensor([11.0])
    assert score.combine(magnitude_N, influence_N, "mix", 0.7).item() == pytest.approx(4.0)
    assert score.combine(magnitude_N, influence_N, "sum", 0.7).item() == 12


def test_precision_follows_the_losses() -> None:
    for dtype in (torch.float32, torch.float64):
        weights_KT = score.loss_weights(torch.rand(1, 4, dtype=dtype), "uniform")
        magnitude_N = score.magnitude(torch.rand(3, 4), weights_KT, [3])
        terms = score.normalise(magnitude_N, torch.rand(3, dtype=torch.float64), "released", [3], "zero")
        assert score.combine(*terms, "mix", 0.5).dtype == dtype
