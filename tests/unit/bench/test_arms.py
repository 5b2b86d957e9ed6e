"""Every kind of arm takes real steps on the plain loop; masters behave; the event benchmark fits the definition."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from salient_eval.bench import event, worker
from salient_eval.bench.plain_engine import PlainEngine
from salient_eval.bench.plan import own_methods
from salient_eval.bench.timing import Stopwatch, measure

from salient_ds.salience.influence import influence
from tests.unit.bench.bench_helpers import spec


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    ("arm", "precision"), [("salientlora", "fp32"), ("salientlora", "bf16"), ("adalora", "fp32"), ("lora2", "fp32")]
)
def test_adaptive_arms_are_timed_and_their_schedule_ends_at_the_target(arm: str, precision: str) -> None:
    result = worker.run_arm(spec(arm, precision=precision))
    assert result["seconds"] > 0 and len(result["seconds_of_steps"]) == 2, "two steps are a block each"
    assert result["spread"] >= 0 and result["reserved_gib"] is None, "no allocator of a GPU here"
    assert result["tokens_per_s"] == pytest.approx(2 * 16 / result["seconds"])
    assert set(result["parts"]) == {"forward", "backward", "step"}
    assert len(result["event_seconds"]) == len(result["events"]) > 1
    assert result["final_total_rank"] == result["target_total_rank"] == 14 * 4 and result["exact"]
    assert all(e["seconds"] >= e["solve"] + e["apply"] for e in result["events"])
    if precision == "fp32" and arm != "lora2":  # else so small a change of the loss drowns in rounding
        assert result["last_loss"] < result["first_loss"], "the same tokens again and again are learned"


def test_every_method_is_an_arm_that_runs() -> None:
    """Methods with an arm of their own below or above, and those with neither, which would be missing here."""
    assert set(own_methods()) == {"salientlora", "adalora", "lora2", "lora", "increlora", "heterolora", "spectral"}


def test_increlora_scores_every_step_and_grows_to_the_target() -> None:
    result = worker.run_arm(spec("increlora"))
    assert result["total_rank"] == 14 * 6 and result["rows"] == 14 * 8, "a quarter of the rows is in reserve"
    assert result["final_total_rank"] == result["target_total_rank"] == 14 * 8 and result["exact"]
    assert len(result["events"]) == 2, "half of the matrices at each event"


def test_heterolora_has_its_events_before_steps() -> None:
    result = worker.run_arm(spec("heterolora", schedule_steps=8))
    quarter = 14 // 4 * 8
    assert result["total_rank"] == quarter, "the first event comes before the first step"
    assert result["final_total_rank"] == result["target_total_rank"] == quarter
    assert len(result["events"]) > 1
    for found in result["events"]:
        assert found["seconds"] == pytest.approx(found["gather"] + found["solve"] + found["apply"])
        assert found["gather"] > 0, "probes count as gathering"


def test_spectral_prunes_to_the_target() -> None:
    result = worker.run_arm(spec("spectral"))
    assert result["final_total_rank"] == result["target_total_rank"] == 14 * 4 and result["exact"]


@pytest.mark.parametrize(
    "arm",
    ["peft_lora", pytest.param("lora2", marks=pytest.mark.slow), pytest.param("heterolora", marks=pytest.mark.slow)],
)
def test_layers_of_any_arm_can_be_compiled(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if arm.startswith("peft"):
        pytest.importorskip("peft")
    compiled: list[str] = []
    real = torch.compile

    def compile_eagerly(function: Any, **options: Any) -> Any:
        compiled.append(type(function.__self__).__name__)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain = spec(arm, schedule_steps=0)
    results = [worker.run_arm(each) for each in (plain, replace(plain, compiled=True))]
    assert compiled == ["LlamaDecoderLayer"] * 2
    losses = [(result["first_loss"], result["last_loss"]) for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("arm", ["lora", "peft_lora", "peft_adalora"])
def test_other_arms_are_timed_without_events(arm: str) -> None:
    if arm.startswith("peft"):
        pytest.importorskip("peft")
    result = worker.run_arm(spec(arm))
    assert result["event_seconds"] == [] and result["seconds"] > 0
    assert result["last_loss"] < result["first_loss"]
    assert ("allocate" in result["parts"]) == (arm == "peft_adalora")


def test_pefts_adalora_really_masks_in_the_plain_loop() -> None:
    pytest.importorskip("peft")
    from salient_eval.bench.peft_arms import PeftArm

    arm = PeftArm.build(spec("peft_adalora", rank=8, steps=20), torch.device("cpu"))
    tokens_BS = torch.randint(3, 500, (2, 16))
    for _ in range(12):
        arm.step(tokens_BS)
    values = torch.cat([p.detach().view(-1) for n, p in arm.engine.module.named_parameters() if "lora_E" in n])
    assert 0 < int((values == 0).sum()) < len(values)


def test_masters_keep_what_low_precision_would_lose() -> None:
    torch.manual_seed(0)
    low, exact = torch.nn.Linear(8, 8, dtype=torch.bfloat16), torch.nn.Linear(8, 8)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    engines = [engine_of(module) for module in (low, exact)]
    inputs = torch.randn(4, 8).bfloat16()
    before = copy.deepcopy(low.weight.detach())
    for _ in range(3):
        for engine, x in zip(engines, (inputs, inputs.float()), strict=True):
            engine.backward(engine.module(x).float().square().sum())
            engine.step()
    masters: Any = engines[0].masters
    assert torch.equal(low.weight, masters.masters[0].bfloat16()) and low.weight.grad is None
    # three steps of 1e-5 are below bf16's resolution of most weights, not below the masters'
    moved = (masters.masters[0] - before.float()).abs()
    assert moved.max() < 4e-5 and float((moved > 2e-5).float().mean()) > 0.9
    assert torch.allclose(masters.masters[0], exact.weight, atol=2e-5)


def engine_of(module: torch.nn.Module) -> PlainEngine:
    groups = [{"params": list(module.parameters())}]
    return PlainEngine(module, groups, lambda g: torch.optim.AdamW(g, lr=1e-5), clip=1.0, autocast=False)


def test_influence_benchmark_runs_the_published_definition() -> None:
    window_NT = event.histories(150, 30, seed=3, device=torch.device("cpu"), factors=6)
    found_N = influence(window_NT, event.BETA, event.GAMMA, event.LEAF)
    assert int((found_N != event.LEAF).sum()) > 30, "histories without dependencies would time nothing"
    torch.testing.assert_close(event.published(window_NT), found_N, rtol=1e-5, atol=0)


def test_event_rows_hold_time_and_memory() -> None:
    row, _, _ = event.time_solve(100, 20, 1, torch.device("cpu"))
    assert row["values"] == 100 and row["seconds"] > 0 and row["peak_gib"] > 0 and row["bands"] > 1


def test_parts_are_those_of_the_last_measurement() -> None:
    """An arm is measured again after its compaction."""
    watch = Stopwatch(torch.device("cpu"))

    def step() -> None:
        with watch.part("step"):
            pass

    for part_steps in (5, 3):
        measure(step, watch, 1, 9, part_steps)
        assert len(watch.seconds["step"]) == part_steps
