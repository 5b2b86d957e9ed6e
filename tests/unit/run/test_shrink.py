"""``salient-ds shrink`` as a user calls it: options, refusals before any work, report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.run.shrink import ShrinkOptions, _percent, count_of
from tests.unit.export.builders import build
from tests.unit.export.peft_adapters import RAGGED, change_config, config_of, save_adapter

pytest.importorskip("peft", reason="the adapters are written by real PEFT")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(build("llama"), tmp_path_factory.mktemp("saved"), **RAGGED)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy named "adapter" in the current directory."""
    shutil.copytree(saved, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "adapter"


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    done = CliRunner().invoke(app, ["shrink", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(status: int, message: str, *arguments: str) -> None:
    """The command ends with this status and message, and leaves no trace."""
    before = sorted(str(path) for path in Path().rglob("*"))
    code, _, error = call(*arguments)
    assert (code, error.count("error:")) == (status, 1) and message in " ".join(error.split()), (code, error)
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_report(adapter: Path) -> None:
    code, output, error = call("adapter", "--energy", "0.8", "-o", "small")
    assert (
        code == 0 and error.startswith("note: the modules have ranks 0 to 5, and padding") and "--form padded" in error
    )
    record = json.loads(Path("small/salient_ds.json").read_text())["shrink"]
    for text in (f"{record['total_rank_before']}", f"{record['total_rank_after']}", f"{record['parameters_after']:,}",
                 f"energy kept {100 * record['energy_kept']:.2f} %", "lowest energy kept"):  # fmt: skip
        assert text in output, text
    assert output.rstrip().endswith("small")
    rows = list(csv.DictReader(Path("small/shrink.csv").read_text().splitlines()))
    assert [row["module"] for row in rows] == list(record["modules"])
    for row in rows:
        module = record["modules"][row["module"]]
        assert int(row["rank_after"]) == module["rank_after"] and float(row["energy_kept"]) == module["energy_kept"]
    lowest = min(rows, key=lambda row: float(row["energy_kept"]))
    assert lowest["module"] in output
    assert Path("small/shrink.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_above_the_adapter(adapter: Path) -> None:
    code, output, _ = call("adapter", "--rank", "99", "-o", "all")
    assert code == 0 and "--rank 99 covers all that the adapter has: everything is kept" in output
    assert "energy kept 100.00 %; relative error of the update 0.00 %" in output and "lowest energy" not in output


def test_uniform_and_padded(adapter: Path) -> None:
    code, _, _ = call("adapter", "--rank", "2", "--uniform", "-o", "small", "--form", "padded", "--pad-to", "vllm")
    assert code == 0
    record, config = json.loads(Path("small/salient_ds.json").read_text()), config_of(Path("small"))
    assert set(record["ranks"].values()) == {2} and record["form"] == "padded"
    assert config["r"] == config["lora_alpha"] == 8 and config["rank_pattern"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --rank, --energy and --parameters (none of them given)"),
        (["--rank", "2", "--energy", "0.9"], "(--rank and --energy given)"),
        (["--rank", "0"], "--rank 0 is not a number above 0"),
        (["--rank", "nan"], "--rank nan is not a number above 0"),
        (["--rank", "1.5", "--uniform"], "--rank 1.5 is not a whole number"),
        (["--energy", "0"], "--energy 0 is not a number above 0"),
        (["--energy", "1.5"], "--energy 1.5 is above 1"),
        (["--energy", "-0.5"], "--energy -0.5 is not a number above 0"),
        (["--parameters", "5X"], "--parameters '5X' is no number of parameters: write 5000000, 300k or 5M"),
        (["--parameters", "-5"], "--parameters '-5' is no number of parameters"),
        (["--parameters", "0"], "--parameters 0 is not a number above 0"),
        (["--parameters", "1.0005k"], "--parameters '1.0005k' is not a whole number of parameters"),
        (["--rank", "2", "--form", "merged"], "--form 'merged' is unknown: choose ragged, peft, padded"),
        (["--rank", "2", "--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["--rank", "2", "--form", "ragged", "--pad-to", "8"], "--pad-to 8 belongs to --form padded"),
        (["--rank", "2", "--form", "padded", "--pad-to", "x"], "--pad-to 'x' is neither a rank above 0 nor \"vllm\""),
    ],
)
def test_wrong_commands_end_with_status_2(adapter: Path, options: list[str], message: str) -> None:
    refused(2, message, "adapter", "-o", "small", *options)


def test_what_is_not_possible_ends_with_status_1(adapter: Path) -> None:
    refused(1, "--parameters 40 is below 48, the size of one row of the smallest module: give at least 48",
            "adapter", "-o", "small", "--parameters", "40")  # fmt: skip
    refused(1, "--rank 0.01 for 14 modules is less than one row", "adapter", "-o", "small", "--rank", "0.01")
    refused(1, "nowhere does not exist: give the directory", "nowhere", "-o", "small", "--rank", "2")
    refused(1, "pad_to=1 is below the largest rank", "adapter", "-o", "small", "--rank", "2", "--form", "padded",
            "--pad-to", "1")  # fmt: skip
    change_config(adapter, use_dora=True)
    refused(1, "sets use_dora", "adapter", "-o", "small", "--rank", "2")


def test_the_output_must_be_a_place_of_its_own(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salient_ds.export.shrink.plan_cut", lambda *_: pytest.fail("work began before the check"))
    for target, message in (
        ("adapter", "is or contains"),
        ("adapter/small", "lies inside"),
        (".", "is or contains"),
        ("", "is or contains"),
        ("adapter/adapter_config.json", "is a file"),
    ):
        refused(1, message, "adapter", "-o", target, "--rank", "2", "--overwrite")
    monkeypatch.undo()
    monkeypatch.chdir(adapter.parent)
    assert call("adapter", "--rank", "2", "-o", "small")[0] == 0
    refused(1, "is not empty: choose another one, or overwrite it explicitly", "adapter", "-o", "small", "--rank", "1")
    assert call("adapter", "--rank", "1", "-o", "small", "--overwrite")[0] == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    refused(1, "holds neither an adapter nor a model", "adapter", "-o", "mine", "--rank", "1", "--overwrite")


def test_the_base_model_is_never_overwritten(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    change_config(adapter, base_model_name_or_path=str(base))
    refused(1, "is or contains", "adapter", "-o", "base", "--rank", "2", "--overwrite")


def test_notes_go_to_stderr(adapter: Path) -> None:
    change_config(adapter, new_thing=True, task_type=None)
    code, _, error = call("adapter", "--rank", "2", "-o", "small")
    assert code == 0
    assert error.startswith("note: adapter_config.json sets new_thing, unknown to this version: carried over unread\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5000000", 5_000_000),
        ("300k", 300_000),
        ("5M", 5_000_000),
        ("1.5m", 1_500_000),
        ("2B", 2 * 10**9),
        ("0.5k", 500),
    ],
)
def test_numbers_of_parameters(text: str, number: int) -> None:
    assert count_of(text) == number == int(ShrinkOptions(parameters=text).cut().amount)


def test_nothing_is_rounded_to_all_or_nothing() -> None:
    shares = (1.0, 0.99999, 0.9902, 1e-7, 0.0)
    assert [_percent(s) for s in shares] == ["100.00 %", "above 99.99 %", "99.02 %", "below 0.01 %", "0.00 %"]
