"""A record holds what later comparisons need, and nothing about the machine's folders."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from salient_eval.bench import record

from tests.unit.bench.bench_helpers import page, timed

TODAY = datetime.date(2026, 1, 2)


def test_ratios_compare_equals_only() -> None:
    arms = [timed("peft_lora", 0.4), timed("salientlora", 0.2), timed("salientlora", 0.3, loop="deepspeed", zero=2)]
    lora, plain, zero2 = record.with_ratios(arms, {"r=8": 0.1})
    assert lora["ratio_to_peft_lora"] == 1.0 and plain["ratio_to_peft_lora"] == 0.5
    assert zero2["ratio_to_peft_lora"] == pytest.approx(0.75), "whoever has one GPU takes PEFT's fastest loop"
    assert (lora["ratio_to_floor"], zero2["ratio_to_floor"]) == (0.4 / 0.1, 0.3 / 0.1)
    quick = {**timed("peft_lora", 0.1), "compiled": True}
    again = record.with_ratios([plain, zero2, lora, quick], {"r=8": 0.1})
    assert [arm["ratio_to_peft_lora"] for arm in again] == pytest.approx([2, 3, 4, 1]), "against the fastest, made anew"
    alone = record.with_ratios([plain, timed("peft_lora", 0.1, rank=16), timed("peft_lora", 0.1, gpus=2)],
                               {"r=8": 0.1, "r=16": 0.1})  # fmt: skip
    assert alone[0]["ratio_to_peft_lora"] is None, "another rank, or more GPUs, is no comparison"


def test_written_record_reads_back(tmp_path: Path) -> None:
    arms = record.with_ratios([timed("peft_lora", 0.4), timed("salientlora", 0.2)], {"r=8": 0.1})
    record.write(tmp_path, page(arms))
    result = json.loads((tmp_path / "result.json").read_text())
    wanted = {"arm", "zero", "rank", "gpus", "compacted", "seconds", "tokens_per_s", "peak_gib", "ratio_to_floor",
              "event_seconds", "parts"}  # fmt: skip
    assert all(wanted <= set(arm) for arm in result["arms"])
    assert {"command", "commit", "versions", "hardware", "arms"} <= set(result)
    readme = (tmp_path / "README.md").read_text()
    assert "| salientlora | plain | 8 | 1 | none | 0.2000 | - | 5,000 | 1.50 | - | 0.50 | 2.00 | - |" in readme
    gpu = {**arms[1], "spread": 0.021, "reserved_gib": 1.75}
    assert record.row(gpu)[5:10] == ["0.2000", "2.1 %", "5,000", "1.50", "1.75"]
    assert "python eval/bench/step.py --shape tiny" in readme and "800 TFLOP/s" in readme
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "result.json"]


def test_schedule_and_missing_arms_are_told(tmp_path: Path) -> None:
    event = {
        "step": 9,
        "window": 5,
        "budget": 56,
        "kept": 56,
        "seconds": 0.25,
        "gather": 0.1,
        "solve": 0.1,
        "apply": 0.05,
    }
    schedule = {"events": [event], "event_seconds": [0.25], "total_rank": 112, "target_total_rank": 56,
                "final_total_rank": 56, "exact": True, "seconds_after_events": 0.1,
                "peak_gib_schedule": 2.0}  # fmt: skip
    arm = record.with_ratios([{**timed("salientlora", 0.2), **schedule}], {"r=8": 0.1})[0]
    assert record.row(arm)[-1] == "1 x 0.250"
    assert record.row({**arm, "compiled": True, "fused_loss": True})[0] == "salientlora (compiled) (fused loss)"
    failed = [{"title": "peft_adalora r=8 zero2", "error": "OutOfMemoryError: CUDA out of memory"}]
    record.write(tmp_path, page([arm], failed=failed))
    readme = (tmp_path / "README.md").read_text()
    assert "9 (to 56, 0.250 s); 56 left, exactly the target" in readme
    assert "failed: peft_adalora r=8 zero2: OutOfMemoryError" in readme
    wrong = {**arm, "exact": False, "final_total_rank": 60}
    assert "60 left, NOT the target 56" in record.readme(page([wrong]))


def test_no_folder_of_this_machine_gets_into_a_record(tmp_path: Path) -> None:
    error = f"FileNotFoundError: {record.REPOSITORY}/ds_configs/zero7.json"
    record.write(tmp_path, page([], failed=[{"title": "x", "error": error}]))
    for file in tmp_path.iterdir():
        assert str(record.REPOSITORY) not in file.read_text()
    kept = record.recorded_command(
        "step.py", ["--shape", "tiny", "--out", "/somewhere", "--log=/a/b", "--commit", "abc", "--gpus", "1,2"]
    )
    assert kept == "python eval/bench/step.py --shape tiny --gpus 1,2"


def test_folder_names_say_date_model_method_hardware(tmp_path: Path) -> None:
    arms = ["peft_lora", "salientlora"]
    first = record.new_folder(tmp_path, "llama-7b", arms, "1xh100", TODAY)
    second = record.new_folder(tmp_path, "llama-7b", arms, "1xh100", TODAY)
    assert [first.name, second.name] == [
        "2026-01-02_llama-7b_salientlora_1xh100", "2026-01-02_llama-7b_salientlora_1xh100-2",
    ]  # fmt: skip
    assert record.new_folder(tmp_path, "tiny", ["peft_lora"], "x", TODAY).name == "2026-01-02_tiny_peft_lora_x"
    gpu = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}
    assert record.hardware_name(gpu, 2) == "2xh100"
    assert record.hardware_name({"device": "cuda", "gpu": "NVIDIA A100-SXM4-80GB"}, 1) == "1xa100"
    assert record.hardware_name({"device": "cpu", "cpu_cores": 2}, 1) == "2-cpu-cores"
