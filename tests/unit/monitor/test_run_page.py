"""The report of a run: everything is in it, nothing from outside gets through, damaged files are a sentence each."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.monitor import curves, run_page
from salient_ds.monitor.directory import RunDirectory, RunDirectoryError
from salient_ds.monitor.events import AllocationRecord, append_record
from salient_ds.monitor.metrics import append_metrics
from salient_ds.monitor.run_facts import flat, gather
from salient_ds.monitor.run_page import to_html, write_report
from salient_ds.own_files import write_object
from salient_ds.strict import ConfigError

MODULES = [f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
EVIL = "<script>alert(1)</script>\"'&"


def run_directory(path: Path, events: int = 2, evil: str = "a/model") -> Path:
    """A run as training leaves it, with ``evil`` wherever a text from outside can be."""
    path.mkdir()
    run = RunDirectory(path)
    settings = {"output_dir": evil, "model": {"path": evil}, "method": {"name": evil}, "train": {"lr": 1e-3}}
    facts = {
        "processes": 2, "total_steps": 40, "modules": MODULES, "identity": {"data_settings": {"data.train": evil}},
        "template": {"name": evil, "sample": evil}, "changes": [{"key": evil, "before": 1, "now": 2}], "head": {},
        "initial_ranks": [8] * 4, "environment": {"torch": evil},
    }  # fmt: skip
    run.write_resolved(settings, {"zero_optimization": {"stage": 2}, evil: evil}, facts)
    for step in range(10, 50, 10):
        values = {"step": step, "loss": 3 - step / 20, "grad_norm": 0.1, "lr": 1e-3, "memory": 2**30, "total_rank": 32}
        append_metrics(run.metrics, {**values, "tokens_per_second": 100.0 * step, "penalty": None, "mfu": 0.25})
        append_metrics(run.metrics, {"step": step, "eval_loss": 2.0, f"eval_{evil}": 0.5})
    for number in range(events):
        append_record(run.allocations, AllocationRecord(
            step=10 + 10 * number, budget=16, total_rank=16, ranks=[4, 0, 8, 4], threshold=0.1, digest="d",
            seconds_gather=0.25, seconds_solve=0.25, seconds_apply=0.25, changed=7,
        ))  # fmt: skip
    write_object(run.summary, {"loss": 1.0, "total_rank": 16, "tokens_per_second": 250.0, "evaluation": {evil: 0.5}})
    run.mark_finished(40)
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take a second."""
    monkeypatch.setattr(run_page, "_pictures", lambda found: {})


class Tags(HTMLParser):
    """Collects start tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_is_in_the_page(tmp_path: Path) -> None:
    html = to_html(gather(run_directory(tmp_path / "run")))
    page = Tags(html)
    for text in (
        "finished after step 40",
        "2 in 1.500 s",
        "250",
        "1.00 GiB",
        "25.0%",
        "train.lr",
        "zero_optimization.stage",
        "a/model",
    ):
        assert text in page.text, text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [p["alt"] for p in pictures] == [
        "metrics over steps", "rank of every matrix after every event", "ranks by layer and type",
    ]  # fmt: skip
    assert all(str(p["src"]).startswith("data:image/png;base64,") for p in pictures)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html) and "url(" not in html  # nothing is fetched
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}


def test_texts_from_outside_stay_texts(tmp_path: Path, undrawn: None) -> None:
    page = to_html(gather(run_directory(tmp_path / "run", evil=EVIL)))
    read = Tags(page)
    assert "script" not in {tag for tag, _ in read.tags} and "<script" not in page
    assert read.text.count(EVIL) >= 8
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)


@pytest.mark.parametrize(
    "name", ["run.yaml", "run.json", "summary.json", "ds_config.json", "metrics.jsonl", "allocations.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "torn", "other", "binary", "empty"])
def test_any_file_may_be_damaged_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.setattr(curves, "data_uri", lambda figure, dpi=140: "data:,")  # drawing is slow
    monkeypatch.setattr(run_page, "_map", lambda ranks: "data:,")
    if not name.endswith(".jsonl") and name != "run.json":
        monkeypatch.setattr(run_page, "_pictures", lambda found: {})
    run = run_directory(tmp_path / "run")
    path = run / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({
            "torn": content[: len(content) // 2], "other": b'[1, "two", {"step": "x"}]\n',
            "binary": b"\x00\xff\xfe" * 20 + b"\n", "empty": b"",
        }[damage])  # fmt: skip
    found = gather(run)
    page = Tags(to_html(found))
    silent = name == "allocations.jsonl" and damage in ("missing", "torn", "empty")  # as of a run without events
    silent = silent or (name == "metrics.jsonl" and damage == "torn")  # its last line, which a crash may tear
    assert bool(found.problems) != silent, found.problems
    assert all("\n" not in problem and problem in page.text for problem in found.problems)
    assert "a/model" in page.text


def test_events_of_another_model_are_left_out(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    write_object(run / "run.json", facts | {"modules": MODULES[:3]})
    found = gather(run)
    assert found.records == [] and "another number of ranks" in found.problems[0]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").write_resolved({"model": {"path": "m"}}, {}, {"total_steps": 5, "modules": MODULES})
    found = gather(tmp_path / "run")
    page = Tags(to_html(found)).text
    assert "not finished: step 0 of 5" in page and "no allocation event yet" in page and "No step was logged" in page
    assert found.problems == ["metrics.jsonl is missing: there are no curves"]


def test_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    for path, match in (
        (tmp_path, "is no run directory"),
        (tmp_path / "text.txt", "a file"),
        (tmp_path / "x", "not there"),
    ):
        with pytest.raises(RunDirectoryError, match=match):
            gather(path)


def test_a_file_of_somebody_else_is_kept(tmp_path: Path, undrawn: None) -> None:
    run = run_directory(tmp_path / "run", events=0)
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="is there and is no report"):
        write_report(run, mine)
    assert mine.read_text() == "<html>mine</html>"
    assert write_report(run, mine, overwrite=True)[0] == mine
    assert write_report(run, mine)[0] == mine  # a report of ours is written anew
    assert write_report(run, None)[0] == run / "report.html"


def test_the_command(tmp_path: Path, undrawn: None) -> None:
    run = run_directory(tmp_path / "run", events=1)
    (run / "summary.json").unlink()
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["note: summary.json is missing", str(tmp_path / "page.html")]


def test_curves_and_strip_hold_the_numbers(tmp_path: Path) -> None:
    found = gather(run_directory(tmp_path / "run", evil="accuracy"))
    figure = curves.curves(found)
    assert figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == [
        "loss", "held-out metrics", "learning rate", "gradient norm, before clipping", "tokens per second", "MFU (%)",
        "memory of the main process (GiB)", "total rank",
    ]  # fmt: skip
    assert panels["tokens per second"].lines[-1].get_ydata().tolist() == [1000, 2000, 3000, 4000]  # type: ignore[union-attr]
    strip = curves.rank_strip(found)
    assert strip is not None
    image = strip.axes[0].images[0].get_array()
    assert image.tolist() == [[8, 4, 4], [8, 8, 8], [8, 0, 0], [8, 4, 4]]  # q_proj of both layers, then up_proj
    assert [label.get_text() for label in strip.axes[0].get_yticklabels()] == ["q_proj", "up_proj"]


def test_long_curves_are_thinned_with_both_ends() -> None:
    steps, values = curves.thinned(range(10_001), [float(i) for i in range(10_001)])
    assert len(steps) <= curves.MOST_POINTS + 1 and steps[0] == 0 and steps[-1] == 10_000 and values[-1] == 10_000
    assert curves.thinned([], []) == ([], [])


def test_flat_keys() -> None:
    assert flat({"a": {"b": [1, "x"], "c": None}, "d": "text"}) == [("a.b", '[1, "x"]'), ("d", "text")]
