"""The progress display: a bar in a terminal, lines in a file, silence elsewhere."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from salient_ds.monitor.progress import Progress


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, clock: Clock, steps: range, seconds: float = 2.0, tokens: int = 5000) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, loss=1.0 / step, tokens=tokens, total_rank=50 if step >= 20 else None)


def test_lines_in_a_file() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(40, every=10, total_rank=64, stream=out, clock=clock) as progress:
        run(progress, clock, range(1, 26))
    first, second = out.getvalue().splitlines()
    assert first == f"step 10/40  loss {progress_loss(10):.4f}  2.50k tok/s  total rank 64  ETA 01:00"
    assert second.startswith("step 20/40") and second.endswith("total rank 50  ETA 00:40")


def progress_loss(step: int) -> float:
    value = 1.0
    for k in range(2, step + 1):
        value += 0.1 * (1.0 / k - value)
    return value


def test_mfu_where_it_is_known() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(2, every=1, stream=out, clock=clock)
    for step, mfu in ((1, 0.4), (2, 0.5)):
        clock.now += 1.0
        progress.update(step, loss=1.0, tokens=10, mfu=mfu)
    assert ["MFU 40.0%" in line or "MFU 41.0%" in line for line in out.getvalue().splitlines()] == [True, True]


def test_the_last_step_is_always_shown() -> None:
    out, clock = io.StringIO(), Clock()
    run(Progress(13, every=10, stream=out, clock=clock), clock, range(1, 14))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["10/13", "13/13"]


def test_resumed_run_counts_its_own_steps() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(100, start_step=80, stream=out, clock=clock)
    assert progress.eta() is None
    run(progress, clock, range(81, 91), seconds=3.0)
    assert progress.eta() == pytest.approx(30.0)
    assert out.getvalue().startswith("step 90/100")


def test_bar_in_a_terminal() -> None:
    out, clock = Terminal(), Clock()
    with Progress(40, start_step=5, total_rank=64, stream=out, clock=clock) as progress:
        run(progress, clock, range(6, 26))
        progress.message("event at step 25")
    text = out.getvalue()
    assert "25/40" in text and "total rank 50" in text and "tok/s" in text and "\r" in text
    assert "event at step 25\n" in text


def test_other_processes_are_silent(tmp_path: Path) -> None:
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with Progress(10, main=False, every=1, stream=stream, clock=clock) as progress:
            run(progress, clock, range(1, 11))
            progress.message("hello")
            progress.write_summary(tmp_path / "summary.json")
        assert stream.getvalue() == "" and not list(tmp_path.iterdir())


def test_summary(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(40, start_step=10, every=100, stream=out, clock=clock)
    run(progress, clock, range(11, 31), seconds=0.5, tokens=100)
    progress.write_summary(tmp_path / "summary.json", accuracy=0.5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 30 and summary["tokens"] == 2000 and summary["seconds"] == pytest.approx(10.0)
    assert summary["tokens_per_second"] == pytest.approx(200.0) and summary["total_rank"] == 50
    assert summary["loss"] == pytest.approx(1 / 30) and summary["accuracy"] == 0.5
    assert "30/40 steps in 00:10" in out.getvalue() and list(tmp_path.iterdir()) == [tmp_path / "summary.json"]


def test_nothing_done_yet(tmp_path: Path) -> None:
    progress = Progress(10, stream=io.StringIO(), clock=Clock())
    progress.write_summary(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["loss"] is None


def test_a_nan_loss_is_shown_and_kept_as_json(tmp_path: Path) -> None:
    out = io.StringIO()
    progress = Progress(1, stream=out, clock=Clock())
    progress.update(1, loss=math.nan, tokens=1)
    assert "loss nan" in out.getvalue()
    progress.write_summary(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)["loss"] is None
