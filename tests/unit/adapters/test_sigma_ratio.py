"""Learning rate of singular values: the first step changes a matrix as much as LoRA's does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.forms import GrowingForm, PlainForm, SVDForm, TwoScaleForm
from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.config.run import RunConfig
from salient_ds.engine.build import parameter_groups
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.salientlora.options import SalientLoRAConfig

SIDES, RANK = (96, 192), 8
PLAIN, SVD = LoRAConfig(form="plain"), LoRAConfig(form="svd")


def adapted_layer(method: LoRAConfig, init_std: float = 0.02) -> AdaptedModel:
    """One linear layer with an adapter of scaling 1."""
    torch.manual_seed(0)
    config = AdapterConfig(rank=RANK, alpha=RANK, target_modules="all-linear", init_std=init_std)
    return inject(nn.Sequential(nn.Linear(*SIDES, bias=False)), config, method, 0, torch.float32)


def first_change(adapted: AdaptedModel, ratio: float) -> float:
    """Frobenius norm of the update after one step of AdamW at a learning rate of 0.001."""
    groups = [{k: v for k, v in g.items() if k != "name"} for g in parameter_groups(adapted, 1e-3, 0.0, ratio)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    x = torch.randn(64, SIDES[0])
    (adapted.model(x) - torch.randn(64, SIDES[1])).square().mean().backward()
    optimizer.step()
    layer: Any = adapted.model[0]  # type: ignore[index]
    eye = torch.eye(SIDES[0])
    return float((layer(eye) - layer.base(eye)).detach().norm())


def test_the_first_step_is_as_long_as_loras() -> None:
    wide = (SIDES[0] * SIDES[1]) ** -0.25  # the vectors begin with norm 1 on average
    wanted = first_change(adapted_layer(PLAIN), 1.0)
    svd = adapted_layer(SVD, init_std=wide)
    ratio = SVD.sigma_ratio(svd.layout, wide)
    assert ratio == pytest.approx(math.sqrt(SIDES[1] / 3))
    assert first_change(svd, ratio) == pytest.approx(wanted, rel=0.15)
    assert first_change(adapted_layer(SVD, init_std=wide), 1.0) < 0.2 * wanted


def test_long_vectors_lower_it_and_short_ones_do_not_raise_it() -> None:
    usual = math.sqrt(4096 / 3)
    assert SVDForm().sigma_ratio(4096, 4096, 0.001) == pytest.approx(usual)
    assert SVDForm().sigma_ratio(4096, 4096, 0.02) == pytest.approx(usual / 1.6384)
    assert GrowingForm().sigma_ratio(4096, 4096, 0.02) == SVDForm().sigma_ratio(4096, 4096, 0.02)
    assert TwoScaleForm(inner_width=8).sigma_ratio(4096, 4096, 0.02) == pytest.approx(usual)
    assert PlainForm().sigma_ratio(4096, 4096, 0.02) == 1.0


def test_released_presets_keep_one_learning_rate() -> None:
    layout = adapted_layer(SVD).layout
    for options in (SalientLoRAConfig, AdaLoRAConfig):
        assert options(target_rank=2, preset="reference").sigma_ratio(layout, 0.02) == 1.0
        assert options(target_rank=2).sigma_ratio(layout, 0.02) > 1.0
    assert PLAIN.sigma_ratio(layout, 0.02) == 1.0


def test_only_singular_values_have_another_rate() -> None:
    adapted = adapted_layer(SVD)
    factors, sigmas = parameter_groups(adapted, 1e-3, 0.1, 4.0)
    assert "lr" not in factors and sigmas["lr"] == pytest.approx(4e-3)
    assert [p.shape for p in sigmas["params"]] == [(RANK,)]


def run(method: dict[str, Any], sigma_lr: Any) -> RunConfig:
    return RunConfig.model_validate({
        "output_dir": "out", "deepspeed": "ds.json", "model": {"path": "model"}, "adapter": {"rank": RANK},
        "method": method, "data": {"train": "rows.json"},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3, "sigma_lr": sigma_lr},
    })  # fmt: skip


def test_the_run_file_decides() -> None:
    layout = adapted_layer(SVD).layout
    salient = {"name": "salientlora", "target_rank": 2}
    assert run(salient, 3.0).sigma_ratio(layout) == 3.0
    assert run(salient, "auto").sigma_ratio(layout) == pytest.approx(math.sqrt(SIDES[1] / 3))
    assert run(salient | {"preset": "reference"}, 3.0).sigma_ratio(layout) == 3.0
    with pytest.raises(ValueError, match=r"train\.sigma_lr is for singular values, method lora has none"):
        run({"name": "lora"}, 3.0)
    with pytest.raises(ValueError, match="greater than 0"):
        run(salient, 0.0)
