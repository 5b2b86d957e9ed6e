"""Ranks of single matrices: how keys match, which files they come from, what a model gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.adapters.inject import inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.rank_pattern import RankFileError, ranks_of, read_ranks
from salient_ds.config.run import parse_config
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.strict import ConfigError

NAMES = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.10.q_proj"]


def test_the_longest_key_counts_and_others_get_the_rank() -> None:
    pattern = {"q_proj": 8, "layers.0.q_proj": 2}
    assert list(ranks_of(NAMES, 4, pattern).values()) == [2, 4, 8, 8]
    assert list(ranks_of(NAMES, 4, pattern | {"*": 0}).values()) == [2, 0, 8, 8]
    assert list(ranks_of(NAMES, 4, {}).values()) == [4] * 4


def test_a_key_ends_at_a_dot() -> None:
    """layers.0.q_proj is not the end of layers.10.q_proj."""
    assert ranks_of(NAMES, 4, {"0.q_proj": 1})["layers.10.q_proj"] == 4


def test_a_key_that_names_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'q_prj' names no adapted matrix \(did you mean 'q_proj'\?\)"):
        ranks_of(NAMES, 4, {"q_prj": 1})
    with pytest.raises(ValueError, match="every matrix the rank 0"):
        ranks_of(NAMES, 4, {"*": 0})


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_ranks_of_an_adapter_a_run_and_a_search(tmp_path: Path) -> None:
    peft = {"r": 3, "target_modules": NAMES[:2], "rank_pattern": {re.escape(NAMES[0]): 1}}
    expected = {"*": 0, NAMES[0]: 1, NAMES[1]: 3}
    file = write(tmp_path / "run" / "adapter" / "adapter_config.json", peft)
    for place in (file, file.parent, tmp_path / "run"):
        assert read_ranks(place) == expected
    search = write(tmp_path / "search" / "rank_pattern.json", {"rank_pattern": {"a\\.b": 2}})
    assert read_ranks(search.parent) == {"*": 0, "a.b": 2}
    assert read_ranks(write(tmp_path / "own.json", {"q_proj": 2, "*": 1})) == {"q_proj": 2, "*": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot be read"),
        ([1], "holds no mapping"),
        ({"q_proj": 1.5}, "rank of 'q_proj' is 1.5"),
        ({"q_proj": True}, "rank of 'q_proj' is True"),
        ({"q_proj": -1}, "rank of 'q_proj' is -1"),
        ({"r": 2, "rank_pattern": {}, "target_modules": ".*q_proj"}, "does not list the matrices"),
    ],
)
def test_files_that_give_no_ranks(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(RankFileError, match=message):
        read_ranks(write(tmp_path / "ranks.json", data))


def test_a_folder_without_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankFileError, match="holds none of adapter_config.json"):
        read_ranks(tmp_path)


def run_file(**adapter: Any) -> dict[str, Any]:
    return {
        "output_dir": "out", "deepspeed": "ds.json", "model": {"path": "m"}, "data": {"train": "d"},
        "adapter": {"rank": 4} | adapter, "method": {"name": "lora"},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
    }  # fmt: skip


def test_a_run_file_takes_a_path(tmp_path: Path) -> None:
    """It is looked for beside the run file, and the run keeps the ranks and not the path."""
    write(tmp_path / "ranks.json", {"q_proj": 2})
    config = parse_config(run_file(rank_pattern="ranks.json"), base=tmp_path)
    assert config.adapter.rank_pattern == {"*": 0, "q_proj": 2}
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config(run_file(rank_pattern="lost.json"), base=tmp_path)


def test_growing_methods_refuse_it() -> None:
    data = run_file(rank_pattern={"q_proj": 2}) | {"method": {"name": "increlora", "target_rank": 2, "top_h": 1}}
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern gives initial ranks, but method increlora"):
        parse_config(data)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj = torch.nn.Linear(6, 5), torch.nn.Linear(5, 7)


@pytest.mark.parametrize("rslora", [False, True])
def test_all_matrices_have_one_scaling(rslora: bool) -> None:
    options = AdapterConfig(rank=4, alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 1})
    adapted = inject(Two(), options, LoRAConfig(rslora=rslora), 0, torch.float32)
    assert adapted.layout.ranks == (1, 4)
    for adapter in adapted.adapters.values():
        assert adapter.scaling == pytest.approx(4.0 if rslora else 2.0)


def test_a_matrix_of_rank_0_is_left_alone() -> None:
    model = Two()
    options = AdapterConfig(rank=4, target_modules="all-linear", rank_pattern={"q_proj": 0})
    adapted = inject(model, options, LoRAConfig(), 0, torch.float32)
    assert list(adapted.adapters) == ["up_proj"] and type(model.q_proj) is torch.nn.Linear
