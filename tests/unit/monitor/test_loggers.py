"""Loggers of ``train.log``: what is sent at the border of each package, resuming, and failures that end no run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from salient_ds.monitor.loggers import Loggers, known_run, remember_run

SETTINGS = {"train": {"lr": 1e-3}}


class FakeWandb(ModuleType):
    """The part of wandb's interface that we call."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "new-id",
            define_metric=lambda name, step_metric=None: self.calls.append(("axis", (name, step_metric))),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda: self.calls.append(("finish", None)),
        )

    def Histogram(self, values: list[int]) -> str:  # noqa: N802 - their name
        return f"histogram of {values}"


class FakeClient:
    """The part of mlflow's MlflowClient that we call."""

    calls: list[tuple[Any, ...]]

    def __getattr__(self, name: str) -> Any:
        def record(*arguments: Any, **options: Any) -> Any:
            type(self).calls.append((name, *arguments, *options.items()))
            return SimpleNamespace(info=SimpleNamespace(run_id="run-1")) if name == "create_run" else None

        return record


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    FakeClient.calls = []
    tracking = ModuleType("mlflow.tracking")
    tracking.MlflowClient = FakeClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    return FakeClient.calls


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_joins_numbers_of_a_step_and_adds_columns(tmp_path: Path) -> None:
    logs = Loggers(["csv"], tmp_path, SETTINGS, 0)
    logs.numbers(1, {"loss": 2.5, "penalty": None, "bad": float("nan")})
    logs.numbers(1, {"event/changed": 3})
    logs.numbers(2, {"loss": 2})
    logs.numbers(2, {"eval_loss": 7, "loss": 1})
    logs.numbers(3, {"loss": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "step,loss,event/changed,eval_loss", "1,2.5,3,", "2,1,,7", "3,0.5,,",
    ]  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 5])
def test_csv_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path, step: int) -> None:
    logs = Loggers(["csv"], tmp_path, SETTINGS, 0)
    for n in (1, 2, 3):
        logs.numbers(n, {"loss": n})
    logs = Loggers(["csv"], tmp_path, SETTINGS, step)
    logs.numbers(step + 1, {"loss": 9, "late": 1})
    kept = [n for n in (1, 2, 3) if n <= step]
    assert [int(row["step"]) for row in lines(tmp_path)] == [*kept, step + 1]
    assert [row["late"] for row in lines(tmp_path)] == [""] * len(kept) + ["1"]


def test_a_fresh_run_begins_a_fresh_csv(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,old\n1,2\n")
    Loggers(["csv"], tmp_path, SETTINGS, 0).numbers(1, {"loss": 1})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss", "1,1"]


@pytest.mark.parametrize("damage", ["", "x\n", "step\n\n,,\nnine,1\n", "\n1,2"])
def test_a_damaged_csv_does_not_stop_a_resume(tmp_path: Path, damage: str) -> None:
    (tmp_path / "log.csv").write_text(damage)
    logs = Loggers(["csv"], tmp_path, SETTINGS, 4)
    logs.numbers(5, {"loss": 1})
    assert [row["step"] for row in lines(tmp_path) if row.get("loss")] == ["5"]


def test_wandb_is_one_run_with_our_axis(tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    logs = Loggers(["wandb"], tmp_path / "name", SETTINGS, 0)
    assert logs.loggers == {}, "there is no such folder to remember the run in"
    (tmp_path / "name").mkdir()
    wandb.calls.clear()
    logs = Loggers(["wandb"], tmp_path / "name", SETTINGS, 0)
    logs.numbers(7, {"loss": 1.5})
    logs.ranks(7, {"a": 4, "b": 0})
    logs.close()
    (_, options), *rest = wandb.calls
    assert options["project"] == "mine" and options["name"] == "name" and options["config"] == SETTINGS
    assert options["id"] is None and options["resume"] is None
    assert rest == [
        ("axis", ("step", None)), ("axis", ("*", "step")), ("log", {"step": 7, "loss": 1.5}),
        ("log", {"step": 7, "ranks": "histogram of [4, 0]"}), ("finish", None),
    ]  # fmt: skip
    wandb.calls.clear()
    Loggers(["wandb"], tmp_path / "name", SETTINGS, 5)
    assert wandb.calls[0][1]["id"] == "new-id" and wandb.calls[0][1]["resume"] == "allow"


def test_mlflow_is_one_run(tmp_path: Path, mlflow: list[tuple[Any, ...]]) -> None:
    logs = Loggers(["mlflow"], tmp_path, SETTINGS, 0)
    logs.numbers(7, {"loss": 1.5})
    logs.ranks(7, {"a": 4})
    logs.close()
    names = [call[0] for call in mlflow]
    assert names[:4] == ["get_experiment_by_name", "create_experiment", "create_run", "log_dict"]
    assert names[4:] == ["log_metric", "log_dict", "set_terminated"]
    assert mlflow[4][1:] == ("run-1", "loss", 1.5, ("step", 7))
    assert mlflow[5][1:] == ("run-1", {"a": 4}, "ranks/step-00000007.json")
    mlflow.clear()
    Loggers(["mlflow"], tmp_path, SETTINGS, 7).numbers(8, {"loss": 1})
    assert mlflow == [("update_run", "run-1", ("status", "RUNNING")), ("log_metric", "run-1", "loss", 1, ("step", 8))]


def test_both_identifiers_are_kept(tmp_path: Path) -> None:
    remember_run(tmp_path, "wandb", "a")
    remember_run(tmp_path, "mlflow", "b")
    assert (known_run(tmp_path, "wandb"), known_run(tmp_path, "mlflow")) == ("a", "b")
    (tmp_path / "log_runs.json").write_text("[1")
    assert known_run(tmp_path, "wandb") is None


def test_a_logger_that_fails_ends_nothing(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(values: dict[str, Any]) -> None:
        raise OSError("the network\nis gone")

    logs = Loggers(["wandb", "csv"], tmp_path, SETTINGS, 0)
    logs.loggers["wandb"].run.log = lost  # type: ignore[attr-defined]
    logs.numbers(1, {"loss": 1})
    logs.numbers(2, {"loss": 2})
    assert list(logs.loggers) == ["csv"] and len(lines(tmp_path)) == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "wandb failed and is left out from here on: OSError: the network is gone" in warning
