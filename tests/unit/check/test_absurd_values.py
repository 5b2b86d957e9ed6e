"""Values that once ended in a traceback: one sentence about the file instead. tests/faults/test_fuzz.py found them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from salient_ds.config.run import parse_config
from salient_ds.data.formats import check_file
from salient_ds.data.sources import locate
from salient_ds.engine.shard_files import CheckpointError
from salient_ds.export.lora_config import read_lora_config
from salient_ds.heterolora.released_toml import convert
from salient_ds.own_files import OwnFileError, reading
from salient_ds.strict import ConfigError

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "text"), [("rows.json", f"[{DEEP}"), ("rows.jsonl", f'{{"a": {DEEP}\n'), ("x.json", DEEP)]
)
def test_rows_that_are_nested_too_deeply(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match="nested too deeply|invalid JSON"):
        check_file(path)


def test_toml_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f'granularity = "layer"\n[all_layers]\nr = {"[" * 5000}')
    with pytest.raises(ValueError, match="nested too deeply"):
        convert(path, None, "opt", 2, "none")


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern"])
def test_ranks_of_hundreds_of_digits(tmp_path: Path, field: str) -> None:
    number: object = int("1" + "0" * 400)
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    values[field] = {"q_proj": number} if field == "rank_pattern" else number  # type: ignore[assignment]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="a number of many digits") as found:
        read_lora_config(tmp_path)
    assert len(str(found.value)) < 300


def test_an_adapter_configuration_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": {DEEP}')
    with pytest.raises(ValueError, match="adapter_config.json is not valid JSON"):
        read_lora_config(tmp_path)


@pytest.mark.parametrize("key", ["deepspeed", "rank_pattern"])
def test_names_of_thousands_of_letters(key: str) -> None:
    name = "a" * 5000
    run = {
        "output_dir": "o", "deepspeed": name if key == "deepspeed" else "d", "model": {"path": "m"},
        "adapter": {"rank": 4, "alpha": 8, "rank_pattern": name if key == "rank_pattern" else {}},
        "method": {"name": "lora"}, "data": {"train": "t"},
        "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "lr": 0.01},
    }  # fmt: skip
    with pytest.raises(ConfigError) as found:
        parse_config(run, base=Path())
    (problem,) = found.value.problems
    assert key in problem and "File name too long" in problem and len(problem) < 200


def test_the_home_of_nobody() -> None:
    with pytest.raises(ValueError, match="write the path in full"):
        locate("~no-such-user/rows.json")


def test_sizes_that_no_tensor_has(tmp_path: Path) -> None:
    """What torch says about a file of ours names that file; our own errors pass."""
    place = tmp_path / "manifest.json"
    with pytest.raises(OwnFileError, match="manifest.json.*impossible"), reading(place):
        torch.zeros(6).split([2, 3])
    with pytest.raises(CheckpointError, match="lacks"), reading(place):
        raise CheckpointError("the checkpoint lacks a file")
