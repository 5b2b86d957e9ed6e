"""The report on a run before it starts: facts, and one clear problem for every kind of bad input."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check.preflight import Report, preflight
from salient_ds.config.run import RunConfig, parse_config
from tests.support.layouts import layout_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> dict[str, Any]:
    """A sound run: 64 rows, 2 epochs of batches of 4, rank 8 -> 2 on 14 matrices."""
    return {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 8},
        "method": {"name": "salientlora", "target_rank": 2, "window_initial": 3, "window_final": 5},
        "data": {"train": str(tiny_alpaca)},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }


def make(settings: dict[str, Any], **changes: Any) -> RunConfig:
    """``section__key=value`` changes a key of a section, ``key=value`` a key at the top."""
    merged = json.loads(json.dumps(settings))
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            merged[section][key] = value
        else:
            merged[section] = value
    return parse_config(merged)


def only_problem(report: Report) -> str:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_facts_of_a_sound_run(settings: dict[str, Any]) -> None:
    run = make(settings)
    report = preflight(run, world_size=2)
    assert report.problems == []
    facts = report.facts
    assert (facts["rows"], facts["total_steps"], facts["total_steps_exact"]) == (64, 32, True)
    assert (facts["modules"], facts["initial_total"], facts["target_total"]) == (14, 112, 28)
    # per layer: q 32+32, k and v 16+32, o 32+32, three of 64+32, and one singular value for each of the seven
    assert facts["trainable_start"] == 2 * 8 * (64 + 48 + 48 + 64 + 3 * 96 + 7)
    assert facts["trainable_end"] == facts["trainable_start"] // 4
    events = run.method.events(layout_of((8,) * 14), 32)
    assert [e["step"] for e in facts["events"]] == [e.step for e in events]
    assert facts["events"][-1]["total_rank"] == 28
    assert facts["zero"]["stage"] == 2 and facts["ds_config"]["gradient_accumulation_steps"] == 1
    assert facts["this_run"] == facts["memory"]["zero2"]
    assert facts["checkpoint_bytes"] == 12 * facts["trainable_start"]
    assert facts["free_bytes"] > 0
    json.dumps(facts)


def test_no_directory_is_made(settings: dict[str, Any]) -> None:
    preflight(make(settings))
    assert not Path(settings["output_dir"]).exists()


def test_every_problem_is_listed(settings: dict[str, Any], tmp_path: Path) -> None:
    bad_json = tmp_path / "zero.json"
    bad_json.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}')
    run = make(
        settings,
        deepspeed=str(bad_json),
        data__template="vicuna",
        data__train="missing.json",
        adapter__target_modules=["q_proj", "fc1"],
        train__eval_every=5,
    )
    problems = "\n".join(preflight(run, world_size=2, run_source="my.yaml").problems)
    for text in (
        'unknown template "vicuna"',
        "missing.json: file not found",
        "train.eval_every=5, but there is no held-out data",
        "'fc1' matches no linear layer",
        "train_batch_size=8, my.yaml: train.global_batch_size=4",
        "ZenFlow",
    ):
        assert text in problems, text
    assert len(problems.splitlines()) == 6


def test_bad_rows_come_with_their_line(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n{oops\n')
    problem = only_problem(preflight(make(settings, data__train=str(data))))
    assert "line 2" in problem and 'no "output"' in problem and "line 3" in problem
    # training reads the rows again, so the quick form only counts them
    assert preflight(make(settings, data__train=str(data)), quick=True).facts["rows"] == 3


def test_data_by_name_is_noted_not_checked(settings: dict[str, Any]) -> None:
    report = preflight(make(settings, data__train="tatsu-lab/alpaca"))
    assert report.problems == [] and "loaded by name" in report.notes[0]
    assert "total_steps" not in report.facts and "events" not in report.facts
    assert "total_steps" in preflight(make(settings, data__train="tatsu-lab/alpaca", train__max_steps=50)).facts


def test_held_out_rows_do_not_count_as_steps(settings: dict[str, Any]) -> None:
    facts = preflight(make(settings, data__eval_size=0.25)).facts
    assert (facts["rows"], facts["held_out_rows"], facts["total_steps"]) == (48, 16, 24)
    problem = only_problem(preflight(make(settings, data__eval_size=64)))
    assert "data.eval_size=64 holds out 64 of 64 rows" in problem


def test_packing_makes_steps_an_upper_bound(settings: dict[str, Any]) -> None:
    report = preflight(make(settings, data__packing=True))
    assert report.facts["total_steps_exact"] is False
    assert any("32 steps is an upper bound" in note for note in report.notes)


def test_a_schedule_without_an_event(settings: dict[str, Any]) -> None:
    problem = only_problem(preflight(make(settings, train__max_steps=2)))
    assert "no allocation event" in problem and "total_steps=2" in problem
    problem = only_problem(preflight(make(settings, method__initial_warmup=20, method__final_warmup=20)))
    assert "initial_warmup=20 + final_warmup=20 exceeds total_steps=32" in problem


def test_target_above_what_there_is(settings: dict[str, Any]) -> None:
    del settings["method"]["target_rank"]
    problem = only_problem(preflight(make(settings, method__target_total=113)))
    assert "target total rank 113 is above the initial total 112" in problem


def test_the_reference_schedule_misses_its_target_and_says_so(settings: dict[str, Any]) -> None:
    report = preflight(make(settings, method__preset="reference", method__initial_warmup=8, method__window_final=10))
    assert report.problems == []
    assert any("above the target 28" in note and "final_prune" in note for note in report.notes)


def test_fixed_rank_methods_have_no_events(settings: dict[str, Any]) -> None:
    facts = preflight(make(settings, method={"name": "lora"})).facts
    assert facts["events"] == [] and facts["trainable_start"] == facts["trainable_end"]
    svd = preflight(make(settings, method={"name": "lora", "form": "svd"})).facts
    assert svd["trainable_start"] - facts["trainable_start"] == 112


@pytest.mark.parametrize("name", ["adalora", "lora2"])
def test_methods_with_a_cubic_budget(settings: dict[str, Any], name: str) -> None:
    report = preflight(make(settings, method={"name": name, "target_rank": 2, "interval": 4}))
    assert report.problems == []
    assert report.facts["events"][-1]["total_rank"] == report.facts["target_total"] == 28
    assert report.facts["trainable_end"] < report.facts["trainable_start"]


def test_warmup_longer_than_the_run(settings: dict[str, Any]) -> None:
    problem = only_problem(preflight(make(settings, train__lr_warmup=32)))
    assert "train.lr_warmup=32 is not below the 32 steps" in problem
    problem = only_problem(preflight(make(settings, train__lr_warmup=2.5)))
    assert "2.5 is neither a whole number" in problem


def test_rank_above_a_matrix_side_is_noted(settings: dict[str, Any]) -> None:
    report = preflight(make(settings, adapter__rank=24))
    assert report.problems == []
    assert any("adapter.rank=24 is above the smaller side of 4 of 14 matrices" in note for note in report.notes)


def test_tokenizer_files(settings: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    problem = only_problem(preflight(make(settings, data__template="tokenizer")))
    assert "has no chat template" in problem
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_llama / "config.json").read_text())
    report = preflight(make(settings, model={"path": str(bare), "random_weights": True}))
    assert "holds no tokenizer" in only_problem(report)
    with_other = {"path": str(bare), "random_weights": True, "tokenizer": str(tiny_llama)}
    assert preflight(make(settings, model=with_other)).problems == []
    assert "is no directory" in only_problem(preflight(make(settings, model__tokenizer="./nothing")))


def test_a_damaged_checkpoint_stops_the_run(settings: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: -10 if path.suffix == ".safetensors" else None])
    assert "is truncated" in only_problem(preflight(make(settings, model__path=str(copy))))


def test_unknown_architecture_leaves_a_note(settings: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "novel"}')
    (other / "tokenizer.model").write_bytes((tiny_llama / "tokenizer.model").read_bytes())
    report = preflight(make(settings, model={"path": str(other), "random_weights": True}))
    assert report.problems == [] and "targets, events, memory unchecked" in report.notes[0]


def test_run_directory(settings: dict[str, Any]) -> None:
    path = Path(settings["output_dir"])
    path.mkdir()
    assert preflight(make(settings)).notes == []
    (path / "photos").mkdir()
    problem = only_problem(preflight(make(settings)))
    assert "is not a run directory (it holds photos)" in problem
    (path / "run.yaml").write_text("")
    (path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (path / "checkpoints" / "step-00000020.partial").mkdir()
    report = preflight(make(settings))
    assert report.problems == []
    (note,) = report.notes
    assert "already holds a run" in note and "last checkpoint step-00000010" in note and "--resume auto" in note
    assert preflight(make(settings), quick=True).notes == []
    with (path / ".lock").open("w") as lock:
        lock.write("process 7 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by process 7 on here" in only_problem(preflight(make(settings)))
    assert preflight(make(settings)).problems == []
    settings["output_dir"] = str(path / "run.yaml")
    assert "is a file" in only_problem(preflight(make(settings)))


def test_a_full_disk(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    size = preflight(make(settings)).facts["checkpoint_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    report = preflight(make(settings))
    assert report.problems == []  # 30 minutes may be longer than the run
    assert any("longer than train.save_every=30min" in note and "for 3 checkpoints" in note for note in report.notes)
    problem = only_problem(preflight(make(settings, train__save_every=5)))
    assert "for 3 checkpoints" in problem and "free some, or lower train.keep_checkpoints" in problem
    assert preflight(make(settings, train__save_every=5), quick=True).problems == []
