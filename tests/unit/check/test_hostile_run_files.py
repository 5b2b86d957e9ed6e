"""Run files and ZeRO JSON files that are absurd: one sentence, at once, and no secret shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.config.run import load_config, parse_config
from salient_ds.config.train import seconds_of
from salient_ds.config.yaml_files import read_yaml
from salient_ds.salience.budget import MOST_EVENTS, AllocationPlan, paper_schedule
from salient_ds.salience.cubic_budget import cubic_schedule
from salient_ds.steps import MOST_STEPS, total_steps
from salient_ds.strict import ConfigError
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config

RUN: dict[str, Any] = {
    "output_dir": "out", "deepspeed": "ds.json", "model": {"path": "m"}, "adapter": {"rank": 4},
    "method": {"name": "lora"}, "data": {"train": "d"},
    "train": {"max_steps": 5, "global_batch_size": 2, "micro_batch_size": 1, "lr": 0.1},
}  # fmt: skip


def problems(**changes: Any) -> list[str]:
    """What is wrong with the run file after ``changes``, with keys such as train__lr."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in RUN.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data[section][name] = value
        else:
            data[section] = value
    try:
        parse_config(data)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("key", ["train__lr", "train__eps", "train__weight_decay", "train__max_grad_norm",
                                 "train__epochs", "train__sigma_lr", "train__timeout_minutes", "adapter__alpha",
                                 "adapter__init_std", "data__eval_size", "train__lr_warmup"])  # fmt: skip
def test_a_number_that_is_not_finite_is_refused(key: str, value: float) -> None:
    found = problems(**{key: value})
    assert any(key.replace("__", ".") in problem and "finite" in problem for problem in found), found


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan")), (0.9,)])
def test_betas_are_from_0_to_below_1(betas: Any) -> None:
    assert problems(train__betas=betas) and not problems(train__betas=(0.0, 0.999))


@pytest.mark.parametrize("std", [0, 1e-9, 11, -1])
def test_init_std_has_bounds(std: float) -> None:
    assert any("adapter.init_std" in problem for problem in problems(adapter__init_std=std))


@pytest.mark.parametrize("value", ["soon", "0min", "-5min", "5 days", "", "1e9s", "9" * 400 + "s", -1, 1.5])
def test_save_every_is_a_number_of_steps_or_a_time(value: Any) -> None:
    assert problems(train__save_every=value)


def test_times() -> None:
    assert (seconds_of("90s"), seconds_of("30min"), seconds_of("1.5h")) == (90, 1800, 5400)
    assert problems(train__save_every="2h") == problems(train__save_every=500) == []


def test_huge_numbers_cost_nothing(tmp_path: Path) -> None:
    assert any("max_steps" in problem for problem in problems(train__max_steps=MOST_STEPS + 1))
    assert "more than 64 bits" in problems(train__max_steps=10**4000)[0]
    with pytest.raises(ValueError, match="more than 10,000,000 steps"):
        total_steps(1000, 1, 1e300)
    plan = AllocationPlan(MOST_STEPS, 100, 50, window_initial=1, window_final=1)
    for schedule in (paper_schedule, lambda plan: cubic_schedule(plan, 1)):
        with pytest.raises(ValueError, match=f"more than {MOST_EVENTS:,} allocation events"):
            schedule(plan)
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{max_steps: {'9' * 5000}}}\n")
    with pytest.raises(ConfigError, match="cannot read .*run.yaml"):
        read_yaml(path)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "deep lists": "[" * 3000 + "]" * 3000,
    "deep mappings": "x: " + "{a: " * 200 + "1" + "}" * 200,
    "aliases": BOMB,
    "an alias of itself": "a: &a [*a]\n",
    "interpolation of itself": "a: ${a}\n",
    "two that refer to each other": "a: ${b}\nb: ${a}\n",
    "not UTF-8": b"a: \xff\xfe\x00",
    "a number": "5",
    "nothing": "",
    "a tag": "!!python/object/apply:os.system ['touch hacked']\n",
    "a control character": "a: \x00\x07",
    "a lone surrogate": 'output_dir: "\\ud800"\n',
    "a large file": "# " + "x" * 2**21,
    "a timestamp": "a: 2001-13-45\n",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_run_file_is_one_sentence(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "run.yaml", HOSTILE[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert all(len(problem) < 2000 for problem in error.value.problems)


@pytest.mark.parametrize("text", ["${oc.env:SECRET_KEY}", "x-${oc.env:SECRET_KEY,none}", "${ oc.env : SECRET_KEY }",
                                  "${${r}:SECRET_KEY}", "${oc.decode:${oc.env:SECRET_KEY}}"])  # fmt: skip
def test_no_resolver_reads_the_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    path = tmp_path / "run.yaml"
    path.write_text(f"r: oc.env\noutput_dir: '{text}'\nadapter: {{rank: 4}}\n")
    for overrides in ([], ["data.train='" + text + "'"]):
        with pytest.raises(ConfigError, match="calls a resolver|cannot read") as error:
            read_yaml(path, overrides)
        assert "hunter2" not in str(error.value)
        path.write_text("output_dir: out\nadapter: {rank: 4}\nr: oc.env\n")
    path.write_text("output_dir: 'runs/${adapter.rank}'\nadapter: {rank: 4}\n")
    assert read_yaml(path)["output_dir"] == "runs/4"


def test_home_is_expanded_once_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = RUN | {"output_dir": "~/x", "deepspeed": "~/ds.json", "model": {"path": "~/m", "tokenizer": "~/t"}}
    run = parse_config(data)
    assert (run.output_dir, run.deepspeed) == (str(tmp_path / "x"), str(tmp_path / "ds.json"))
    assert (run.model.path, run.model.tokenizer) == (str(tmp_path / "m"), str(tmp_path / "t"))
    assert parse_config(run.model_dump(mode="json", by_alias=True)).output_dir == run.output_dir
    assert any("~no-such-user" in problem for problem in problems(output_dir="~no-such-user/x"))
    assert problems(output_dir=" ")


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"train_batch_size": ' + "9" * 5000 + "}",
    '{"a": ' + str(10**30) + "}", '{"a": "\\ud800"}', "\x00", "[]",
])  # fmt: skip
def test_a_zero_json_that_is_absurd(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_ds_config(path)


def test_many_keys_take_no_time_to_compare(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({f"key{k}": k for k in range(20_000)})[:-1] + ', "key1": 2}')
    with pytest.raises(ConfigError, match="'key1' appears twice"):
        load_ds_config(path)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_a_device_that_does_not_exist_is_refused(section: str) -> None:
    raw = {"zero_optimization": {"stage": 3, section: {"device": "gpu"}}}
    with pytest.raises(ConfigError, match=f'{section}.device="gpu": is no device'):
        resolve_ds_config(raw, parse_config(RUN), 1, 5)
