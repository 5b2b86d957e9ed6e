"""Dropping pruned rows in flight changes what is stored, not what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine.compact import rounded_up
from tests.dist import compaction_worker as worker
from tests.dist.scenario import RANK, SALIENT, Case
from tests.dist.test_parity import assemble
from tests.support.spawn import spawn

NOTHING = {"compaction": "none"}
LAST = {"compaction": "last"}
EVERY = {"compaction": "every"}
DELAYED = SALIENT | {"apply_at": "next_step"}
SPECTRAL = {
    "name": "spectral",
    "target_rank": 2,
    "score": "curvature",
    "prune_at": [5, 13],
}  # rotated again after it was compacted
MASKED = [
    Case(2, speed=NOTHING),
    Case(2, "bf16", speed=NOTHING),
    Case(2, method=DELAYED, speed=NOTHING),
    Case(2, method=SPECTRAL, speed=NOTHING),
]
COMPACTED = [
    (Case(0, speed=EVERY), 0),
    (Case(1, speed=LAST), 0),
    (Case(2, speed=EVERY), 0),
    (Case(3, speed=LAST | {"zero3": "sharded_base"}), 0),
    (Case(3, speed=EVERY, zero={"stage3_param_persistence_threshold": 0},
          train={"activation_checkpointing": "all"}), 0),
    (Case(2, speed=EVERY, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}), 0),
    (Case(2, "bf16", speed=EVERY), 1),
    (Case(2, method=DELAYED, speed=LAST), 2),
    (Case(2, speed=EVERY | {"compaction_multiple": 2}), 0),
    (Case(3, speed=LAST | {"compaction_multiple": 4}), 0),
    (Case(0, method=SPECTRAL, speed=EVERY), 3),
    (Case(2, method=SPECTRAL, speed=EVERY | {"compaction_multiple": 2}), 3),
    (Case(3, method=SPECTRAL, speed=EVERY | {"zero3": "sharded_base"}), 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "multiple", "expected"),
    [
        ("0101", 1, "0101"),
        ("0100", 2, "1100"),
        ("1011", 4, "1111"),
        ("0000", 4, "0000"),
        ("1110", 8, "1110"),  # there are no eight
    ],
)
def test_rows_are_filled_up_with_the_first_pruned_ones(mask: str, multiple: int, expected: str) -> None:
    found = rounded_up(torch.tensor([c == "1" for c in "0010" + mask]), (4, 4), multiple)
    assert "".join(str(int(bit)) for bit in found[4:]) == expected


@pytest.fixture(scope="module")
def runs(tiny_llama: Path) -> list[list[dict[str, Any]]]:
    return spawn(2, worker.run, tiny_llama, MASKED + [case for case, _ in COMPACTED])


def whole(runs: list[list[dict[str, Any]]], index: int, key: str) -> dict[tuple[int, str], torch.Tensor]:
    """Full factors (or moments) out of all processes' pieces, in their own shapes."""
    full = assemble(runs, index, key)
    shapes = {
        (e["part"].module, e["part"].factor): e["part"].shape for p in runs for e in p[index]["state"]["fragments"]
    }
    return {at: value.view(shapes[at]) for at, value in full.items()}


def stays(masked: dict[str, Any], case: Case) -> torch.Tensor:
    """Rows that a compacted run should have at its end."""
    layout, multiple = masked["layout"], case.speed.get("compaction_multiple", 1)
    kept_N = torch.ones(layout.total, dtype=torch.bool)
    for mask_N in masked["masks"] if case.speed["compaction"] == "every" else masked["masks"][-1:]:
        ranks = [int(part.sum()) for part in kept_N.split(list(layout.ranks))]
        kept_N[kept_N.clone()] = rounded_up(mask_N[kept_N], ranks, multiple)
    return kept_N


@pytest.mark.parametrize("number", range(len(COMPACTED)), ids=lambda n: str(COMPACTED[n][0]))
def test_a_compacted_run_is_the_masked_run(runs: list[list[dict[str, Any]]], number: int) -> None:
    """Losses, decisions, and of every survivor master and both moments."""
    index, masked = len(MASKED) + number, COMPACTED[number][1]
    mine, theirs = runs[0][index], runs[0][masked]
    low = COMPACTED[number][0].precision == "bf16"
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=2e-2 if low else 2e-5)
    if low:
        return  # rounding in another order: the decisions that follow from it may differ
    for one, other in zip(mine["masks"], theirs["masks"], strict=True):
        assert torch.equal(one, other)
    final_N = stays(theirs, COMPACTED[number][0])
    assert torch.equal(mine["kept"], final_N)
    assert torch.equal(mine["live"], theirs["masks"][-1][final_N])
    for key in ("master", "exp_avg", "exp_avg_sq"):
        small, large = whole(runs, index, key), whole(runs, masked, key)
        for (module, factor), values in large.items():
            keep_R = final_N.split(list(theirs["layout"].ranks))[module]
            expected = values[:, keep_R] if factor == "B" else values[keep_R]
            if expected.numel():
                torch.testing.assert_close(small[module, factor], expected, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("number", range(len(COMPACTED)), ids=lambda n: str(COMPACTED[n][0]))
def test_the_optimizer_holds_what_is_left(runs: list[list[dict[str, Any]]], number: int) -> None:
    for process in runs:
        result = process[len(MASKED) + number]
        assert sum(result["ranks"]) == int(result["kept"].sum())
        assert int(result["live"].sum()) == SALIENT["target_rank"] * len(result["ranks"])
        multiple = COMPACTED[number][0].speed.get("compaction_multiple", 1)
        assert multiple > 1 or bool(result["live"].all()), "without a multiple only live rows stay"
        assert all(rank % multiple == 0 or rank == RANK for rank in result["ranks"])
        before, after = result["elements"]
        assert after < (0.55 if multiple == 1 else 0.9) * before  # 12 of 30 rows, matrices of different widths
        assert result["hooks"] <= 1, "a retired engine has left its hooks on the module"
    masked = runs[0][0]
    assert masked["elements"][0] == masked["elements"][1]


RESUMED = [
    Case(2, speed=LAST),
    Case(0, speed=EVERY),
    Case(3, speed=LAST | {"zero3": "sharded_base"}),
]
ROUNDED = Case(2, speed=LAST | {"compaction_multiple": 2})


def test_checkpoints_before_and_after_a_compaction_resume(tiny_llama: Path, tmp_path: Path) -> None:
    """Saved by two processes at ZeRO-2, continued there and elsewhere: the losses of the uninterrupted run."""
    whole_run = spawn(2, worker.save_twice, tiny_llama, Case(2, speed=LAST), tmp_path)[0]
    for processes in (1, 2):
        for found in spawn(processes, worker.resume, tiny_llama, RESUMED, tmp_path)[0]:
            for step, (losses, left) in found.items():
                assert losses == pytest.approx(whole_run[step:], rel=1e-5), step
                assert left == 12
    # rows that this run would not have kept stay as long as they are among those of the checkpoint
    (found,) = spawn(1, worker.resume, tiny_llama, [ROUNDED], tmp_path)[0]
    assert [losses for losses, _ in found.values()] == [pytest.approx(whole_run[s:], rel=1e-5) for s in found]
    assert found[worker.AFTER][1] == 12 < found[worker.BEFORE][1]
    (message,) = spawn(1, worker.refuse, tiny_llama, Case(2, speed={"packing": "none"}), tmp_path, worker.AFTER)
    assert "12 of 30 rows" in message and "packing=none" in message


def test_a_run_that_was_not_compacted_is_when_it_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """Saved with all rows after the last event: the next step drops the pruned ones."""
    whole_run = spawn(1, worker.save_twice, tiny_llama, Case(2, speed=NOTHING), tmp_path)[0]
    (found,) = spawn(1, worker.resume, tiny_llama, [Case(2, speed=LAST)], tmp_path)[0]
    losses, left = found[worker.AFTER]
    assert losses == pytest.approx(whole_run[worker.AFTER :], rel=1e-5) and left == 12
