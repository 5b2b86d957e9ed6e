"""Answers made on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generate_helpers import answers_of, export, generate, make_answering_llama, rows_of

pytestmark = pytest.mark.gpu


def test_fp32_as_on_the_cpu_and_bf16_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    base = make_answering_llama(tmp_path / "llama", window=1024)
    adapter = export(base, tmp_path / "adapter")
    for data in ("first", "second"):
        generate(tmp_path / data, adapter, "--model-id", "m", "--batch-size", "4")
    first = rows_of(tmp_path / "first", "m")
    assert first[0]["generation"]["dtype"] == "bfloat16" and first == rows_of(tmp_path / "second", "m")
    file = tmp_path / "second" / "salient_own" / "model_answer" / "m.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))
    generate(tmp_path / "second", adapter, "--model-id", "m", "--batch-size", "4")
    assert first == rows_of(tmp_path / "second", "m"), "going on gives the same bits"
    generate(tmp_path, adapter, "--model-id", "gpu", "--dtype", "float32", "--batch-size", "4")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        generate(tmp_path, adapter, "--model-id", "cpu", "--dtype", "float32", "--batch-size", "4")
    assert answers_of(tmp_path, "gpu") == answers_of(tmp_path, "cpu")


def test_too_little_memory_is_said_plainly_and_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from salient_eval.mt_bench.local_model import LocalAnswerer

    base = make_answering_llama(tmp_path / "llama", window=1024)
    answer, calls = LocalAnswerer.answer, []

    def hungry(self: LocalAnswerer, prompts: list) -> list:
        calls.append(len(prompts))
        if len(calls) == 3:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return answer(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalAnswerer, "answer", hungry)
        output = generate(tmp_path, base, "--template", "alpaca", "--batch-size", "4", fails=True)
    assert "lower --batch-size" in output
    part = tmp_path / "salient_own" / "model_answer" / ".llama.0.part"
    assert part.read_bytes().count(b"\n") == 4
    generate(tmp_path, base, "--template", "alpaca", "--batch-size", "4")
    assert len(rows_of(tmp_path, "llama")) == 16
