"""A method of another package goes through everything that a built-in one does, without a line of ours naming it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.methods import table
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods, register
from salient_ds.strict import ConfigError
from tests.dist import methods_worker
from tests.dist.plain_run import train_plain
from tests.dist.scenario import TOTAL_STEPS, Case
from tests.dist.test_parity import TINY_PARTITIONS, assemble, assert_factors
from tests.outside.random_prune import RandomPruneConfig
from tests.support.spawn import spawn

ROOT = Path(__file__).resolve().parents[2]
METHOD = {"name": "random_prune", "target_rank": 2, "prune_at": 9, "draw_seed": 3}
FAST: dict[str, Any] = {}
"""Section speed left alone: packed, base sharded at stage 3, compacted after the last event."""
CASES = {
    "stage0": Case(0, method=METHOD),
    "stage2": Case(2, method=METHOD),
    "stage2, packed and compacted": Case(2, method=METHOD, speed=FAST),
    "stage3, adapters partitioned too": Case(3, zero=TINY_PARTITIONS, method=METHOD),
    "stage3, base sharded, compacted": Case(3, zero=TINY_PARTITIONS, method=METHOD, speed=FAST),
}


def run_file(folder: Path, model: Path, data: Path, **method: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"), "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(model)}, "adapter": {"rank": 8}, "method": METHOD | method, "data": {"train": str(data)},
        "train": {"max_steps": 16, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The method is known in this file only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_registered", {})
        register(RandomPruneConfig)
        yield


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> RunConfig:
    return parse_config(run_file(tmp_path, tiny_llama, tiny_alpaca))


def test_check_knows_events_parameters_and_memory(run: RunConfig) -> None:
    report = preflight(run)
    assert report.problems == []
    assert report.facts["events"] == [{"step": 9, "total_rank": 28, "window_start": 9, "window": 1}]
    assert (report.facts["initial_total"], report.facts["target_total"]) == (14 * 8, 28)
    assert report.facts["trainable_end"] == report.facts["trainable_start"] // 4
    assert report.facts["this_run"]["optimizer"] == 12 * report.facts["trainable_start"]


def test_check_says_what_the_method_does_not_declare(run: RunConfig) -> None:
    (note,) = [note for note in preflight(run).notes if "random_prune" in note]
    assert note.startswith("method random_prune does not declare compilation: ")


def test_errors_are_those_of_any_method(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'method.prune_it': did you mean 'prune_at'"):
        parse_config(run_file(tmp_path, tiny_llama, tiny_alpaca, prune_it=3))
    with pytest.raises(ConfigError, match=r"method.target_rank=9 is above adapter.rank=8"):
        parse_config(run_file(tmp_path, tiny_llama, tiny_alpaca, target_rank=9))
    with pytest.raises(ConfigError, match="'random_prun' is unknown: did you mean 'random_prune'"):
        parse_config(run_file(tmp_path, tiny_llama, tiny_alpaca, name="random_prun"))
    late = parse_config(run_file(tmp_path, tiny_llama, tiny_alpaca, prune_at=17))
    assert preflight(late).problems == ["method.prune_at=17 is after the last of 16 steps: lower it, or train longer"]
    every = run_file(tmp_path, tiny_llama, tiny_alpaca) | {"speed": {"compaction": "every"}}
    (problem,) = preflight(parse_config(every)).problems
    assert problem == "speed.compaction=every works with salientlora, spectral, not with random_prune: use last"


def _train(global_rank: int, world_size: int, model: Path, folder: Path) -> list[dict[str, Any]]:
    register(RandomPruneConfig)
    return methods_worker.run(global_rank, world_size, model, list(CASES.values()), folder)


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By case: what each of two processes reports, resumed and repeated runs included."""
    reports = spawn(2, _train, tiny_llama, tmp_path_factory.mktemp("outside"), timeout=560)
    return {name: [report[i] for report in reports] for i, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Any]:
    return train_plain(Case(0, method=METHOD), tiny_llama)


@pytest.mark.parametrize("name", CASES)
def test_the_shared_matrix(trained: dict[str, Any], plain: dict[str, Any], name: str) -> None:
    """Fresh, equal to plain torch, bitwise repeatable, resumed, exactly the budget, exported."""
    reports, (decision,) = trained[name], plain["decisions"]
    for report in reports:
        assert report["fresh"] and report["repeat"] == []
        assert report["whole"]["digests"] == [decision.digest()] == report["again"]["digests"]
        assert report["whole"]["losses"] == pytest.approx(plain["losses"], rel=2e-4)
        assert report["again"]["losses"] == report["whole"]["losses"]
        assert (decision.total, decision.step < TOTAL_STEPS) == (12, True)
        live = [rank for rank in decision.ranks(plain["adapted"].layout) if rank]
        assert [rank for rank, _ in report["exported"]] == live
    if "compacted" not in name:
        masters = assemble([[report["whole"]] for report in reports], 0, "master")
        assert_factors(masters, plain["adapted"], 2e-3)


def test_rows_are_dropped_where_the_method_allows_it(trained: dict[str, Any], plain: dict[str, Any]) -> None:
    def elements(name: str) -> int:
        return sum(f["master"].numel() for report in trained[name] for f in report["whole"]["state"]["fragments"])

    whole = sum(a.parameter.numel() for x in plain["adapted"].adapters.values() for a in x.factors().values())
    assert elements("stage2") == whole
    assert elements("stage2, packed and compacted") < whole // 2
    assert elements("stage3, base sharded, compacted") < whole // 2


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    """What a launcher's processes see: nothing is registered there, and torch is not loaded by the check."""
    info = tmp_path / "site" / "random_prune-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: random-prune\nVersion: 1.0\n")
    point = "[salient_ds.methods]\nrandom_prune = tests.outside.random_prune:RandomPruneConfig\n"
    (info / "entry_points.txt").write_text(point)
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(json.dumps(run_file(tmp_path, tiny_llama, tiny_alpaca)))
    program = (
        "import sys\n"
        "from salient_ds.check.printing import run_check\n"
        f"status = run_check({str(run_yaml)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "random_prune on 14 matrices" in done.stdout and "ready to start" in done.stdout
    (info / "entry_points.txt").write_text("[salient_ds.methods]\nrandom_prune = tests.outside.gone:Nothing\n")
    done = subprocess.run(
        [sys.executable, "-m", "salient_ds.cli", "check", str(run_yaml)], capture_output=True, text=True, timeout=120,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 1 and "cannot be loaded from 'tests.outside.gone:Nothing'" in done.stderr


def test_a_name_is_taken_once() -> None:
    class Impostor(MethodConfig):
        name: Literal["lora"] = "lora"

    with pytest.raises(ValueError, match="method name 'lora' is taken by salient_ds.methods.lora.options.LoRAConfig"):
        register(Impostor)
    assert methods()["lora"] is not Impostor
