"""The sweep file, and what an arm makes of the base run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import apply, arm_runs, differences, fingerprint, job_run
from salient_ds.sweep.spec import Arm, load_spec

BASE = {
    "output_dir": "runs/base",
    "deepspeed": "ds.json",
    "adapter": {"rank": 8, "alpha": 16},
    "method": {"name": "salientlora", "target_rank": 3, "window_initial": 5},
    "train": {"lr": 1e-3, "seed": 7, "max_steps": 20},
}


def spec_file(folder: Path, **changes: Any) -> Path:
    given = {"run": "run.yaml", "output_dir": "out", "arms": {"lora": {"method.name": "lora"}}, "lr": [1e-3]} | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "run: run.yaml\noutput_dir: out\nlr: [1e-3, 2e-3]\nwiden: true\nmetric: {name: accuracy, better: higher}\n"
        "arms:\n  plain:\n  listed: ['method={name: lora, rslora: true}', adapter.rank=2, 'lr=[1e-2, 3e-2]']\n"
    )
    spec = load_spec(path)
    assert spec.rates("plain") == [1e-3, 2e-3] and spec.rates("listed") == [1e-2, 3e-2]
    assert spec.arms["listed"].overrides == {"method": {"name": "lora", "rslora": True}, "adapter.rank": 2}
    assert (spec.widen, spec.metric.sign, spec.compared_with) == (3, -1, "plain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [0.0]}, "lr: element 1: Input should be greater than 0"),
        ({"lr": None}, "arm 'lora' has no learning rates"),
        ({"lr": [1e-3, 1.00000001e-3]}, "holds a value twice"),
        ({"widenn": True}, "unknown key 'widenn': did you mean 'widen'?"),
        ({"stop": {"factor": 0.5}}, "stop.factor=0.5: Input should be greater than 1"),
        ({"stop": {"afetr": 0.5}}, "unknown key 'stop.afetr': did you mean 'after'?"),
        ({"seeds": {"tune": [1], "fresh": [1, 2]}}, "seed 1 is in seeds.tune and in seeds.fresh"),
        ({"seeds": {"fresh": [3, 3]}}, "seeds.fresh holds 3 twice"),
        ({"baseline": "lroa"}, "baseline='lroa' is no arm: did you mean 'lora'?"),
        ({"metric": "accuracy"}, "say whether lower or higher is better"),
        ({"arms": {}}, "arms={}"),
        ({"arms": {"a/b": {}}}, "arm 'a/b': a name is part of paths"),
        ({"arms": {"A": {}, "a": {}}}, "differs only in case"),
        ({"arms": {"a": {"train.lr": 1}}}, "train.lr is set by the sweep: give it as lr:"),
        ({"arms": {"a": {"train": {"seed": 1}}}}, "train.seed is set by the sweep"),
        ({"arms": {"a": {"output_dir": "x"}}}, "output_dir is set by the sweep"),
        ({"arms": {"a": {"methd.name": "lora"}}}, "unknown key 'methd.name': did you mean 'method'?"),
        ({"arms": {"a": ["adapter.rank"]}}, "'adapter.rank' is not of the form key=value"),
        ({"arms": {"a": ["adapter.rank=1", "adapter.rank=2"]}}, "'adapter.rank' is given twice"),
        ({"overrides": {"lr": [1]}}, "overrides.lr: learning rates of all arms are the sweep's own lr"),
        ({"overrides": {"trian.max_steps": 1}}, "unknown key 'trian.max_steps': did you mean 'train'?"),
        ({"jobs": "many"}, "jobs='many': Input should be 'auto'"),
        ({"arms": {"a": 3}}, "an arm is a mapping of overrides or a list of key=value, not 3"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_spec(spec_file(tmp_path, **changes))
    assert message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sweep file .* does not exist"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="run='run.yaml' does not exist"):
        arm_runs(load_spec(spec_file(tmp_path)), tmp_path / "sweep.yaml")


def run_of(**overrides: Any) -> dict[str, Any]:
    return apply(BASE, Arm.model_validate(overrides))


def test_another_method_begins_a_new_section() -> None:
    assert run_of(**{"method.name": "lora"})["method"] == {"name": "lora"}
    assert run_of(**{"method.name": "adalora", "method.interval": 5})["method"] == {"name": "adalora", "interval": 5}
    same = run_of(**{"method.name": "salientlora", "method.target_rank": 2})["method"]
    assert same == {"name": "salientlora", "target_rank": 2, "window_initial": 5}


def test_a_section_replaces_the_bases() -> None:
    run = run_of(**{"adapter.alpha": 4, "adapter": {"rank": 2}, "method": {"name": "lora"}})
    assert run["adapter"] == {"rank": 2, "alpha": 4} and run["method"] == {"name": "lora"}
    assert BASE["adapter"] == {"rank": 8, "alpha": 16}  # the base is left as it is


def test_the_run_file_of_a_run(tmp_path: Path) -> None:
    run = job_run(run_of(), 2e-3, 4, tmp_path / "here")
    assert run["output_dir"] == str(tmp_path / "here")
    assert run["train"] == {"max_steps": 20, "lr": 2e-3, "seed": 4}


def test_overrides_of_all_arms_come_first(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    common = {"train.max_steps": 9, "adapter.rank": 5, "method.name": "adalora"}
    path = spec_file(tmp_path, overrides=common, arms={"a": {"adapter.rank": 2}, "b": {"method.name": "lora"}})
    runs = arm_runs(load_spec(path), path)
    assert [run["adapter"]["rank"] for run in runs.values()] == [2, 5]
    assert [run["method"]["name"] for run in runs.values()] == ["adalora", "lora"]
    assert all(run["train"] == {"max_steps": 9} for run in runs.values())


def test_local_paths_are_absolute_and_files_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "rows.json").write_text("[]")
    data = {"train": str(tmp_path / "rows.json"), "eval": "some/dataset"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE | {"data": data}))
    path = spec_file(tmp_path)
    run = arm_runs(load_spec(path), path)["lora"]
    assert run["deepspeed"] == str(tmp_path / "ds.json") and run["data"]["eval"] == "some/dataset"
    before = fingerprint(run)
    (tmp_path / "moved.json").write_text("[]")
    moved = run | {"data": data | {"train": str(tmp_path / "moved.json")}}
    assert fingerprint(moved) == before
    (tmp_path / "moved.json").write_text("[ ]")
    assert [line.partition(":")[0] for line in differences(before, fingerprint(moved))] == ["data.train"]


def test_differences_name_key_and_both_values() -> None:
    found = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})
    assert found == ["a.b: 1 before, 3 now", "a.c: 2 before, 'not set' now", "d: 'not set' before, 4 now"]
