"""The MT-Bench scripts, with stand-ins for the commands that they call: which steps run, with which arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"
RECIPE = LAUNCH / "recipes" / "demo_tiny.yaml"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH on which the commands print their name and arguments, and python is this one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("salient-ds", "deepspeed"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def start(tools: Path, script: str, *arguments: object, status: int = 0, **variables: str) -> list[str]:
    env = {"PATH": f"{tools}{os.pathsep}{os.defpath}", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, arguments)], env=env, capture_output=True, text=True, check=False,
        cwd=tools.parent,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("==")]


def test_every_step_in_order(tools: Path) -> None:
    overrides = ("output_dir=out/r 1", "model.path=base", "data.template=vicuna_v1.1")
    lines = start(tools, "mt_bench.sh", RECIPE, *overrides, JUDGE_MODEL="gpt-4", BASE_TOO="1",
                  GENERATE_ARGS="--batch-size 2")  # fmt: skip
    common = "--data data --questions mt_bench"
    assert lines == [
        f"salient-ds train {RECIPE} {' '.join(overrides)} --gpus 1 --resume auto",
        "salient-ds export out/r 1 --form peft --output out/r 1/adapter --overwrite",
        f"salient-ds mt-bench generate out/r 1/adapter --model-id r 1 {common} --batch-size 2",
        f"salient-ds mt-bench generate base --model-id base {common} --batch-size 2 --template vicuna_v1.1",
        f"salient-ds mt-bench judge {common} --judge-model gpt-4 --base-url https://api.openai.com/v1",
        f"salient-ds mt-bench report {common} --judge-model gpt-4 --out report",
    ]


def test_what_is_there_is_not_made_again_and_steps_can_be_chosen(tools: Path) -> None:
    adapter = tools.parent / "out" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "salient_ds.json").write_text("{}")
    run = (RECIPE, "output_dir=out")
    lines = start(tools, "mt_bench.sh", *run, PROCESSES="2", MODEL_ID="m")
    assert lines == [
        "deepspeed --num_accelerators 2 --no_local_rank --module salient_ds.cli mt-bench generate out/adapter "
        "--model-id m --data data --questions mt_bench"
    ], "without JUDGE_MODEL nothing is judged"
    merged = start(tools, "mt_bench.sh", *run, FORM="merged", STEPS="train export")
    command = "salient-ds export out --form merged --output out/export-merged --overwrite"
    assert merged == [command]
    there = tools.parent / "out" / "export-merged" / "salient_ds.json"
    there.parent.mkdir()
    there.write_text("{}")
    now = there.stat().st_mtime
    for age, expected in ((5, []), (-5, [command])):
        os.utime(adapter / "salient_ds.json", (now - age, now - age))
        found = start(tools, "mt_bench.sh", *run, FORM="merged", STEPS="export")
        assert found == expected, "an export older than the adapter is made again"
    (line,) = start(tools, "mt_bench.sh", *run, STEPS="judge", JUDGE_MODEL="j", JUDGE_URL="http://h/v1")
    assert line == "salient-ds mt-bench judge --data data --questions mt_bench --judge-model j --base-url http://h/v1"


def test_mistakes_stop_it_before_anything_runs(tools: Path) -> None:
    assert "none of train" in start(tools, "mt_bench.sh", RECIPE, STEPS="generate jugde", status=2)[0]
    assert "error:" in start(tools, "mt_bench.sh", RECIPE, "train.lrr=1", status=2)[0]
    assert any("launch/mt_bench.sh RUN.yaml" in line for line in start(tools, "mt_bench.sh", status=2))
    assert "MAX_COST" in start(tools, "mt_bench_api_judge.sh", RECIPE, status=1)[0]
    assert "JUDGE_MODEL" in start(tools, "mt_bench_local_judge.sh", RECIPE, status=1)[0]


def test_answers_of_another_run_are_not_taken_for_this_ones(tools: Path) -> None:
    from salient_ds.config.run import load_config

    folder = tools.parent / "out" / "adapter"
    folder.mkdir(parents=True)
    (folder / "salient_ds.json").write_text("{}")
    config = load_config(RECIPE, ["output_dir=out"])
    (folder.parent / "run.yaml").write_text(yaml.safe_dump(config.model_dump(by_alias=True)))
    assert start(tools, "mt_bench.sh", RECIPE, "output_dir=out", STEPS="train") == []
    changed = (RECIPE, "output_dir=out", "train.lr=1e-5")
    (said,) = start(tools, "mt_bench.sh", *changed, STEPS="train generate", status=2)
    assert "out was trained with another train:" in said
    assert len(start(tools, "mt_bench.sh", *changed, STEPS="generate")) == 1, "asked for by name"
    (said,) = start(tools, "mt_bench.sh", RECIPE, BASE_TOO="1", GENERATE_ARGS="--endpoint http://h/v1", status=2)
    assert "the same served model twice" in said


def test_the_cases_set_what_they_are_for(tools: Path) -> None:
    (line,) = start(tools, "mt_bench_api_judge.sh", RECIPE, MAX_COST="6", STEPS="judge")
    assert line.endswith("--max-cost 6 --price-prompt 30 --price-completion 60") and "gpt-4" in line
    recipe = yaml.safe_load((LAUNCH / "recipes" / "demo_smollm2.yaml").read_text())
    adapter, base = start(tools, "mt_bench_own_set.sh", STEPS="generate")
    common = "--data .demo/mt_bench --questions own --max-new-tokens 64"
    assert adapter == f"salient-ds mt-bench generate {recipe['output_dir']}/adapter --model-id adapter {common}"
    assert base == (
        f"salient-ds mt-bench generate {recipe['model']['path']} --model-id base {common} "
        f"--template {recipe['data']['template']}"
    )


def test_the_demo_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LAUNCH / "demo"))
    import bench

    for name in ("STEPS", "DATA", "REPORT", "GENERATE_ARGS", "JUDGE_MODEL"):
        monkeypatch.setenv(name, "")
    ran: list[list[str]] = []
    said: list[str] = []
    bench.answer_questions(["run.yaml"], Path("c"), True, ran.append, said.append)
    assert ran.pop()[2:] == ["run.yaml"] and "--max-new-tokens 8 " in os.environ["GENERATE_ARGS"]
    bench.answer_questions(["run.yaml", "a=1"], Path("c"), False, ran.append, said.append)
    assert ran[0][0] == "bash" and (Path.cwd() / ran[0][1]).resolve() == LAUNCH / "mt_bench_own_set.sh"
    assert ran[0][2:] == ["run.yaml", "a=1"] and os.environ["DATA"] == "c/mt_bench"
    assert "STEPS='judge report' DATA=c/mt_bench" in said[-1] and "JUDGE_MODEL=..." in said[-1]
