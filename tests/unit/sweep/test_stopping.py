"""Early stops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from salient_ds.sweep.plan import Job
from salient_ds.sweep.spec import Stop
from salient_ds.sweep.stopping import HopelessRun, Watch, mark_steps, verdict, window


def test_marks() -> None:
    assert mark_steps(200, 0.25) == [50, 100, 150] and window(200, 0.25) == 25
    assert mark_steps(10, 0.4) == [4, 8] and window(10, 0.4) == 2
    assert mark_steps(2, 0.1) == [1] and window(2, 0.1) == 1


def test_verdicts() -> None:
    assert verdict(2.9, {"0.001": 2.0, "0.002": 4.0}, 1.5) is None
    reason = verdict(3.1, {"0.001": 2.0, "0.002": 4.0}, 1.5)
    assert reason == "training loss 3.1 is above 1.5 x 2, that of lr 0.001 at the same step"
    assert verdict(9.0, {}, 1.5) is None and verdict(9.0, {"1": math.nan}, 1.5) is None
    assert verdict(math.inf, {}, 1.5) == "its training loss is not finite"


def follow(watch: Watch, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        watch.look(step, loss)


def test_a_run_far_above_another_rate_of_its_arm_and_seed_is_stopped(tmp_path: Path) -> None:
    stop = Stop(after=0.5, factor=2.0)
    good, bad = [5.0, 4.0, 2.0, 2.0] + [1.0] * 4, [9.0] * 8
    follow(Watch(tmp_path, Job("lora", 1e-3, 0, "tune"), stop, 8), good)
    follow(Watch(tmp_path, Job("other", 1e-3, 0, "tune"), stop, 8), bad)  # nothing to compare it with
    follow(Watch(tmp_path, Job("lora", 2e-3, 1, "tune"), stop, 8), bad)
    follow(Watch(tmp_path, Job("lora", 2e-3, 0, "tune"), stop, 8), [3.9] * 8)
    with pytest.raises(HopelessRun, match="step 4: training loss 9 is above 2 x 2, that of lr 0.001"):
        follow(Watch(tmp_path, Job("lora", 4e-3, 0, "tune"), stop, 8), bad)


def test_a_run_resumed_before_a_mark_passes_it(tmp_path: Path) -> None:
    stop = Stop(after=0.5, factor=2.0)
    follow(Watch(tmp_path, Job("lora", 1e-3, 0, "tune"), stop, 8), [1.0] * 8)
    Watch(tmp_path, Job("lora", 2e-3, 0, "tune"), stop, 8).look(4, 9.0)
    with pytest.raises(HopelessRun):
        follow(Watch(tmp_path, Job("lora", 2e-3, 0, "tune"), stop, 8), [9.0] * 8)
