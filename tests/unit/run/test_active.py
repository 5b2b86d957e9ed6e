"""summary.json says what was really compiled, packed and fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from salient_eval.bench.own_arms import OwnArm

from salient_ds.adapters.ranked_linear import SVDLinear
from salient_ds.run.active import speed_facts
from tests.unit.bench.bench_helpers import spec

TOKENS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def facts_of(arm: str, **changes: Any) -> dict[str, Any]:
    own = OwnArm.build(replace(spec(arm, schedule_steps=0), **changes), torch.device("cpu"))
    own.step(TOKENS)
    return dict(speed_facts(own.allocating)["speed"])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    torch._dynamo.reset()


@pytest.mark.parametrize("arm", ["salientlora", "lora2", "heterolora", "increlora"])
def test_every_adapter_of_a_packed_method_is_fused(arm: str) -> None:
    facts = facts_of(arm)
    assert facts["packed_factors"] and facts["fused_adapters"] == facts["adapters"] == 14
    assert facts["compiled_layers"] == facts["compiled_graphs"] == facts["penalty_graphs"] == 0
    assert not facts["fused_optimizer"] and not facts["fused_statistics"] and not facts["fused_loss"]
    assert facts["attention"] == "salient_ds_causal"


def test_what_falls_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of("increlora", speed=("unpacked",))
    assert not facts["packed_factors"] and facts["fused_adapters"] == 0
    monkeypatch.setattr(SVDLinear, "takes_gain", False)
    facts = facts_of("salientlora")
    assert facts["packed_factors"] and facts["fused_adapters"] == 0, "a bank of single factors"


@pytest.mark.parametrize("works", [True, False])
def test_a_compiler_that_fails_is_seen(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        if not works:
            raise RuntimeError("no compiler here")
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(suppress_errors=True):
        facts = facts_of("lora", compiled=True)
    assert facts["compiled_layers"] == 2
    assert (facts["compiled_graphs"] > 0, facts["compiler_failures"] > 0) == (works, not works)
