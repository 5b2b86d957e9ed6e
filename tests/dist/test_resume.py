"""A run that was stopped and resumed equals one that was not, bit for bit; other shardings read the same files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from salient_ds.engine.reports import NonFiniteLoss
from salient_ds.engine.shard_files import CheckpointError, ShardReader, damage, find_checkpoints, manifest_sum
from salient_ds.monitor.directory import RunDirectory
from salient_ds.own_files import write_object
from salient_ds.run.export import best_checkpoint, newest_checkpoint, read_factors
from salient_ds.run.resuming import choose_start
from salient_ds.run.training import Training
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
    Case(2, "bf16", train={"neftune_alpha": 5.0}),
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


CHANGED = [
    (Case(0), Case(0, train={"lr": 0.001})),
    (Case(2, "bf16"), Case(2, "bf16", train={"lr": 0.001, "weight_decay": 0.1})),
    (Case(3, zero=TINY_PARTITIONS), Case(3, zero=TINY_PARTITIONS, train={"lr": 0.001})),
    (Case(2), Case(2, train={"lr": 0.03, "lr_schedule": "linear", "lr_warmup": 0.2, "weight_decay": 0.1,
                             "betas": (0.8, 0.95), "eps": 1e-6})),
    (Case(1), Case(1, train={"max_grad_norm": 0.25})),
    (Case(2, train={"lr_schedule": "linear"}), Case(2, train={"lr_schedule": "cosine"})),
    (Case(2), Case(2, train={"sigma_lr": 1.5})),
]  # fmt: skip
"""A run, and what it goes on as after a stop."""


@pytest.fixture(scope="module")
def continued(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(2, resume_worker.changed, tiny_llama, CHANGED, tmp_path_factory.mktemp("changed"))


@pytest.mark.parametrize("index", range(len(CHANGED)))
def test_changed_settings_act_from_the_next_step_on(continued: list[Any], index: int) -> None:
    before, after = CHANGED[index]
    for process in continued:
        found = process[index]
        wanted = {f"train.{key}" for key, value in after.train.items() if before.train.get(key) != value}
        assert set(found["keys"]) == wanted
        assert found["clipping"] == after.train.get("max_grad_norm", 1.0)
        for group in found["groups"]:
            assert tuple(group["betas"]) == after.train.get("betas", (0.9, 0.999))
            assert group["eps"] == after.train.get("eps", 1e-8)
            decay = after.train.get("weight_decay", 0.0) if group["name"] == "factors" else 0.0
            assert group["weight_decay"] == decay
        if "max_grad_norm" in after.train:
            continue  # cannot be changed by hand in a running engine
        by_hand, resumed = found["by_hand"], found["resumed"]
        for key in ("losses", "digests", "lr"):
            assert by_hand[key] == resumed[key], key
        for mine, theirs in zip(by_hand["state"]["fragments"], resumed["state"]["fragments"], strict=True):
            for key in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[key], theirs[key]), (key, mine["part"])


def test_the_schedule_is_that_of_the_current_step(continued: list[Any]) -> None:
    done = (7 - 3) / (16 - 3)  # linear over 16 steps after a warm-up of 3 (0.2 of 16, rounded down)
    assert continued[0][3]["started"][0] == pytest.approx(0.03 * (1 - done))
    assert continued[0][5]["started"][0] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 7 / 16)))


def test_a_difference_that_was_not_asked_for_is_refused(continued: list[Any]) -> None:
    for process in continued:
        (message, _) = process[0]["refusals"]
        assert "train.lr: 0.02 there, 0.001 here" in message and "--change train.lr," in message
        for part in process[3]["refusals"]:  # nothing allowed; all but the first allowed
            assert "train.lr: 0.02 there, 0.03 here" in part
        everything, one = process[3]["refusals"]
        assert "train.eps: 1e-08 there, 1e-06 here" in everything and "train.eps" not in one
        assert "train.betas: [0.9, 0.999] there, [0.8, 0.95] here" in everything


def test_values_that_are_not_finite_are_not_saved(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    results = spawn(2, resume_worker.not_finite, tiny_llama, folder)
    assert results[0] == results[1]
    master, moment, left, saved = results[0]
    assert "step 3 was not written, because the master of" in master and "2 values that are NaN" in master
    assert "--resume auto --change train.lr" in master
    assert "because the exp_avg of" in moment
    assert left == [] and saved == "step-00000003"


@pytest.fixture
def whole(pairs: list[Any], folder: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that two processes wrote."""
    (found,) = find_checkpoints(folder / "1")
    return Path(shutil.copytree(found, tmp_path / "checkpoints" / found.name))


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_found(whole: Path) -> None:
    names = sorted(p.name for p in whole.iterdir())
    assert len(names) == 2 + 2 + 1 + 2  # shards, process states, shared state, manifest and its sha256
    assert damage(whole, contents=True) is None
    for name in names:
        size = (whole / name).stat().st_size
        for byte, bit in ((0, 0), (size // 2, 3), (size - 1, 7)):
            flip(whole / name, byte, bit)
            problem = damage(whole, contents=True)
            assert problem is not None and name in problem, (name, byte)
            with pytest.raises(CheckpointError, match="damaged checkpoint"):
                ShardReader(whole)
            flip(whole / name, byte, bit)
        content = (whole / name).read_bytes()
        (whole / name).unlink()
        assert f"{name} is missing" in str(damage(whole))
        (whole / name).write_bytes(content)
    assert damage(whole, contents=True) is None


def test_an_automatic_resume_passes_over_damaged_checkpoints_aloud(whole: Path) -> None:
    folder, said = whole.parent, []
    newer = Path(shutil.copytree(whole, folder / "step-00000009"))
    newest = Path(shutil.copytree(whole, folder / "step-00000011"))
    (folder / "step-00000012.partial").mkdir()
    assert choose_start(folder, "auto", said.append) == newest and not said
    flip(newest / "shared.pt", 500)
    shard = newer / "shard-00001-of-00002.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert choose_start(folder, "auto", said.append) == whole
    assert [str(newest) in said[0], "shared.pt" in said[0], shard.name in said[1]] == [True] * 3
    for path in (newest, newer):
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
            choose_start(folder, str(path), said.append)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        choose_start(folder, str(folder), said.append)
    (whole / "process-00000.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 3 checkpoints .* are damaged .*shared.pt"):
        choose_start(folder, "auto", said.append)
    assert choose_start(folder / "none", "auto", said.append) is None


def test_an_export_takes_no_damaged_checkpoint_and_no_older_one_silently(whole: Path) -> None:
    run, newest = whole.parents[1], whole.with_name("step-00000009")
    shutil.copytree(whole, newest)
    said: list[str] = []
    assert newest_checkpoint(run, said.append) == newest and not said
    flip(newest / "shared.pt", 500)
    assert newest_checkpoint(run, said.append) == whole
    assert "step-00000009/shared.pt does not have the sha256" in said[0] and "looking for the one before" in said[0]
    with pytest.raises(CheckpointError, match="step-00000009/shared.pt does not have the sha256"):
        read_factors(newest)
    write_object(run / "summary.json", {"best": {"step": 9}})
    assert best_checkpoint(run, said.append) is None and "the best checkpoint is damaged" in said[1]
    flip(run / "summary.json", 30)
    assert best_checkpoint(run, said.append) is None and "summary.json is damaged" in said[2]
    assert len(read_factors(newest_checkpoint(whole))) == 6
    (whole / "shared.pt").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        newest_checkpoint(run, said.append)


def test_loading_verifies_on_every_process_together(whole: Path, tiny_llama: Path) -> None:
    flip(whole / "process-00001.pt", 200)
    with pytest.raises(AssertionError, match="damaged checkpoint.*process-00001.pt does not have the sha256"):
        spawn(2, resume_worker.resume_elsewhere, tiny_llama, [(Case(1), whole.parent)])


def test_a_loss_that_is_not_finite_says_how_to_go_on(whole: Path) -> None:
    def broken(*_: Any) -> None:
        raise NonFiniteLoss(9, [3, 4])

    run = Training.__new__(Training)
    run.engine = SimpleNamespace(train_step=broken)  # type: ignore[assignment]
    run.directory = RunDirectory(whole.parents[1])
    waited: list[bool] = []
    run.keeper = SimpleNamespace(wait=lambda: waited.append(True))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"step 9 is not finite.*{whole.name}.*--resume auto --change train.lr"):
        run._step([], 1)
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match="begin again with a lower train.lr and --overwrite"):
        run._step([], 1)
    assert waited == [True, True]  # a checkpoint that is being written counts


def as_format_1(path: Path) -> None:
    """Rewrite a checkpoint's manifest as older versions wrote it."""
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1, "files": sizes}))
    (path / "manifest.json.sha256").unlink()


def test_an_older_checkpoint_is_read(whole: Path, pairs: list[Any], tiny_llama: Path) -> None:
    as_format_1(whole)
    assert damage(whole, contents=True) is None
    for k, report in enumerate(spawn(2, resume_worker.older, tiny_llama, whole)):
        assert report["step"] == 7 and report["extra"] == {"note": 1}
        assert report["losses"] == pairs[k][1][0]["losses"][7:]
        assert "train.lr: 0.02 there, 0.5 here" in report["message"]  # the optimizer's state tells
    shard = whole / "shard-00000-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    assert damage(whole, contents=True) is None  # the size is right
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
        ShardReader(whole)
    shard.write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes" in str(damage(whole))


def test_a_later_format_is_refused(whole: Path) -> None:
    content = (whole / "manifest.json").read_text().replace('"format": 2', '"format": 3', 1).encode()
    (whole / "manifest.json").write_bytes(content)
    (whole / "manifest.json.sha256").write_bytes(manifest_sum(content))
    assert "has format 3, and this version of salient_ds reads 1 to 2" in str(damage(whole))


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
