"""IncreLoRA x ZeRO stage on two processes: all score, grow and resume like plain torch with dense gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.export.api import export_adapter
from salient_ds.export.meta import ExportMeta
from salient_ds.run.export import read_factors
from tests.dist import increlora_worker
from tests.dist.plain_run import train_plain
from tests.dist.scenario import TOTAL_STEPS, Case
from tests.dist.test_parity import TINY_PARTITIONS, assemble, assert_factors
from tests.support.spawn import spawn
from tests.support.verify import verify_peft

# events after steps 5, 9 and 13: the checkpoint after step 7 lies between the first two
METHOD = {"name": "increlora", "target_rank": 2, "interval": 4, "top_h": 2, "block_bytes": 1000}
TRAIN = {"lr_schedule": "linear", "lr_warmup": 3, "weight_decay": 0.1}
ALL = {"activation_checkpointing": "all"}
CASES = {
    "stage0": Case(0, method=METHOD, train=TRAIN),
    "stage2": Case(2, method=METHOD, train=TRAIN),
    "stage3": Case(3, zero=TINY_PARTITIONS | {"sub_group_size": 40}, method=METHOD, train=TRAIN | ALL),
}
LOW = {"bf16": Case(2, "bf16", method=METHOD, train=TRAIN), "fp16": Case(3, "fp16", method=METHOD, train=TRAIN)}
EXACT = METHOD | {"score_reduction": "exact"}
MODULES, ROWS, TARGET = 6, 5, 2 * 6  # q_proj, v_proj and down_proj of two layers

each_cell = pytest.mark.parametrize("key", CASES)


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By cell: what both processes report."""
    folder = tmp_path_factory.mktemp("increlora")
    cases = CASES | LOW
    reports = spawn(2, increlora_worker.run, tiny_llama, list(cases.values()), folder, timeout=500)
    return {key: [report[i] for report in reports] for i, key in enumerate(cases)}


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Any]:
    return train_plain(CASES["stage0"], tiny_llama)


@each_cell
def test_a_fresh_model_is_next_to_the_base(results: dict[str, Any], tiny_llama: Path, key: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=increlora_worker.TOKENS).logits
    for report in results[key]:
        torch.testing.assert_close(report["fresh"], expected, rtol=0, atol=1e-4)


@each_cell
def test_scores_are_those_of_dense_gradients(results: dict[str, Any], plain: dict[str, Any], key: str) -> None:
    """Until growth ends, at every step; the later ones also depend on everything that training did before."""
    for report in results[key]:
        assert len(report["scores"]) == len(plain["scores"]) == 13
        for step, (mine, theirs) in enumerate(zip(report["scores"], plain["scores"], strict=True), 1):
            torch.testing.assert_close(mine, theirs, rtol=1e-4 if step < 3 else 2e-2, atol=1e-9)


@each_cell
def test_decisions_and_factors_are_those_of_plain_torch(
    results: dict[str, Any], plain: dict[str, Any], key: str
) -> None:
    for report in results[key]:
        assert report["whole"]["digests"] == [d.digest() for d in plain["decisions"]]
        assert report["whole"]["losses"] == pytest.approx(plain["losses"], rel=2e-4)
    masters = assemble([[report["whole"]] for report in results[key]], 0, "master")
    assert_factors(masters, plain["adapted"], 2e-3)


@each_cell
def test_resumed_equals_uninterrupted(results: dict[str, Any], key: str) -> None:
    for report in results[key]:
        whole, again = report["whole"], report["again"]
        for name in ("losses", "digests", "lr"):
            assert whole[name] == again[name], name
        for mine, theirs in zip(whole["state"]["fragments"], again["state"]["fragments"], strict=True):
            for name in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[name], theirs[name]), (name, mine["part"])
        for mine, theirs in zip(whole["state"]["copies"], again["state"]["copies"], strict=True):
            assert torch.equal(mine[4], theirs[4])


@pytest.mark.parametrize("key", [*CASES, *LOW])
def test_final_budget(results: dict[str, Any], key: str) -> None:
    """Exactly the target, and singular values only there; the scale is that of the rank reached."""
    for report in results[key]:
        decisions = report["decisions"]
        assert [(d.step, d.total, d.budget, d.hold) for d in decisions] == [
            (5, 8, 8, False), (9, 10, 10, False), (13, TARGET, TARGET, True),
        ]  # fmt: skip
        masks = decisions[-1].mask_N.split([ROWS] * MODULES)
        assert report["scaling"] == [8 / int(mask.sum()) for mask in masks]
        for entry in report["whole"]["state"]["fragments"]:
            part = entry["part"]
            if part.factor == "E":
                mask = masks[part.module][part.lo : part.lo + part.numel]
                assert torch.equal(entry["master"] != 0, mask)
        assert TOTAL_STEPS > 13


@each_cell
def test_rows_that_never_joined_are_as_they_were_drawn(
    results: dict[str, Any], plain: dict[str, Any], tiny_llama: Path, key: str
) -> None:
    """Weight decay leaves them alone."""
    config = CASES[key].config(tiny_llama)
    masters = assemble([[report["whole"]] for report in results[key]], 0, "master")
    fresh = increlora_worker.fresh_factors(config)
    mask_MR = results[key][0]["decisions"][-1].mask_N.view(MODULES, ROWS)
    never = 0
    for module, drawn in enumerate(fresh):
        rank = int(mask_MR[module].sum())
        found = masters[module, "A"].view(drawn.shape)
        assert torch.equal(found[rank + 1 :], drawn[rank + 1 :])  # one more has been in reserve
        assert not torch.isclose(found[:rank], drawn[:rank]).all(1).any()
        never += ROWS - rank - 1
    assert never > 10


@each_cell
def test_export_round_trip(results: dict[str, Any], tiny_llama: Path, tmp_path: Path, key: str) -> None:
    report = results[key][0]
    factors = read_factors(report["end"])
    assert sum(f.rank for f in factors) == TARGET
    middle = read_factors(report["middle"])  # one event has taken place
    assert sum(f.rank for f in middle) == 8 and {f.scaling for f in middle} == {8.0, 4.0}
    meta = ExportMeta(method="increlora", task_type="CAUSAL_LM", source_run="test")
    export_adapter(factors, meta, tmp_path / "out", "peft", tiny_llama)
    inputs = {"input_ids": increlora_worker.TOKENS}
    assert (report["logits"] - report["fresh"]).abs().max() > 0.05
    assert verify_peft(tmp_path / "out", tiny_llama, inputs, report["logits"]) < 1e-5


@pytest.mark.parametrize("key", LOW)
def test_low_precision_scores_have_the_scale_of_fp32(results: dict[str, Any], key: str) -> None:
    """fp16's loss scale is out of them."""
    for step in range(2):
        expected = results["stage0"][0]["scores"][step]
        torch.testing.assert_close(results[key][0]["scores"][step], expected, rtol=0.15, atol=0)
        assert (expected > 0).all()


def test_exact_scores_are_those_of_the_whole_batch(tiny_llama: Path) -> None:
    """Asked for, and by default where a step has one micro-batch on a process."""
    small = {"global_batch_size": 2}
    cases = [Case(2, method=METHOD, train=small), Case(3, zero=TINY_PARTITIONS, method=EXACT, train=small | ALL)]
    reports = spawn(2, increlora_worker.exact_scores, tiny_llama, cases)
    expected = increlora_worker.batch_scores(cases[0], tiny_llama, 2)
    for report in reports:
        for (first, second), (others, _) in zip(report, reports[0], strict=True):
            torch.testing.assert_close(first, expected, rtol=1e-5, atol=0)
            assert torch.equal(first, others) and not torch.equal(first, second)


def test_exact_scores_refuse_accumulation(tiny_llama: Path) -> None:
    (message,) = spawn(1, increlora_worker.refused, tiny_llama, Case(0, method=EXACT))
    assert "method.score_reduction=exact" in message and "4 micro-batches" in message
