"""HeteroLoRA's scores reproduce the released code (see hetero/README.md for what the files hold)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.heterolora import proxies
from tests.golden.hetero_model import by_short_name, group, read_json, tiny_opt
from tests.golden.hetero_scores import assert_scores, flat, scores, stub_batches

CASES = ("opt_lora_init", "opt_lora_warm", "opt_lora_ags_init", "opt_lora_ags_warm")


def case_model(case: str, weights: str | None = None) -> AdaptedModel:
    return tiny_opt(group("proxy_weights", weights or case), shortcuts="ags" in case)


@pytest.mark.parametrize("proxy", ["constant", "grad_norm", "snip", "synflow"])
@pytest.mark.parametrize("case", CASES)
def test_proxies(case: str, proxy: str) -> None:
    golden = read_json("proxies")[case]
    found = scores(case_model(case), proxy, stub_batches()[: golden["limit_test_batches"]])
    assert_scores(found, flat(golden[proxy]))
    assert any(found.values()) == (proxy in ("constant", "grad_norm") or case.endswith("warm"))
    if "ags" in case and proxy in ("grad_norm", "snip", "synflow"):
        suffix = "" if proxy == "grad_norm" else "_EXTENSION_not_in_reference"
        expected = flat(golden[f"{proxy}_shortcut{suffix}"])
        assert len(expected) == 11
        assert_scores(found, expected)


@pytest.mark.parametrize("case", ["init", "warm"])
@pytest.mark.parametrize("proxy", ["constant", "grad_norm", "snip", "synflow"])
def test_static_scores(proxy: str, case: str) -> None:
    """The reference's own files; it sets B back to zero before GRAD-NORM and SYNFLOW."""
    golden = read_json("proxies")["static_reference_outputs_opt_lora"]
    weights = golden.get(f"{proxy}_{case}_weights", f"opt_lora_{case}")
    found = scores(case_model("opt_lora", weights), proxy, stub_batches()[:3])
    expected = flat(golden[f"{proxy}_{case}"])
    assert len(expected) == 18
    assert_scores(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_alpha_test(case: str) -> None:
    """Accuracy over 12 samples; every second one is drawn as a validation sample but looked up in the training set."""
    golden = read_json("proxies")[case]
    arguments = golden["alpha_test_args"]
    generator = torch.Generator().manual_seed(arguments["generator_seed"])
    train, val = (torch.randperm(n, generator=generator) for n in (32, 16))
    rows = torch.stack([train[:16], val], 1).flatten()[:12].tolist()
    batches = stub_batches("train", rows)[: arguments["limit_test_batches"]]
    mixed = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    adapted = case_model(case)

    @torch.no_grad()
    def accuracy() -> float:
        logits = adapted.model(input_ids=mixed["input_ids"], attention_mask=mixed["attention_mask"]).logits
        return float((logits.argmax(-1) == mixed["labels"]).double().mean())

    limit = proxies.MetricLimit.of(accuracy(), arguments["metric_reduction_tolerance"], "accuracy")
    expected = flat(golden["alpha_test"]) | flat(golden.get("alpha_test_shortcut", {}))
    found = {}
    for name, adapter in by_short_name(adapted).items():

        def metric(importance: float, adapter: Any = adapter) -> float:
            adapter.importance = importance
            return accuracy()

        found[name] = proxies.alpha_test(metric, limit, arguments["levels"])
        metric(1.0)
    assert {name: found[name] for name in expected} == expected
    assert len(set(expected.values())) > 1
