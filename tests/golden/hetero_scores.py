"""Batches, gradients and scores of the tiny models of HeteroLoRA's golden numbers (see hetero/README.md)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.heterolora import proxies
from tests.golden.hetero_model import FOLDER, by_short_name, switch

RELATIVE = 1e-9
Batch = dict[str, Tensor]


def stub_batches(split: str = "train", rows: list[int] | None = None) -> list[Batch]:
    """Batches of 4 in the given order."""
    with np.load(FOLDER / "stub_data.npz") as file:
        x, mask, y = (torch.from_numpy(file[f"{split}_{part}"]) for part in ("x", "mask", "y"))
    picked = torch.arange(len(y)) if rows is None else torch.tensor(rows)
    return [{"input_ids": x[part], "attention_mask": mask[part], "labels": y[part]} for part in picked.split(4)]


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{layer.removeprefix('layer_')}.{name}": value
            for layer, inner in scores.items() if isinstance(inner, dict) for name, value in inner.items()}  # fmt: skip


def gradients(adapted: AdaptedModel, loss_of: list[Callable[[], Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Summed gradients of all factors by short name."""
    adapters = by_short_name(adapted)
    leaves = [a.parameter for adapter in adapters.values() for a in adapter.factors().values()]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for loss in loss_of:
        for held, found in zip(total, torch.autograd.grad(loss(), leaves), strict=True):
            held += found
    sums = iter(total)
    return {name: {factor: next(sums) for factor in adapter.factors()} for name, adapter in adapters.items()}


def absolute_loss(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Loss of the network of absolute values on inputs of ones, with gradients for the absolute factors."""
    model = adapted.model
    state = {n: t.detach().abs() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    live = {n: p.data.abs().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    inputs = {"inputs_embeds": torch.ones(*batch["input_ids"].shape, 12, dtype=torch.float64)}
    inputs |= {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    loss: Tensor = torch.func.functional_call(model, state | live, kwargs=inputs).loss
    loss.backward()
    # the same numbers as gradients of a surrogate of the real factors, so that one reader serves all proxies
    pairs = [(p, live[n].grad) for n, p in model.named_parameters() if p.requires_grad and n in live]
    return torch.stack([(p * g).sum() for p, g in pairs if g is not None]).sum()


def scores(adapted: AdaptedModel, proxy: str, batches: list[Batch]) -> dict[str, float]:
    adapters = by_short_name(adapted)
    switch(adapted, dict.fromkeys(adapters, True))
    if proxy == "constant":
        return dict.fromkeys(adapters, proxies.constant())
    if proxy == "synflow":
        found = gradients(adapted, [lambda: absolute_loss(adapted, batches[0])])
    else:
        found = gradients(adapted, [lambda b=b: adapted.model(**b).loss for b in batches])
    result = {}
    for name, adapter in adapters.items():
        A, B = (a.parameter.detach() for a in adapter.factors().values())
        G = found[name]
        result[name] = proxies.proxy_score(proxy, A, B, G["A"], G["B"], scaling=adapter.scaling)
    return result


def assert_scores(found: dict[str, float], expected: dict[str, float], floor: float = 1e-15) -> None:
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=RELATIVE, abs_tol=floor), (name, found[name], value)
