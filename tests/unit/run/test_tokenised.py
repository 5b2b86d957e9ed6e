"""Inputs of a run with and without the cache: equal rows, and another entry for everything that decides on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.config.data import DataConfig
from salient_ds.data.cache_key import entry_key, tokenizer_digest
from salient_ds.data.dataset import InstructionDataset, split_eval
from salient_ds.data.formats import DataError
from salient_ds.data.templates import get_template
from salient_ds.run.tokenised import read_part
from tests.support.tiny import write_alpaca


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def read(path: Path, tokenizer: Any, packing: bool = False, **settings: Any) -> tuple[InstructionDataset, list[str]]:
    data = DataConfig(train=str(path), **settings)
    return read_part("train", data.train, data, tokenizer, get_template(data.template), packing)


def entries(folder: Path) -> int:
    return sum(path.is_dir() for path in folder.glob("tokens-1/*"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_length", [60, 256])
def test_rows_and_counts_are_those_without_a_cache(
    tmp_path: Path, tiny_alpaca: Path, tokenizer: Any, packing: bool, max_length: int
) -> None:
    common: dict[str, Any] = {"packing": packing, "max_length": max_length}
    if max_length == 60:
        with pytest.raises(ValueError, match="leaves no answer token"):
            read(tiny_alpaca, tokenizer, cache_dir=str(tmp_path), **common)
        assert entries(tmp_path) == 0
        return
    plain, notes = read(tiny_alpaca, tokenizer, cache=False, **common)
    for _ in range(2):
        found, more = read(tiny_alpaca, tokenizer, cache_dir=str(tmp_path), **common)
        assert (
            found.fingerprint() == plain.fingerprint() and more[: len(notes)] == notes and len(more) == len(notes) + 1
        )
        assert found.num_targets.tolist() == plain.num_targets.tolist() and found.columns == plain.columns
        for size in (0.25, 3):
            ours, theirs = split_eval(found, size, 5), split_eval(plain, size, 5)
            for left, right in zip(ours, theirs, strict=True):
                assert left.fingerprint() == right.fingerprint() == InstructionDataset(iter(right)).fingerprint()
                assert left.num_targets.tolist() == right.num_targets.tolist()
    assert entries(tmp_path) == 1


def test_everything_that_decides_on_rows_makes_another_entry(tmp_path: Path, tokenizer: Any) -> None:
    path = write_alpaca(tmp_path / "a.json", 20)
    place = tmp_path / "cache"
    count = 0
    for settings in ({}, {"max_length": 300}, {"template": "vicuna_v1.1"}, {"bad_rows": "skip"}, {"packing": True}):
        read(path, tokenizer, cache_dir=str(place), **settings)
        count += 1
        assert entries(place) == count
    write_alpaca(path, 20, seed=1)
    found, _ = read(path, tokenizer, cache_dir=str(place))
    assert entries(place) == count + 1
    assert found.fingerprint() == read(path, tokenizer, cache=False)[0].fingerprint()


def test_a_copy_of_the_file_takes_the_same_entry_and_its_own_name(tmp_path: Path, tokenizer: Any) -> None:
    first, second = write_alpaca(tmp_path / "a.json", 20), write_alpaca(tmp_path / "b.json", 20)
    place = str(tmp_path / "cache")
    read(first, tokenizer, cache_dir=place)
    assert "read from the cache" in read(second, tokenizer, cache_dir=place)[1][-1]


def test_skipped_rows_are_counted_from_the_cache(tmp_path: Path, tokenizer: Any) -> None:
    path = write_alpaca(tmp_path / "a.json", 20)
    rows = json.loads(path.read_text())
    rows[3]["output"] = ""
    rows[4]["extra"] = 1
    path.write_text(json.dumps(rows))
    place = str(tmp_path / "cache")
    with pytest.raises(DataError, match="empty answer"):
        read(path, tokenizer, cache_dir=place)
    made = read(path, tokenizer, cache_dir=place, empty_answers="skip")[1]
    again = read(path, tokenizer, cache_dir=place, empty_answers="skip")[1]
    assert made[:-1] == again[:-1] and "1 rows are left out" in made[0] and "extra (1)" in made[1]


def test_a_changed_tokenizer_has_another_digest(tiny_llama: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_llama)
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)
    other = AutoTokenizer.from_pretrained(tiny_llama)
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_changed_code_has_another_key(
    tmp_path: Path, tiny_alpaca: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "tokenize.py"
    code.write_text("a = 1\n")
    monkeypatch.setattr("salient_ds.data.cache_key._CODE", (code,))
    template = get_template("alpaca")
    before = entry_key(tiny_alpaca, template, tokenizer, {})
    assert entry_key(tiny_alpaca, template, tokenizer, {}) == before
    code.write_text("a = 2\n")
    assert entry_key(tiny_alpaca, template, tokenizer, {}) != before


def test_a_data_set_loaded_by_name_is_kept_by_its_fingerprint(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.chdir(tmp_path)
    folder, place = tmp_path / "owner" / "name", tmp_path / "cache"
    folder.mkdir(parents=True)
    rows = json.loads(write_alpaca(tmp_path / "rows.json", 9).read_text())
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = Path("owner/name")
    plain, _ = read(name, tokenizer, cache=False)
    made, first = read(name, tokenizer, cache_dir=str(place))
    again, second = read(name, tokenizer, cache_dir=str(place))
    assert "tokenised, and kept" in first[-1] and "read from the cache" in second[-1]
    assert plain.fingerprint() == made.fingerprint() == again.fingerprint() and len(again) == 9
    part, _ = read(Path("owner/name[train[:4]]"), tokenizer, cache_dir=str(place))
    assert len(part) == 4 and entries(place) == 2
    (folder / "train.jsonl").write_text(json.dumps({"instruction": "Name a river.", "output": "The Elbe."}) + "\n")
    assert len(read(name, tokenizer, cache_dir=str(place))[0]) == 1 and entries(place) == 3
