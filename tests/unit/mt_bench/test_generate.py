"""Answers of a real tiny LLaMA with a real exported adapter: the same whatever was killed, batched or shared out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from generate_helpers import (
    answers_of,
    export,
    forked,
    generate,
    make_answering_llama,
    random_factors,
    record_of,
    rows_of,
)
from salient_eval.mt_bench import local_model, local_run
from salient_eval.mt_bench.answer_file import AnswerJournal
from salient_eval.mt_bench.sources import find_source
from salient_eval.mt_bench.store import Layout, load_answers

from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.heterolora.export import write_shortcuts


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    """These tests are about bits, and fork: not on a GPU, were there one (that is test_generate_gpu.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_answering_llama(tmp_path_factory.mktemp("answering") / "llama", window=1024)


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return export(llama, llama.parent / "adapter")


@pytest.fixture(scope="module")
def reference(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder with the answers of one undisturbed run, batches of 4, named "m"."""
    data = tmp_path_factory.mktemp("reference")
    generate(data, adapter, "--model-id", "m", "--batch-size", "4")
    return data


def test_every_turn_has_a_status_and_the_judge_reads_the_file(reference: Path, adapter: Path) -> None:
    rows = rows_of(reference, "m")
    assert [row["question_id"] for row in rows] == list(range(9001, 9017))
    found = {status for row in rows for status in row["statuses"]}
    assert found == {"ok", "empty", "truncated", "failed"}
    for row in rows:
        for text, status, reason, (_, used) in zip(
            row["choices"][0]["turns"], row["statuses"], row["reasons"], row["tokens"], strict=True
        ):
            assert (reason == "") == (status == "ok")
            assert bool(text) == (status in ("ok", "truncated")) and text == text.strip()
            assert status != "truncated" or (used == 24 and reason == "cut at 24 tokens")
        if row["statuses"][0] == "empty":
            assert row["statuses"][1] == "failed" and row["reasons"][1] == "turn 1 is empty"
    record = json.loads((adapter / "salient_ds.json").read_text())["template"]
    assert rows[0]["template"] == record["name"] == "alpaca"
    assert rows[0]["generation"]["template_sha256"] == record["sha256"]
    read = load_answers(Layout(reference, "salient_own").answers("m"))
    assert {q: list(a.statuses) for q, a in read.items()} == {row["question_id"]: row["statuses"] for row in rows}


def test_a_killed_run_goes_on_to_the_same_file(
    reference: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_in_the_seventh_line(journal: AnswerJournal, row: object) -> None:
        if len(journal.done) == 6:
            journal._part.write(json.dumps(row).encode()[:40])
            journal._part.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(journal, row)

    def run() -> None:
        AnswerJournal.add = die_in_the_seventh_line  # type: ignore[method-assign]
        generate(tmp_path, adapter, "--model-id", "m", "--batch-size", "4")

    add = AnswerJournal.add
    assert forked([run]) == [-signal.SIGKILL]
    folder = tmp_path / "salient_own" / "model_answer"
    assert [file.name for file in folder.iterdir()] == [".m.0.part"], "nobody may judge half of the answers"
    part = (folder / ".m.0.part").read_bytes()
    assert part.count(b"\n") == 6 and not part.endswith(b"\n")
    batches = []
    whole = local_run.answer_batch
    monkeypatch.setattr(local_run, "answer_batch", lambda batch, *rest: batches.append(batch) or whole(batch, *rest))
    generate(tmp_path, adapter, "--model-id", "m", "--batch-size", "4")
    assert [len(batch) for batch in batches] == [4, 4, 4], "the first was answered, the second in part: it is run whole"
    assert rows_of(tmp_path, "m") == rows_of(reference, "m")
    assert [file.name for file in folder.iterdir()] == ["m.jsonl"]
    monkeypatch.setattr(local_model, "load_answering", lambda *a: pytest.fail("nothing was left to answer"))
    generate(tmp_path, adapter, "--model-id", "m", "--batch-size", "4")


def test_batch_size_does_not_change_an_answer(reference: Path, adapter: Path, tmp_path: Path) -> None:
    for size in (1, 7):
        generate(tmp_path, adapter, "--model-id", "m", "--batch-size", str(size), "--overwrite")
        assert rows_of(tmp_path, "m") == rows_of(reference, "m")


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_answer_as_one_does(reference: Path, adapter: Path, tmp_path: Path) -> None:
    def run() -> None:
        generate(tmp_path, adapter, "--model-id", "m", "--batch-size", "4")

    assert forked([run, run]) == [0, 0]
    assert rows_of(tmp_path, "m") == rows_of(reference, "m")
    assert [file.name for file in (tmp_path / "salient_own" / "model_answer").iterdir()] == ["m.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_one_model_split_over_two_processes_answers_as_one_does(
    reference: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's AutoTP, the adapter merged into the weights first."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run() -> None:
        generate(tmp_path, adapter, "--model-id", "m", "--batch-size", "4", "--tensor-parallel", "2")

    assert forked([run, run]) == [0, 0]
    assert answers_of(tmp_path, "m") == answers_of(reference, "m")
    output = generate(tmp_path, adapter, "--model-id", "other", "--tensor-parallel", "2", fails=True)
    assert "must be the launcher's number of processes, 1, or 1" in output


def test_seeds_belong_to_question_and_turn(reference: Path, adapter: Path, tmp_path: Path) -> None:
    generate(tmp_path, adapter, "--model-id", "m", "--seed", "1", "--batch-size", "4")
    before, after = rows_of(reference, "m"), rows_of(tmp_path, "m")
    same = {row["question_id"] for row, other in zip(before, after, strict=True) if row["choices"] == other["choices"]}
    greedy, sampled = set(range(9005, 9013)), {9001, 9002, 9003, 9004}  # reasoning to extraction; writing, roleplay
    assert greedy <= same and not sampled & same
    generate(tmp_path, adapter, "--model-id", "greedy", "--temperature", "0")
    texts = {row["question_id"]: row["choices"] for row in rows_of(tmp_path, "greedy")}
    assert all(texts[row["question_id"]] == row["choices"] for row in before if row["question_id"] in greedy)


def test_peft_our_fold_the_run_and_the_merged_model_agree(
    llama: Path, reference: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers_of(reference, "m")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        generate(tmp_path, adapter, "--model-id", "own-fold", "--batch-size", "4")
        (tmp_path / "foreign").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "foreign" / file).write_bytes((adapter / file).read_bytes())
        assert "pip install peft" in generate(tmp_path, tmp_path / "foreign", "--template", "alpaca", fails=True)
    merged = export(llama, tmp_path / "run-7" / "export-merged", "merged")
    generate(tmp_path, merged, "--batch-size", "4")
    monkeypatch.setattr(local_model, "read_factors", lambda checkpoint: random_factors(llama))
    generate(tmp_path, make_run(tmp_path / "run-8", llama), "--batch-size", "4")
    generate(tmp_path, llama, "--template", "alpaca", "--model-id", "base", "--batch-size", "4")
    for name in ("own-fold", "run-7", "run-8"):
        assert answers_of(tmp_path, name) == expected, name
    base = answers_of(tmp_path, "base")
    assert sum(a[1] != b[1] for a, b in zip(base, expected, strict=True)) >= 10, "the adapter must show"


def test_an_adapter_with_shortcuts_answers_and_its_run_says_where_it_is(
    llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(2)
    A, B = torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw)
    shortcut = AdapterFactors("model.layers.1.residual_1", A, None, B, torch.ones(4, dtype=torch.bool), 0.1)
    meta = ExportMeta("heterolora", "CAUSAL_LM", "run", record_of(llama))
    for name, factors in (("with", [*random_factors(llama), shortcut]), ("without", random_factors(llama))):
        generate(
            tmp_path,
            write_shortcuts(tmp_path / name, factors, meta, llama, norm_after_shortcut="none"),
            "--batch-size",
            "4",
        )
    assert answers_of(tmp_path, "without") == answers_of(reference, "m")
    changed = zip(answers_of(tmp_path, "with"), answers_of(reference, "m"), strict=True)
    assert sum(a[1] != b[1] for a, b in changed) >= 10, "the shortcut must show"
    assert rows_of(tmp_path, "with")[0]["template"] == "alpaca"
    monkeypatch.setattr(local_model, "read_factors", lambda checkpoint: [*random_factors(llama), shortcut])
    output = generate(tmp_path, make_run(tmp_path / "run-9", llama), fails=True)
    assert "run with shortcuts" in output and "output_dir/adapter" in output


def make_run(folder: Path, base: Path) -> Path:
    """What find_source reads of a run directory."""
    checkpoint = folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": {"path": str(base)}}))
    (folder / "run.json").write_text(json.dumps({"template": record_of(base)}))
    return folder


def test_a_hub_name_is_asked_for_its_record_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    files = {"salient_ds.json": json.dumps({"template": record_of(llama)})}

    def download(name: str, file: str) -> str:
        assert name == "org/tuned"
        if file not in files:
            raise FileNotFoundError(file)
        (tmp_path / file).write_text(files[file])
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    record = find_source("org/tuned").record
    assert record is not None and record.name == "alpaca"
    files["adapter_config.json"] = "{}\n"
    assert find_source("org/tuned").kind == "model", "an empty file says nothing"
    files["adapter_config.json"] = '{"peft_type": "LORA"}'
    with pytest.raises(ValueError, match="hf download org/tuned"):
        find_source("org/tuned")
    files.clear()
    assert find_source("org/tuned").record is None


def test_another_template_than_in_training_is_an_error(llama: Path, adapter: Path, tmp_path: Path) -> None:
    output = generate(tmp_path, adapter, "--template", "vicuna_v1.1", fails=True)
    assert 'trained with template "alpaca", asked for "vicuna_v1.1"' in output
    assert "give --template" in generate(tmp_path, llama, fails=True)
    assert "did you mean" in generate(tmp_path, llama, "--template", "alpacca", fails=True)
    other = tmp_path / "other"
    export(llama, other)
    record = json.loads((other / "salient_ds.json").read_text())
    record["template"] |= {"sha256": "0" * 64, "sample": record["template"]["sample"].replace("###", "##")}
    (other / "salient_ds.json").write_text(json.dumps(record))
    assert "does not render as in training" in generate(tmp_path, other, fails=True)
    assert not (tmp_path / "salient_own").exists(), "no answer was made by a guess"


def test_a_run_goes_on_with_its_own_settings_only(reference: Path, adapter: Path, tmp_path: Path) -> None:
    answers = Layout(tmp_path, "salient_own").answers("m")
    answers.parent.mkdir(parents=True)
    lines = Layout(reference, "salient_own").answers("m").read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:5]))
    output = generate(tmp_path, adapter, "--model-id", "m", "--seed", "3", fails=True)
    assert "seed 0, now 3" in output and "--overwrite" in output
    answers.write_text('{"question_id": 9001}\n')
    assert "another --model-id" in generate(tmp_path, adapter, "--model-id", "m", fails=True)
    assert "looks like a number" in generate(tmp_path, adapter, "--model-id", "500", fails=True)
    generate(tmp_path, adapter, "--model-id", "m", "--overwrite", "--batch-size", "4")
    assert rows_of(tmp_path, "m") == rows_of(reference, "m")


def test_prompts_that_fill_the_window_fail_and_are_said_to(tmp_path: Path) -> None:
    base = make_answering_llama(tmp_path / "short", window=180)
    output = generate(tmp_path, base, "--template", "alpaca")
    rows = {row["question_id"]: row for row in rows_of(tmp_path, "short")}
    assert "the model's window 180" in output
    for row in rows.values():
        prompt, used = row["tokens"][0]
        assert (row["statuses"][0] == "failed") == (prompt >= 180)
        assert used <= max(0, 180 - prompt)
        if row["reasons"][0].startswith("cut at the end of the model's window"):
            assert row["statuses"][0] == "truncated" and prompt + used == 180
    assert rows[9010]["reasons"] == ["the prompt has 358 tokens, the model's window 180", "turn 1 is failed"]


def test_what_the_model_directory_says_about_generation_changes_nothing(
    llama: Path, adapter: Path, reference: Path, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    generate(tmp_path, llama, "--template", "alpaca", "--model-id", "m")
    GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=10,
        min_new_tokens=20, bad_words_ids=[[7]], eos_token_id=2,
    ).save_pretrained(llama)  # fmt: skip
    try:
        generate(tmp_path, llama, "--template", "alpaca", "--model-id", "other")
        generate(tmp_path, adapter, "--model-id", "adapter", "--batch-size", "4")
    finally:
        GenerationConfig(eos_token_id=2).save_pretrained(llama)
    assert answers_of(tmp_path, "m") == answers_of(tmp_path, "other")
    assert answers_of(tmp_path, "adapter") == answers_of(reference, "m")


def test_a_stop_text_ends_an_answer(reference: Path, adapter: Path, tmp_path: Path) -> None:
    generate(tmp_path, adapter, "--model-id", "m", "--stop", "er", "--batch-size", "4")
    checked = 0
    for row, plain in zip(rows_of(tmp_path, "m"), rows_of(reference, "m"), strict=True):
        text, full = row["choices"][0]["turns"][0], plain["choices"][0]["turns"][0]
        assert text == full.partition("er")[0].strip()
        if "er" in full and text:
            assert row["statuses"][0] == "ok" and row["tokens"][0][1] <= plain["tokens"][0][1]
            checked += 1
    assert checked > 3
