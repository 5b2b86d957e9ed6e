"""Every item once, under contention, and again when its owner is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from salient_ds.sweep.queue import Claim, Heartbeat, Queue, newest

FORK = multiprocessing.get_context("fork")


def take_all(folder: Path, items: list[str], barrier: Any, out: str) -> None:
    queue = Queue(folder)
    barrier.wait()
    mine = [item for item in items if queue.claim(item) is not None]
    Path(out).write_text("\n".join(mine))
    barrier.wait()  # what a process leaves when it ends is free again


def test_every_item_is_claimed_exactly_once(tmp_path: Path) -> None:
    items = [f"item-{i}" for i in range(200)]
    outs = [str(tmp_path / f"out-{i}") for i in range(6)]
    barrier = FORK.Barrier(len(outs))
    args = [(tmp_path / "claims", items if i % 2 else items[::-1], barrier, out) for i, out in enumerate(outs)]
    processes = [FORK.Process(target=take_all, args=a) for a in args]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    shares = [Path(out).read_text().split() for out in outs]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert sum(bool(share) for share in shares) > 1  # they did compete
    assert not [p for p in (tmp_path / "claims").iterdir() if p.name.startswith(".")]  # no drafts are left


def hold(folder: Path, ready: str) -> None:
    assert Queue(folder).claim("item") is not None
    Path(ready).touch()
    time.sleep(60)


def test_the_item_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = FORK.Process(target=hold, args=(tmp_path / "claims", str(ready)))
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    queue = Queue(tmp_path / "claims")
    assert queue.claim("item") is None and queue.owner_alive("item")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not queue.owner_alive("item")
    again = queue.claim("item")
    assert again is not None and again.attempt == 2
    assert Queue(tmp_path / "claims").claim("item") is None


def age(claim: Claim, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(claim.path, (then, then))


def test_a_lease_that_nobody_refreshes_runs_out(tmp_path: Path) -> None:
    queue = Queue(tmp_path, lease=30)
    first = queue.claim("item")
    assert first is not None
    age(first, 20)
    assert queue.claim("item") is None
    age(first, 40)
    second = queue.claim("item")
    assert second is not None and second.attempt == 2
    assert first.lost() and not second.lost()  # the sleeper notices when it wakes
    first.refresh()
    assert newest(tmp_path, "item") == second.path


def test_a_heartbeat_keeps_the_lease_and_notices_its_loss(tmp_path: Path) -> None:
    queue = Queue(tmp_path, lease=0.3)
    claim = queue.claim("item")
    assert claim is not None
    with Heartbeat(claim, lease=0.3) as heart:
        time.sleep(0.8)
        assert queue.claim("item") is None and not heart.lost
        (tmp_path / "item.0002").write_text("{}")
        time.sleep(0.3)
        assert heart.lost


def test_attempts_count_deaths_of_one_session(tmp_path: Path) -> None:
    attempts = []
    for session in ("a", "a", "a", "b"):
        claim = Queue(tmp_path, session=session).claim("item")
        assert claim is not None
        attempts.append(claim.attempt)
        age(claim, 1000)
    assert attempts == [1, 2, 3, 1]
    claim = Queue(tmp_path, session="b").claim("item")
    assert claim is not None
    claim.release()
    again = Queue(tmp_path, session="b").claim("item")
    assert again is not None and again.attempt == 1  # what was given back does not count


def test_items_whose_names_begin_alike(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    assert queue.claim("lr-0.1") is not None and queue.claim("lr-0") is not None
    assert queue.claim("lr-0.1") is None and queue.claim("lr-0") is None


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_a_claim_that_cannot_be_read_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "item.0001").write_text(text)
    assert Queue(tmp_path).claim("item") is None
