"""sweep.json, results.csv and the page."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.page import to_html
from salient_ds.sweep.printing import print_result
from salient_ds.sweep.report import write_report
from salient_ds.sweep.spec import SweepSpec
from tests.unit.sweep.sweep_helpers import ended, make_spec

RUNS: dict[str, Any] = {"lora": {"method": {"name": "lora"}}, "other": {"method": {"name": "adalora"}}}


@pytest.fixture
def swept(tmp_path: Path) -> tuple[SweepSpec, SweepFolder]:
    """A sweep in which one rate diverged and one fresh run failed."""
    spec = make_spec(lr=[1e-3, 2e-3], seeds={"tune": [0], "fresh": [1, 2, 3]})
    folder = SweepFolder(tmp_path / "out")
    folder.begin({"lora": {}, "other": {}}, [], [])
    outcomes = [ended(arm, 1e-3, 0, 2.0) for arm in ("lora", "other")]
    outcomes += [ended("lora", 2e-3, 0, 1.0), ended("other", 2e-3, 0, status="diverged")]
    outcomes += [ended("lora", 2e-3, seed, 1.0 + seed / 10, phase="fresh") for seed in (1, 2, 3)]
    outcomes += [ended("other", 1e-3, seed, 2.0 + seed / 9, phase="fresh") for seed in (1, 2)]
    outcomes += [ended("other", 1e-3, 3, phase="fresh", status="failed")]
    for outcome in outcomes:
        assert folder.put(outcome) and not folder.put(outcome)
    return spec, folder


def test_files(swept: tuple[SweepSpec, SweepFolder]) -> None:
    spec, folder = swept
    log = folder.path / "runs" / "other" / "lr-0.001" / "seed-3.log"
    log.parent.mkdir(parents=True)
    log.write_text("first\n\nlast <b>words</b>\n")
    result = write_report(spec, folder, RUNS)
    assert result == json.loads((folder.path / "sweep.json").read_text())
    lora, other = result["arms"]
    assert (lora["lr"], lora["edge"], other["lr"], other["edge"]) == (2e-3, "high edge", 1e-3, "low edge")
    assert lora["fresh"]["median"] == pytest.approx(1.2) and other["fresh"]["n"] == 2
    assert other["tuning"][1] == {"lr": 2e-3, "added": False, "value": None, "status": ["diverged"]}
    (difference,) = result["comparisons"]
    assert difference["seeds"] == [1, 2] and difference["n"] == 2
    (failure,) = result["failed"]
    assert failure["run"] == "runs/other/lr-0.001/seed-3" and failure["log_tail"][-1] == "last <b>words</b>"
    assert result["complete"] and result["runs"] == {"ended": 10, "expected": 10}
    rows = list(csv.DictReader((folder.path / "results.csv").open()))
    assert len(rows) == 10 and rows[0]["eval_loss"] == "2.0" and rows[0]["trainable"] == "100"
    page = (folder.path / "report.html").read_text()
    assert "last &lt;b&gt;words&lt;/b&gt;" in page and "<b>words" not in page
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(("gap", "tune", "close"), [(0.05, [0], True), (0.2, [0], False), (0.09, [0, 10], False)])
def test_a_rate_that_the_tuning_seeds_do_not_tell_apart_is_named(
    gap: float, tune: list[int], close: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fresh seeds deviate by 0.1: with one tuning seed that is the bound, with two it is 0.07."""
    spec = make_spec(arms={"lora": {}, "other": {}}, lr=[1e-3, 2e-3], seeds={"tune": tune, "fresh": [1, 2, 3]})
    folder = SweepFolder(tmp_path / "out")
    folder.begin({"lora": {}, "other": {}}, [], [])
    for seed in tune:
        folder.put(ended("lora", 1e-3, seed, 1.0 + gap))
        folder.put(ended("lora", 2e-3, seed, 1.0))
    for seed in (1, 2, 3):
        folder.put(ended("lora", 2e-3, seed, 1.0 + seed / 10, phase="fresh"))
    result = write_report(spec, folder, RUNS)
    assert result["arms"][0]["close"] == ([1e-3] if close else []) and result["arms"][1]["close"] == []
    print_result(result, folder, [])
    assert ("lora: the tuning seeds do not tell 0.001 apart from 0.002" in capsys.readouterr().out) == close
    assert ("; close: 0.001" in (folder.path / "report.html").read_text()) == close


def test_a_value_that_is_not_finite_is_no_json_number(swept: tuple[SweepSpec, SweepFolder]) -> None:
    spec, folder = swept
    (folder.outcome_folder / "lora~lr-0.002~seed-0.json").unlink()
    folder.put(ended("lora", 2e-3, 0, math.nan))
    assert write_report(spec, folder, RUNS)["arms"][0]["lr"] == 1e-3


def test_names_and_values_are_escaped(swept: tuple[SweepSpec, SweepFolder]) -> None:
    spec, folder = swept
    result = write_report(spec, folder, RUNS)
    evil = "<script>alert('x')</script>$x^2$"
    result["arms"][1]["name"] = result["comparisons"][0]["arm"] = evil
    result["arms"][0]["overrides"] = {"model.path": evil}
    result["failed"][0] |= {"reason": evil, "run": evil, "log_tail": [evil]}
    result["spec"]["run"] = result["metric"]["name"] = result["baseline"] = evil
    page = to_html(result)
    assert "<script" not in page and page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 8


def test_an_empty_sweep_has_a_page(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    folder.begin({"lora": {}, "other": {}}, [], [])
    result = write_report(make_spec(), folder, RUNS)
    assert not result["complete"] and "has not ended" in (folder.path / "report.html").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "is not the folder of a sweep (it holds thesis.tex)" in SweepFolder(tmp_path).problems()[0]
    assert "is a file" in SweepFolder(tmp_path / "thesis.tex").problems()[0]
    assert SweepFolder(tmp_path / "new").problems() == []


def test_beginning_again_keeps_finished_runs(swept: tuple[SweepSpec, SweepFolder]) -> None:
    _, folder = swept
    assert folder.changed_arms({"lora": {"adapter": {"rank": 2}}, "other": {}}) == {
        "lora": ["adapter.rank: 'not set' before, 2 now"]
    }
    folder.begin({"other": {}}, [], ["failed"])
    assert len(folder.outcomes()) == 9 and set(folder.saved()["arms"]) == {"lora", "other"}
    run = folder.path / "runs" / "lora"
    run.mkdir(parents=True)
    folder.begin({"lora": {"adapter": {"rank": 2}}}, ["lora"], [])
    assert {outcome.arm for outcome in folder.outcomes().values()} == {"other"} and not run.exists()
