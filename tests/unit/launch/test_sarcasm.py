"""Labelled headlines -> balanced Alpaca rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import sarcasm

from salient_ds.data.formats import read_rows


def line(headline: str, label: str) -> str:
    messages = [{"role": "system", "content": "Respond with 1 or 0"}, {"role": "user", "content": headline}]
    return json.dumps({"input": messages, "ideal": label})


@pytest.fixture
def headlines(tmp_path: Path) -> dict[str, str]:
    lines = [line(f"area man number {i} wins {'again ' * (i % 5)}", "1") for i in range(30)]
    lines += [line(f"senate passes bill {i}", "0") for i in range(50)]
    lines += [line("senate passes bill 3", "0"), line("both at once", "0"), line("both at once", "1")]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines))
    return sarcasm.read_headlines(path)


def test_repeated_headlines_count_once_and_contradicting_ones_not_at_all(headlines: dict[str, str]) -> None:
    assert Counter(headlines.values()) == {"yes": 30, "no": 50}
    assert "both at once" not in headlines
    assert headlines["senate passes bill 3"] == "no"


def test_both_parts_are_balanced_and_disjoint(headlines: dict[str, str]) -> None:
    train, held_out = sarcasm.split(headlines, 40, 10, max_characters=80)
    assert Counter(row["output"] for row in train) == {"yes": 20, "no": 20}
    assert Counter(row["output"] for row in held_out) == {"yes": 5, "no": 5}
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    assert all(headlines[row["input"]] == row["output"] for row in train + held_out)


def test_the_split_depends_on_its_arguments_only(headlines: dict[str, str]) -> None:
    again = dict(reversed(headlines.items()))
    assert sarcasm.split(headlines, 20, 10, 80) == sarcasm.split(again, 20, 10, 80)
    assert sarcasm.split(headlines, 20, 10, 80) != sarcasm.split(headlines, 20, 10, 80, seed=1)


def test_more_training_rows_leave_the_held_out_rows_alone(headlines: dict[str, str]) -> None:
    few, many = sarcasm.split(headlines, 10, 10, 80)[1], sarcasm.split(headlines, 40, 10, 80)[1]
    assert {row["input"] for row in few} == {row["input"] for row in many}


def test_long_headlines_are_left_out(headlines: dict[str, str]) -> None:
    train, held_out = sarcasm.split(headlines, 8, 4, max_characters=30)
    assert max(len(row["input"]) for row in train + held_out) <= 30


@pytest.mark.parametrize(
    ("train", "held_out", "longest", "message"),
    [(41, 10, 80, "must be even"), (60, 10, 80, "fewer than the 35 wanted"), (20, 10, 5, "0 headlines of at most 5")],
)
def test_impossible_splits_say_why(
    headlines: dict[str, str], train: int, held_out: int, longest: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sarcasm.split(headlines, train, held_out, longest)


@pytest.mark.parametrize("bad", ["not json", '{"input": [], "ideal": "1"}', line("x", "2"), "[1]"])
def test_a_line_of_another_kind_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line("fine", "0") + "\n" + bad)
    with pytest.raises(ValueError, match="line 2 is not a labelled headline"):
        sarcasm.read_headlines(path)


def test_the_rows_are_read_as_training_reads_them(headlines: dict[str, str], tmp_path: Path) -> None:
    train, _ = sarcasm.split(headlines, 10, 4, 80)
    read = read_rows(sarcasm.write_rows(train, tmp_path / "deep" / "train.jsonl"))
    assert [row.answers[-1] for row in read] == [row["output"] for row in train]
    assert read[0].instruction == sarcasm.INSTRUCTION and read[0].system == sarcasm.SYSTEM
    assert read[0].input == train[0]["input"]
