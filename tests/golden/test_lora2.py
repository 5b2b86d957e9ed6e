"""LoRA^2 reproduces the published implementation (see lora2/README.md for what the files hold)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from salient_ds.adapters.orthogonality import two_scale_residuals
from salient_ds.adapters.two_scale import TwoScaleLinear, two_scale_pair
from salient_ds.methods.lora2.method import LoRA2
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.ranks import RankLayout
from tests.unit.methods.replay import Factor, Replay, Values, two_scale_factors

FOLDER = Path(__file__).parent / "lora2"
RUNS = sorted(path.stem for path in FOLDER.glob("run_*.npz"))
TOLERANCE = 2e-6
"""Largest relative difference of a smoothed value or score: a few units in the last place of float32."""
INNER = 8

Golden = dict[str, NDArray[Any]]


def read(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def layout_of(golden: Golden) -> RankLayout:
    dims, rank = golden["dims"].tolist(), int(golden["r_init"])
    names = tuple(f"m.{k}" for k in range(len(dims)))
    return RankLayout(names, (rank,) * len(dims), tuple(d[0] for d in dims), tuple(d[1] for d in dims))


def step_of(golden: Golden, kind: str, step: int) -> Values:
    """Factors of one step, by (matrix, short name)."""
    found = {}
    for key in golden:
        if key.startswith(f"{kind}/"):
            _, module, factor = key.split("/")[1].split(".")
            value = torch.from_numpy(golden[key][step])
            found[int(module), factor.removeprefix("lora_")] = value.flatten() if factor == "lora_E" else value
    return found


def with_outer(values: Values, factors: list[Factor], fill: float) -> Values:
    """The outer factors, which are not in the files, made up: they must not matter."""
    outer = {(f.module, f.name): torch.full(f.shape, fill) for f in factors if f.rank_axis is None}
    return values | outer


def replay_of(golden: Golden, pieces: int) -> Replay:
    layout, total = layout_of(golden), int(golden["total_step"])
    config = LoRA2Config(
        preset="reference",
        inner_width=INNER,
        target_total=int(golden["target_total"]),
        initial_warmup=int(golden["init_warmup"]),
        final_warmup=int(golden["final_warmup"]),
        interval=int(golden["mask_interval"]),
    ).model_copy(update={"beta1": float(golden["beta1"]), "beta2": float(golden["beta2"])})  # run_e: out of bounds
    return Replay(lambda: LoRA2(config, layout, total), layout, two_scale_factors(layout, INNER), pieces)


def assert_close(found: Values, expected: Values, what: str) -> None:
    for at, value in found.items():
        np.testing.assert_allclose(value, expected[at], rtol=TOLERANCE, atol=1e-30, err_msg=f"{what} {at}")


def test_all_files_are_there() -> None:
    assert len(RUNS) == 3


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name: str, pieces: int) -> None:
    """Smoothed values, singular values and masks after every step, and every score and budget."""
    golden = read(name)
    replay = replay_of(golden, pieces)
    factors = list(replay.factors)
    masks = dict(zip(golden["mask_steps"].tolist(), golden["masks"].astype(bool), strict=True))
    for s in range(int(golden["total_step"])):
        before = with_outer(step_of(golden, "p_before", s), factors, 1e3)
        after = replay.train_step(before, with_outer(step_of(golden, "grad", s), factors, 1e3))
        for at, value in step_of(golden, "p_after", s).items():
            np.testing.assert_array_equal(after[at], value, err_msg=f"step {s} {at}")
        if s in masks:
            np.testing.assert_array_equal(replay.in_force.mask_N, masks[s], err_msg=f"step {s}")
        if statistics := replay.statistics():
            assert {factor for _, factor in statistics["sensitivity"]} == {"E", "aa", "B"}
            assert_close(statistics["sensitivity"], step_of(golden, "exp_avg_ipt", s), f"step {s} Ibar")
            assert_close(statistics["uncertainty"], step_of(golden, "exp_avg_unc", s), f"step {s} Ubar")
    count = len(replay.decisions)
    assert count >= 6 and (golden["masks"][count - 1 :] == golden["masks"][count - 1]).all()
    assert [d.step - 1 for d in replay.decisions] == golden["mask_steps"][:count].tolist()
    assert [d.budget for d in replay.decisions] == golden["curr_rank"][golden["mask_steps"][:count]].tolist()
    np.testing.assert_allclose(torch.stack(replay.scores), golden["scores"][:count], rtol=TOLERANCE)


def test_betas_out_of_bounds_are_refused() -> None:
    """The released code takes them, scores everything 0 and prunes everything (run_e, reproduced above)."""
    golden = read("run_e_beta_out_of_range")
    assert not golden["masks"].any()
    for wrong in ({"beta1": float(golden["beta1"])}, {"beta2": float(golden["beta2"])}):
        with pytest.raises(ValueError, match="beta"):
            LoRA2Config(target_rank=1, **wrong)


def adapter_of(golden: dict[str, torch.Tensor]) -> TwoScaleLinear:
    base = nn.Linear(9, 7)
    adapter = TwoScaleLinear(base, 3, INNER, float(golden["alpha"]) / float(golden["ranknum"] + golden["eps"]))
    with torch.no_grad():
        for parameter, key in ((base.weight, "weight"), (base.bias, "bias")):
            parameter.copy_(golden[key])
        for name in ("A", "B", "aa", "bb", "E"):
            getattr(adapter, f"lora_{name}").copy_(golden[f"lora_{name}"].view(getattr(adapter, f"lora_{name}").shape))
    return adapter


def test_forward() -> None:
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in read("forward_and_orth").items()}
    adapter = adapter_of(golden)
    with torch.no_grad():
        np.testing.assert_allclose(adapter(golden["x"]), golden["y"], rtol=1e-5, atol=1e-6)
    A_RI, B_OR = two_scale_pair(adapter.lora_A, adapter.lora_B, adapter.lora_aa, adapter.lora_bb)
    update_OI = (B_OR * adapter.lora_E * adapter.scaling) @ A_RI
    np.testing.assert_allclose(update_OI.detach(), golden["deltaW_out_by_in"], rtol=1e-4, atol=1e-7)


def test_penalty_terms() -> None:
    """Here r < k: the feasible sides of B and aa, and the dense cross product."""
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in read("forward_and_orth").items()}
    factors = tuple(golden[f"lora_{name}"] for name in ("A", "B", "aa", "bb"))
    A, B, aa, bb = factors
    expected = [golden[k] for k in ("fro_A_AAt", "fro_B_BBt_feasible", "fro_aa_aataa_feasible", "fro_bb_bbtbb")]
    norms = two_scale_residuals((A, B, aa, bb), None).norms()
    np.testing.assert_allclose(norms[:4], expected, rtol=1e-5)
    np.testing.assert_allclose(norms[4], (A.T @ B.T @ aa.T @ bb.T).norm(), rtol=1e-4)
    assert golden["fro_B_BtB"] > (INNER - 3) ** 0.5  # the released target has this floor: k - r directions stay 0
