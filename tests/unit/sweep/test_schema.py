"""The JSON schema of sweep files: current, and of one mind with the classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.sweep.schema import schema_text, sweep_schema
from salient_ds.sweep.spec import SweepSpec

ROOT = Path(__file__).resolve().parents[3]
CHECKER = jsonschema.Draft7Validator(sweep_schema(built_in_only=True))
SOUND: dict[str, Any] = {"run": "run.yaml", "output_dir": "out", "lr": [1e-3], "arms": {"a": {}}}


def faults(sweep: dict[str, Any]) -> list[str]:
    return [error.message for error in CHECKER.iter_errors(sweep)]


def test_the_command_prints_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["schema", "--sweep", "--built-in", "-o", str(tmp_path / "s.json")])
    assert done.exit_code == 0 and "first line in the sweep file" in done.output
    written = (tmp_path / "s.json").read_text()
    assert written == schema_text(built_in_only=True)
    jsonschema.Draft7Validator.check_schema(json.loads(written))
    assert CliRunner().invoke(app, ["schema", "--built-in"]).output != written


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweeps_of_launch_fit(path: Path) -> None:
    assert faults(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "change",
    [
        {"arms": {"a": None, "b": {"lr": [1e-3, 2e-3]}, "c": ["train.epochs=2", "lr=[1e-2]"]}},
        {"arms": {"a": {"train.epochs": 2, "adapter.orthogonality.form": "mean_norm", "method.lambda": 0.5}}},
        {"arms": {"a": {"method": {"name": "lora"}, "train": {"max_steps": 3}, "adapter": {"rank": 2}}}},
        {"arms": {"a": {"method.target_rank": 4, "method.top_h": 2, "data.task": "glue/mnli", "deepspeed": "z.json"}}},
        {"overrides": {"train.max_steps": 60}}, {"overrides": ["train.max_steps=60"]},
        {"metric": "perplexity"}, {"metric": {"name": "accuracy", "better": "higher"}}, {"metric": {"name": "loss"}},
        {"widen": True}, {"widen": 2}, {"jobs": "auto"}, {"jobs": 0}, {"stop": None}, {"stop": {"factor": 2}},
        {"seeds": {"fresh": [7]}}, {"baseline": "a"}, {"fresh_eval": "test.json"},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_classes_take_the_schema_takes(change: dict[str, Any]) -> None:
    SweepSpec.model_validate(SOUND | change)
    assert faults(SOUND | change) == []


@pytest.mark.parametrize(
    "change",
    [
        {"arms": {}}, {"arms": {"a": {"trian.epochs": 2}}}, {"arms": {"a": {"train.lr": 1e-3}}},
        {"arms": {"a": {"train": {"seed": 1}}}}, {"arms": {"a": {"output_dir": "x"}}}, {"arms": {"a": {"lr": [0]}}},
        {"arms": {"a": ["no pair"]}}, {"overrides": {"lr": [1e-3]}}, {"metric": "accuracy"},
        {"metric": {"name": "accuracy"}}, {"metric": {"better": "up"}}, {"widen": 21}, {"jobs": -1},
        {"stop": {"factor": 0.5}}, {"seeds": {"tune": []}}, {"widenn": True}, {"lr": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_classes_refuse_by_a_key_the_schema_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SweepSpec.model_validate(SOUND | change)
    assert faults(SOUND | change)


@pytest.mark.parametrize("key", ["train.max_step", "data.max_lenght", "adapter.rnk", "method.target_rnk"])
def test_misspelt_keys_are_seen_while_one_types(key: str) -> None:
    assert faults(SOUND | {"arms": {"a": {key: 1}}})
    assert faults(SOUND | {"arms": {"a": {"train.max_steps": "many"}}}) and not faults(SOUND)
