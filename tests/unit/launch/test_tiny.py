"""The task and the model of the tiny demo."""

from __future__ import annotations

from pathlib import Path

import tiny
from transformers import AutoConfig, AutoTokenizer


def test_rows_are_balanced_different_and_right() -> None:
    rows = tiny.rows(200, seed=0)
    assert len({row["input"] for row in rows}) == 200
    assert sum(row["output"] == "yes" for row in rows) == 100
    for row in rows:
        words = row["input"].split()
        assert len(words) == tiny.WORDS_PER_LIST
        assert (row["output"] == "yes") == bool(set(words) & set(tiny.ANIMALS))
    assert rows == tiny.rows(200, seed=0)
    assert rows != tiny.rows(200, seed=1)


def test_any_even_cut_is_balanced() -> None:
    rows = tiny.rows(60, seed=0)
    assert sum(row["output"] == "yes" for row in rows[:20]) == 10


def test_the_tokenizer_fits_the_model_and_knows_line_ends(tiny_demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_demo_model)
    config = AutoConfig.from_pretrained(tiny_demo_model)
    assert len(tokenizer) <= config.vocab_size
    text = "Is there an animal in the list?\n\ncat stone"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_model_that_is_there_is_kept(tiny_demo_model: Path) -> None:
    before = (tiny_demo_model / "model.safetensors").stat().st_mtime_ns
    assert tiny.make_model(tiny_demo_model, "another prompt") == tiny_demo_model
    assert (tiny_demo_model / "model.safetensors").stat().st_mtime_ns == before
