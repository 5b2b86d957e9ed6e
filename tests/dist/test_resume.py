"""A run that was stopped and resumed equals one that was not, bit for bit; other shardings read the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine.shard_files import CheckpointError, ShardReader, damage, find_checkpoints
from tests.dist import resume_worker
from tests.dist.scenario import SALIENT, Case
from tests.dist.test_parity import TINY_PARTITIONS, assemble
from tests.support.spawn import spawn

CASES = [
    Case(0),
    Case(1),
    Case(2),
    Case(3),
    Case(3, zero=TINY_PARTITIONS),
    Case(2, "bf16"),
    Case(3, "fp16", zero=TINY_PARTITIONS),
    Case(2, adapter={"dropout": 0.3}, train={"lr_schedule": "linear", "lr_warmup": 0.2}),
    Case(2, method=SALIENT | {"preset": "reference", "window_final": 4}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def pairs(tiny_llama: Path, folder: Path) -> list[Any]:
    return spawn(2, resume_worker.interrupted, tiny_llama, CASES, folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=str)
def test_resumed_equals_uninterrupted(pairs: list[Any], index: int) -> None:
    for process in pairs:
        whole, again = process[index]
        for key in ("losses", "digests", "lr", "loss_scale"):
            assert whole[key] == again[key], key
        assert len(whole["digests"]) >= 2
        for mine, theirs in zip(whole["state"]["fragments"], again["state"]["fragments"], strict=True):
            assert mine["part"] == theirs["part"]
            for key in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[key], theirs[key]), (key, mine["part"])
        for mine, theirs in zip(whole["state"]["copies"], again["state"]["copies"], strict=True):
            assert torch.equal(mine[4], theirs[4])


def test_another_stage_and_process_count_resume_the_same_files(
    pairs: list[Any], tiny_llama: Path, folder: Path
) -> None:
    jobs = [(Case(3, zero=TINY_PARTITIONS), folder / "2"), (Case(1), folder / "4"), (Case(0), folder / "3")]
    alone = spawn(1, resume_worker.resume_elsewhere, tiny_llama, jobs)
    expected = assemble([[p[2][0]] for p in pairs], 0, "master")
    for index in range(len(jobs)):
        assert alone[0][index]["digests"] == pairs[0][2][0]["digests"][1:]  # the first event lay before the stop
        masters = assemble(alone, index, "master")
        for key, value in expected.items():
            torch.testing.assert_close(masters[key], value, atol=2e-3, rtol=2e-3)


def test_a_failed_save_leaves_the_old_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    for result in spawn(2, resume_worker.failing_save, tiny_llama, tmp_path):
        full, foreign = result["messages"]
        assert "step 5" in full and "step-00000003" in full and "--resume auto" in full
        assert result["after_failure"] == (["step-00000003"], ["step-00000003"])
        assert "method: 'test' there, 'other' here" in foreign
        assert result["kept"] == ["step-00000007", "step-00000008"]


def test_damage_is_found(pairs: list[Any], folder: Path) -> None:
    (whole,) = find_checkpoints(folder / "0")
    assert damage(whole) is None
    shard = sorted(whole.glob("shard-*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    try:
        assert str(len(content) - 10) in str(damage(whole))
        assert find_checkpoints(folder / "0") == []
        with pytest.raises(CheckpointError, match="damaged"):
            ShardReader(whole)
    finally:
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="lacks 4 of 10 elements"):
        ShardReader(whole).read("master", next(iter(ShardReader(whole).manifest["parameters"])), 154, 10)
