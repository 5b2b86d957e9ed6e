"""The rows of a run with several data sets: counted per set, held out of each, cached one by one, checked before."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from rich.console import Console

from salient_ds.check.preflight import preflight
from salient_ds.check.printing import _print_summary
from salient_ds.check.token_sample import check_tokens
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.data.mixture import Mixture
from salient_ds.run.inputs import Inputs, load_inputs
from salient_ds.run.prepared import PreparedRun
from salient_ds.sweep.arms import fingerprint, with_absolute_paths
from tests.support.tiny import write_alpaca

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    """Sets of 20, 10 and 8 rows with weights 1, 2 and 0.5."""
    a, b, c = (write_alpaca(tmp_path / f"{name}.json", rows, rows) for name, rows in (("a", 20), ("b", 10), ("c", 8)))
    sets = [str(a), {"path": str(b), "weight": 2}, {"path": str(c), "weight": 0.5}]
    return {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 4},
        "method": {"name": "lora"},
        "data": {"train": sets, "cache_dir": str(tmp_path / "cache")},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }


def with_data(run: dict[str, Any], **data: Any) -> RunConfig:
    return parse_config(run | {"data": run["data"] | data})


def test_an_epoch_takes_the_rows_that_the_weights_say(run: dict[str, Any], tokenizer: Any) -> None:
    config = parse_config(run)
    inputs = load_inputs(config, tokenizer)
    assert isinstance(inputs.train, Mixture) and [len(part) for part in inputs.train.parts] == [20, 10, 8]
    assert inputs.rows_per_epoch == 20 + 20 + 4 and inputs.total_steps(config) == 22
    assert inputs.sampler(config.train).num_examples == 44
    (noted,) = [note for note in inputs.notes if "weight 2" in note]
    assert "b.json: 10 rows to train on" in noted and "20 per epoch" in noted
    assert "train: an epoch takes 44 rows of 3 data sets" in inputs.notes


@pytest.mark.parametrize(("size", "held_out"), [(0.25, [5, 2, 2]), (6, [3, 2, 1])])
def test_rows_are_held_out_of_every_set(run: dict[str, Any], tokenizer: Any, size: float, held_out: list[int]) -> None:
    inputs = load_inputs(with_data(run, eval_size=size), tokenizer)
    assert isinstance(inputs.train, Mixture) and isinstance(inputs.held_out, Mixture)
    assert [len(part) for part in inputs.held_out.parts] == held_out
    assert [len(part) for part in inputs.train.parts] == [n - k for n, k in zip((20, 10, 8), held_out, strict=True)]
    whole = load_inputs(parse_config(run), tokenizer).train

    def texts(rows: Any) -> list[bytes]:
        return sorted(row["input_ids"].tobytes() for row in rows)

    assert texts([*inputs.train, *inputs.held_out]) == texts(whole)
    report = preflight(with_data(run, eval_size=size))
    assert report.problems == [] and [one["held_out"] for one in report.facts["sets"]] == held_out
    assert report.facts["rows"] == inputs.rows_per_epoch and report.facts["held_out_rows"] == sum(held_out)


def test_a_weight_leaves_the_cache_as_it_is_and_changes_the_fingerprint(run: dict[str, Any], tokenizer: Any) -> None:
    first = load_inputs(parse_config(run), tokenizer)
    run["data"]["train"][1]["weight"] = 3
    second = load_inputs(parse_config(run), tokenizer)
    assert len(list((Path(run["data"]["cache_dir"]) / "tokens-1").glob("*/manifest.json"))) == 3
    assert first.train.fingerprint() != second.train.fingerprint() and second.rows_per_epoch == 54


def test_a_list_of_one_set_is_that_set(run: dict[str, Any], tokenizer: Any) -> None:
    path = run["data"]["train"][0]
    found = [load_inputs(with_data(run, train=train, eval_size=4), tokenizer) for train in (path, [path])]
    assert found[0].train.fingerprint() == found[1].train.fingerprint() and not found[1].shares
    assert "train: 16 rows to train on" in found[0].notes[-1] and "4 held out besides" in found[0].notes[-1]


def test_sets_of_several_formats_are_packed_one_by_one(run: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "red stone"}, {"role": "assistant", "content": "stone red"}]
    chat.write_text("\n".join([json.dumps({"messages": turns})] * 5))
    sets = [run["data"]["train"][1], {"path": str(chat), "format": "messages"}]
    inputs = load_inputs(with_data(run, train=sets, packing=True, max_length=256), tokenizer)
    assert isinstance(inputs.train, Mixture) and all("segment_ids" in row for row in inputs.train)
    assert sum("sequences to train on" in note for note in inputs.notes) == 2
    with pytest.raises(ValueError, match=r"chat.jsonl.*instruction"):
        load_inputs(with_data(run, train=[sets[0], {"path": str(chat), "format": "alpaca"}]), tokenizer)


def test_check_names_every_set_and_every_problem(run: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(run)
    report = preflight(config)
    assert report.problems == [] and (report.facts["rows"], report.facts["total_steps"]) == (44, 22)
    check_tokens(config, report, 30)
    assert report.facts["tokens"]["examples"] == 10 + 10 + 8
    out = Console(width=200, file=io.StringIO())
    _print_summary(out, "run.yaml", config, report.facts)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "3 sets (44 rows per epoch)" in text and "b.json: 10 rows x 2 = 20 per epoch" in text
    assert preflight(config, quick=True).facts["sets"] == report.facts["sets"]
    (tmp_path / "c.json").unlink()
    (tmp_path / "b.json").write_text('[{"instruction": "a"}]')
    problems = preflight(config).problems
    assert len(problems) == 2 and "b.json" in problems[0] and "c.json: file not found" in problems[1]


def test_a_report_names_sets_and_weights(run: dict[str, Any], tokenizer: Any) -> None:
    prepared = PreparedRun.__new__(PreparedRun)
    prepared.config = parse_config(run)
    prepared.inputs = load_inputs(prepared.config, tokenizer)
    facts = prepared._data_facts()
    assert facts["train 2"].endswith("b.json") and facts["weight 2"] == 2 and facts["items of an epoch"] == 44
    prepared.config = with_data(run, train=run["data"]["train"][0])
    prepared.inputs = Inputs(prepared.inputs.train, None, prepared.inputs.collator, None, [])
    assert prepared._data_facts()["train"].endswith("a.json") and "weight 1" not in prepared._data_facts()


def test_a_sweep_makes_paths_absolute_and_compares_contents(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"data": {"train": ["a.json", {"path": "b.json", "weight": 2}, "hub/name"]}}
    found = with_absolute_paths(named, tmp_path)
    paths = [str(tmp_path.resolve() / name) for name in ("a.json", "b.json")]
    assert found["data"]["train"] == [paths[0], {"path": paths[1], "weight": 2}, "hub/name"]
    before = fingerprint(found)
    assert before["data"]["train"][1]["path"].startswith("sha256:") and found["data"]["train"][1]["path"] == paths[1]
    write_alpaca(tmp_path / "b.json", 10, 99)
    assert fingerprint(found) != before


def test_a_task_takes_one_set(run: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"data.train lists 3 data sets, and data.task=\S+ takes one"):
        parse_config(run | {"model": run["model"] | {"task": "sequence-classification"},
                            "data": {"task": "glue/rte", "train": run["data"]["train"]}})  # fmt: skip


def test_plain_text_beside_other_sets(run: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "red stone river " * (60 * k)}) for k in range(1, 5)))
    sets = [str(text), {"path": run["data"]["train"][0], "weight": 2}]
    config = with_data(run, train=sets, max_length=128, eval_size=0.25)
    inputs = load_inputs(config, tokenizer)
    assert isinstance(inputs.train, Mixture) and len(inputs.train.parts[0]) > 4 and len(inputs.train.parts[1]) == 15
    assert any(note.startswith(f"train {text}: ") and "4 texts became" in note for note in inputs.notes)
    for quick in (False, True):  # the number of blocks is not known, so neither is that of steps
        report = preflight(config, quick=quick)
        assert report.problems == [] and not {"rows", "total_steps"} & report.facts.keys()
    report = preflight(config)
    assert any("4 plain texts become blocks of data.max_length=128" in note for note in report.notes)
    check_tokens(config, report, None)
    assert report.facts["tokens"]["lengths"]["100"] <= 128 and report.facts["tokens"]["truncated"] == 0


def test_a_pattern_is_a_set_per_file(run: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, rows in (("b", 5), ("a", 7)):
        table = pyarrow.Table.from_pylist(json.loads(write_alpaca(tmp_path / "rows.json", rows, rows).read_text()))
        parquet.write_table(table, shards / f"{name}.parquet")
    config = with_data(run, train=[{"path": str(shards / "*.parquet"), "weight": 2}, run["data"]["train"][0]])
    assert [Path(one.path).name for one in config.data.sets] == ["a.parquet", "b.parquet", "a.json"]
    inputs = load_inputs(config, tokenizer)
    assert isinstance(inputs.train, Mixture) and [len(part) for part in inputs.train.parts] == [7, 5, 20]
    assert inputs.rows_per_epoch == 14 + 10 + 20
    one = load_inputs(with_data(run, train=str(shards / "a*")), tokenizer)
    assert len(one.train) == 7


def test_a_pattern_without_files_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    report = preflight(with_data(run, train=str(tmp_path / "*.parquet")), 1)
    (problem,) = report.problems
    assert "*.parquet" in problem and "no file matches this pattern" in problem
