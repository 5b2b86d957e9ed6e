"""Rows of tasks from files of every format, and one clear sentence for every kind of bad row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salient_ds.data.conversation import DataError
from salient_ds.data.sources import count_rows, loading_note
from salient_ds.data.tasks.reading import check_task_file, count_task_rows, read_examples
from salient_ds.data.tasks.table import task_of
from tests.unit.tasks.task_samples import ELBE, question

RTE = task_of("glue/rte")
ROWS = [
    {"idx": 0, "sentence1": "A dog barks, loudly.", "sentence2": 'Someone said "hi".', "label": 1},
    {"idx": 1, "sentence1": "The Elbe is long.", "sentence2": "Flüsse sind naß.", "label": 0},
]
SARCASM = task_of({"kind": "classification", "columns": ["text"], "labels": ["serious", "sarcastic"]})
STARS = task_of({"kind": "regression", "columns": ["text"], "label_column": "stars", "bounds": [1, 5]})
XSUM = task_of("summarisation/xsum")
SQUAD, SQUAD2 = task_of("squad/v1"), task_of("squad/v2")


def write_as(path: Path) -> Path:
    """ROWS in the format that the name says."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    names = list(ROWS[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        cells = ['"' + str(row[name]).replace('"', '""') + '"' for row in ROWS for name in names]
        path.write_text(",".join(names) + "\r\n" + ",".join(cells[:4]) + "\r\n" + ",".join(cells[4:]) + "\r\n")
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [names, *(r.values() for r in ROWS)]) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz"])
def test_all_formats_give_the_same_examples(name: str, tmp_path: Path) -> None:
    path = write_as(tmp_path / name)
    examples, found = read_examples(RTE, path)
    assert [(e.texts, e.target) for e in examples] == [
        (("A dog barks, loudly.", 'Someone said "hi".'), 1), (("The Elbe is long.", "Flüsse sind naß."), 0)
    ]  # fmt: skip
    assert [str(e.id) for e in examples] == ["0", "1"]
    assert (found.rows, dict(found.labels), found.unlabelled) == (2, {"entailment": 1, "not_entailment": 1}, 0)
    assert count_rows(path) == count_task_rows(path) == 2


def one(task: Any, row: dict[str, Any], write: Callable[..., Path], labelled: bool = True) -> str:
    with pytest.raises(DataError) as error:
        check_task_file(task, write(row), labelled)
    (problem,) = error.value.problems
    assert problem.line == 1
    return problem.message


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        (SARCASM, {"text": "a", "label": "sarcastc"},
         "label 'sarcastc' in column 'label' is none of 'serious', 'sarcastic'; did you mean 'sarcastic'?"),
        (SARCASM, {"text": "a", "label": 2}, "label 2 in column 'label' is none of 0 (serious), 1 (sarcastic)"),
        (SARCASM, {"text": "a", "label": 0.5}, "label 0.5 in column 'label' is none of 0 (serious), 1 (sarcastic)"),
        (SARCASM, {"text": "a", "label": 1e999}, "label inf in column 'label' is none of 0 (serious), 1 (sarcastic)"),
        (SARCASM, {"text": "a", "label": [1]}, "label [1] in column 'label' is none of"),
        (SARCASM, {"text": "a", "label": -1},
         "the row has no label in column 'label' (it is -1): label it, or leave it out of training and evaluation"),
        (SARCASM, {"text": "a", "label": None}, "the row has no label in column 'label' (it is None)"),
        (SARCASM, {"txt": "a", "label": 1},
         "there is no column 'text'; did you mean 'txt'? (columns: 'txt', 'label')"),
        (SARCASM, {"text": "a", "labels": 1}, "there is no column 'label'; did you mean 'labels'?"),
        (SARCASM, {"text": "  ", "label": 1}, "column 'text' is empty, expected text"),
        (SARCASM, {"text": 7, "label": 1}, "column 'text' is int (7), expected text"),
        (STARS, {"text": "a", "stars": "good"}, "column 'stars' is 'good', expected a number"),
        (STARS, {"text": "a", "stars": True}, "column 'stars' is True, expected a number"),
        (STARS, {"text": "a", "stars": "nan"}, "column 'stars' is nan, expected a finite number"),
        (STARS, {"text": "a", "stars": 6}, "column 'stars' is 6, expected 1 to 5 (data.task.bounds)"),
        (XSUM, {"id": "x", "document": "Long.", "summary": " "},
         "the target in column 'summary' is empty: write one, or leave the row out"),
        (XSUM, {"id": "x", "document": "Long."}, "there is no column 'summary'"),
        (XSUM, {"id": None, "document": "Long.", "summary": "s"},
         "column 'id' (data.task.id_column) is None, expected text or a whole number"),
        (SQUAD, question("q", "Who?"), "column 'answers' holds no answer: add one, or set data.task.unanswerable"),
        (SQUAD, {**question("q", "Who?"), "answers": {"text": ["Dresden"], "answer_start": [3]}},
         f"answer 'Dresden' is not at character 3 of its context, ' Elbe r' is; it stands at {ELBE.index('Dresden')}"),
        (SQUAD2, {**question("q", "Who?"), "answers": {"text": ["Rhine"], "answer_start": [9999]}},
         "answer 'Rhine' is not at character 9999 of its context, nothing is"),
        (SQUAD, {**question("q", "Who?"), "answers": {"text": ["Elbe"], "answer_start": []}},
         "column 'answers' holds 1 texts, but 0 starts: every answer needs both"),
        (SQUAD, {**question("q", "Who?"), "answers": "Elbe"}, "column 'answers' is 'Elbe', expected JSON"),
        (SQUAD, {**question("q", "Who?"), "answers": ["Elbe"]}, "column 'answers' is ['Elbe'], expected {"),
        (SQUAD, {**question("q", "Who?"), "answers": [{"text": "Elbe", "answer_start": "4"}]},
         "holds the answer 'Elbe' at '4', expected text and a character count from 0"),
        (SQUAD, {**question("q", " "), "answers": []}, "column 'question' is empty, expected text"),
    ],
)  # fmt: skip
def test_one_sentence_for_a_bad_row(task: Any, row: dict[str, Any], sentence: str, write: Callable[..., Path]) -> None:
    assert sentence in one(task, row, write)


def test_labels_are_names_numbers_or_numbers_as_text(write: Callable[..., Path]) -> None:
    labels = ["sarcastic", 1, "1", 1.0, "1.0", True, "serious", 0]
    path = write(*({"text": "a", "label": label} for label in labels))
    assert [e.target for e in read_examples(SARCASM, path)[0]] == [1, 1, 1, 1, 1, 1, 0, 0]
    digits = task_of({"kind": "classification", "columns": ["text"], "labels": ["1", "0"]})
    assert [e.target for e in read_examples(digits, write({"text": "a", "label": "1"}))[0]] == [0]  # a name comes first


def test_negative_numbers_are_labels_where_they_can_be(write: Callable[..., Path]) -> None:
    task = task_of({"kind": "regression", "columns": ["text"], "metrics": ["mse"]})
    assert read_examples(task, write({"text": "a", "label": -1}))[0][0].target == -1.0
    assert "the row has no label" in one(task_of("glue/stsb"), {
        "idx": 0, "sentence1": "a", "sentence2": "b", "label": -1.0
    }, write)  # fmt: skip


def test_rows_without_labels_can_be_predicted(write: Callable[..., Path]) -> None:
    rows = [{**row, "label": -1} for row in ROWS]
    examples, found = read_examples(RTE, write(*rows), labelled=False)
    assert [e.target for e in examples] == [None, None]
    assert "test: 2 of 2 rows have no label" in found.notes("test")
    without = [{"id": "q", "context": ELBE, "question": "Who?"}]
    assert read_examples(SQUAD, write(*without), labelled=False)[0][0].target is None
    assert read_examples(XSUM, write({"id": "x", "document": "Long."}), labelled=False)[0][0].target is None


def test_every_bad_row_is_counted_and_the_first_are_shown(write: Callable[..., Path]) -> None:
    rows = [{"text": "a", "label": "x"} for _ in range(30)] + [{"text": "", "label": 1}, {"text": "a", "label": 1}]
    with pytest.raises(DataError) as error:
        check_task_file(SARCASM, write(*rows))
    assert dict(error.value.counts) == {"unknown label": 30, "empty text": 1}
    assert len(error.value.problems) == 10 and "... and 21 more" in str(error.value)
    examples, found = read_examples(SARCASM, write(*rows), bad_rows="skip")
    assert len(examples) == 1 and found.skipped == {"unknown label": 30, "empty text": 1}
    assert found.notes("train") == [
        "train: 31 rows are left out (30 x unknown label, 1 x empty text)",
        "train: serious 0, sarcastic 1",
        "train: no row has the label serious",
    ]


def test_a_file_of_bad_rows_alone_is_refused_even_if_they_are_skipped(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"there are no rows: all 1 rows are left out \(empty text\)"):
        read_examples(SARCASM, write({"text": "", "label": 1}), bad_rows="skip")


def test_identifiers_come_once(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="line 2: identifier 'q' is that of line 1 too: predictions could not be"):
        check_task_file(SQUAD2, write(question("q", "Who?"), question("q", "When?")))


def test_a_row_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a", "label": 1},\n ["a", 1]]')
    with pytest.raises(DataError, match="line 2: the row is list, expected an object with columns"):
        check_task_file(SARCASM, path)


def test_only_so_many_rows_are_read(write: Callable[..., Path]) -> None:
    path = write(*({"text": "a", "label": 1} for _ in range(5)), {"text": "", "label": 9})
    assert read_examples(SARCASM, path, limit=5)[1].rows == 5


OFFICIAL = {
    "version": "v2.0",
    "data": [
        {"title": "Elbe", "paragraphs": [{"context": ELBE, "qas": [
            {"id": "a", "question": "Where?", "is_impossible": False,
             "answers": [{"text": "Dresden", "answer_start": ELBE.index("Dresden")}]},
            {"id": "b", "question": "Who?", "is_impossible": True, "answers": [],
             "plausible_answers": [{"text": "Elbe", "answer_start": 4}]},
        ]}]},
    ],
}  # fmt: skip


def test_official_files_of_squad_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(OFFICIAL))
    examples, _ = read_examples(SQUAD2, path)
    assert [(e.id, len(e.target)) for e in examples] == [("a", 1), ("b", 0)]
    assert count_task_rows(path) == 2
    path.write_text("\ufeff" + json.dumps(OFFICIAL, indent=2), encoding="utf-8")
    assert [e.id for e in read_examples(SQUAD2, path)[0]] == ["a", "b"]
    path.write_text(json.dumps({"rows": OFFICIAL["data"]}, indent=2))
    with pytest.raises(DataError, match='one JSON object over several lines.*save the list under its key "rows"'):
        read_examples(SQUAD2, path)
    path.write_text(json.dumps(OFFICIAL["data"]))
    assert [e.id for e in read_examples(SQUAD2, path)[0]] == ["a", "b"]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Elbe", "paragraphs": [{"qas": [{}]}]}]}))
    with pytest.raises(DataError, match="article 'Elbe' is not as in SQuAD's files: KeyError: 'id'"):
        read_examples(SQUAD2, path)


def test_a_start_that_is_off_by_two_is_corrected_and_counted(write: Callable[..., Path]) -> None:
    start = ELBE.index("Dresden")
    rows = [{**question(str(shift), "Where?"), "answers": [{"text": "Dresden", "answer_start": start + shift}]}
            for shift in (-2, -1, 0, 1, 2)]  # fmt: skip
    examples, found = read_examples(SQUAD, write(*rows))
    assert all(e.target == (("Dresden", start),) for e in examples)
    note = "dev: the start of an answer was off by one or two characters and was corrected (4 rows)"
    assert found.notes("dev") == [note]
    first = {**question("a", "What?"), "answers": [{"text": "The Elbe", "answer_start": 1}]}
    assert read_examples(SQUAD, write(first))[0][0].target == (("The Elbe", 0),)
    rows[0]["answers"][0]["answer_start"] = start - 3
    with pytest.raises(DataError, match=f"is not at character {start - 3} of its context"):
        read_examples(SQUAD, write(*rows))


def test_answers_in_a_table_are_json(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    start = ELBE.index("Dresden")
    answers = json.dumps({"text": ["Dresden"], "answer_start": [start]}).replace('"', '""')
    path.write_text(f'id,question,context,answers\nq,Where?,"{ELBE}","{answers}"\n')
    ((answer,),) = (e.target for e in read_examples(SQUAD, path)[0])
    assert answer == ("Dresden", start)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("r.csv", "", "the file is empty: its first line must hold the names of the columns"),
        ("r.csv", "text,label\n", "there are no rows"),
        ("r.csv", "text,text\na,1\n", "each once and none empty: 'text' is not so"),
        ("r.csv", "text,\na,1\n", "each once and none empty: '' is not so"),
        ("r.csv", "text,label\na,b,1\n", "line 2: 3 fields, but the file has 2 columns (text, label): quote"),
        ("r.csv", 'text,label\n"a,1\n', "not readable as a table: unexpected end of data"),
        ("r.tsv", "text\tlabel\na\n", "line 2: 1 fields, but the file has 2 columns"),
        ("r.csv", "text,label\né,1\n".encode("latin1"), "not UTF-8 after line"),
    ],
)
def test_one_sentence_for_a_broken_table(name: str, text: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        check_task_file(SARCASM, path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["r.csv.gz", "r.jsonl.gz", "r.json.gz"])
@pytest.mark.parametrize("kept", [12, 200])
def test_a_cut_compressed_file_is_named(name: str, kept: int, tmp_path: Path) -> None:
    text = {"r.csv.gz": "text,label\n" + "".join(f"{k},1\n" for k in range(999))}.get(
        name, "".join(json.dumps({"text": str(k * 7919), "label": 1}) + "\n" for k in range(999))
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode())[:kept])
    for read in (lambda: check_task_file(SARCASM, path), lambda: count_rows(path), lambda: count_task_rows(path)):
        with pytest.raises(DataError, match=r"the compressed file is cut or damaged \(.*\): copy or fetch it again"):
            read()


def test_a_table_keeps_what_its_format_keeps(tmp_path: Path) -> None:
    table = tmp_path / "r.tsv"
    table.write_text('\ufefftext\tlabel\n"half a quote\t1\n\nit\'s, "so"\t0\n', encoding="utf-8")
    assert [e.texts[0] for e in read_examples(SARCASM, table)[0]] == ['"half a quote', 'it\'s, "so"']
    table = tmp_path / "r.csv"
    table.write_text('text,label\n"two\nlines",1\n"a ""b"", c",0\n')
    assert [e.texts[0] for e in read_examples(SARCASM, table)[0]] == ["two\nlines", 'a "b", c']


def test_an_unreachable_data_set_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as error:
        read_examples(RTE, str(RTE.eval))
    assert "hf download nyu-mll/glue --repo-type dataset --local-dir glue" in str(error.value)
    assert '"./glue:rte[validation]"' in str(error.value)
    assert "`hf download nyu-mll/glue --repo-type dataset --local-dir glue`" in loading_note(str(RTE.eval))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    assert loading_note(str(RTE.eval)) == "is loaded by name when training starts: nothing about it was checked"


def test_the_folder_that_was_fetched_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: rte/{split}-*\n" for split in ("train", "validation"))
    (tmp_path / "glue" / "README.md").write_text(f"---\nconfigs:\n- config_name: rte\n  data_files:\n{files}---\n")
    assert [e.id for e in read_examples(RTE, "./glue:rte[validation]")[0]] == [0]
    assert len(read_examples(RTE, "glue:rte")[0]) == 2
