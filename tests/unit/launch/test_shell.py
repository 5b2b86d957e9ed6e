"""The shell scripts, with stand-ins for the commands that they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH on which every command prints its name and arguments, and the check can be told to fail."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "salient-ds": """[ "$1" = last-step ] && exec sed -n "$(cat starts)p" "$STEPS"
            echo "salient-ds $*"; exit ${CHECK_STATUS:-0}""",
        "deepspeed": """echo "deepspeed $*"
            [ -z "$STATUSES" ] && exit 0
            echo $(($(cat starts 2>/dev/null || echo 0) + 1)) > starts
            exit "$(sed -n "$(cat starts)p" "$STATUSES")" """,
        "ssh": 'for word in "$@"; do [ "$word" = deadnode ] && exit 255; done; exit 0',
    }
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "nvidia-smi").write_text('#!/bin/sh\n[ -n "$GPUS" ] && seq "$GPUS"\n')
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def start(tools: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tools}{os.pathsep}{os.defpath}", "RESTART_DELAY": "0"} | variables
    return subprocess.run(
        ["bash", str(LAUNCH / "train.sh"), *arguments],
        env=env,
        cwd=tools.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def restarted(
    tools: Path, statuses: list[int], steps: list[int], **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """train.sh with a launcher that ends with these statuses, each time after a checkpoint of these steps.

    Returns what happened, and the starts of the launcher.
    """
    for name, values in (("statuses", statuses), ("steps", steps)):
        (tools.parent / name).write_text("".join(f"{value}\n" for value in values))
    done = start(tools, "run.yaml", **{"GPUS": "1", "STATUSES": "statuses", "STEPS": "steps"} | variables)
    return done, [line for line in done.stdout.splitlines() if line.startswith("deepspeed")]


@pytest.mark.parametrize("script", ["train.sh", "slurm.sbatch"])
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_all_gpus_of_the_node(tools: Path) -> None:
    done = start(tools, "run.yaml", "train.lr=1", GPUS="4")
    assert done.stdout.splitlines() == [
        "salient-ds check run.yaml train.lr=1 --gpus 4 --resume auto",
        "deepspeed --quiet --master_port 29500 --num_gpus 4 --module salient_ds.train run.yaml train.lr=1 "
        "--resume auto",
    ]


def test_changes_are_for_the_training_only(tools: Path) -> None:
    done = start(tools, "run.yaml", "--change", "train.lr", "train.lr=1", "--change=train.eps", GPUS="1")
    check, train = done.stdout.splitlines()
    assert check == "salient-ds check run.yaml train.lr=1 --gpus 1 --resume auto"
    assert train.endswith("salient_ds.train run.yaml train.lr=1 --resume auto --change train.lr --change=train.eps")
    assert "--change needs a key" in start(tools, "run.yaml", "--change", GPUS="1").stderr


def test_the_example_hostfile_counts_its_slots(tools: Path) -> None:
    done = start(tools, "run.yaml", HOSTFILE=str(LAUNCH / "hostfile.example"), PORT="1234", GPUS="4")
    check, train = done.stdout.splitlines()
    assert check.endswith("--gpus 16 --resume auto")
    assert f"--master_port 1234 --hostfile {LAUNCH / 'hostfile.example'} --module" in train


def test_without_a_gpu_two_cpu_processes(tools: Path) -> None:
    check, train = start(tools, "run.yaml").stdout.splitlines()
    assert check.endswith("--gpus 2 --resume auto") and "--num_accelerators 2" in train


def test_a_failed_check_starts_nothing(tools: Path) -> None:
    done = start(tools, "run.yaml", CHECK_STATUS="1")
    assert done.returncode == 1 and "deepspeed" not in done.stdout


def test_without_arguments_it_says_how_it_is_used(tools: Path) -> None:
    done = start(tools)
    assert done.returncode == 2 and "RUN.yaml" in done.stderr


def test_a_failed_run_is_started_again_while_it_gets_further(tools: Path) -> None:
    done, starts = restarted(tools, [1, 137, 0], [20, 40, 60], RESTARTS="5")
    assert done.returncode == 0 and len(starts) == 3, done.stderr
    assert len(set(starts)) == 1 and starts[0].endswith("--resume auto")
    assert "status 1; its last checkpoint is of step 20: start 1 of 5" in done.stderr
    assert "status 137; its last checkpoint is of step 40: start 2 of 5" in done.stderr


def test_a_run_that_gets_no_further_is_given_up(tools: Path) -> None:
    """As with a checkpoint that no run can continue from."""
    done, starts = restarted(tools, [1, 1, 1], [20, 20, 20], RESTARTS="5")
    assert done.returncode == 1 and len(starts) == 2
    assert "failed twice with no checkpoint after step 20 in between" in done.stderr


def test_restarts_have_a_bound(tools: Path) -> None:
    done, starts = restarted(tools, [1, 1, 1, 1], [1, 2, 3, 4], RESTARTS="2")
    assert done.returncode == 1 and len(starts) == 3
    assert "started again 2 times (RESTARTS=2)" in done.stderr


@pytest.mark.parametrize("status", [0, 2, 75])
def test_an_end_that_is_no_failure_is_passed_on(tools: Path, status: int) -> None:
    done, starts = restarted(tools, [status, 0], [20, 40], RESTARTS="5")
    assert done.returncode == status and len(starts) == 1 and done.stderr == ""


def test_without_restarts_the_status_is_the_launchers(tools: Path) -> None:
    done, starts = restarted(tools, [3, 0], [20, 40])
    assert done.returncode == 3 and len(starts) == 1


def test_silent_nodes_are_left_out_on_request(tools: Path) -> None:
    hosts = tools.parent / "hosts"
    hosts.write_text("# nodes\nnode1 slots=4\ndeadnode slots=4\n")
    done, starts = restarted(tools, [1, 0], [20, 40], RESTARTS="1", SHRINK="1", HOSTFILE=str(hosts))
    assert done.returncode == 0, done.stderr
    assert "deadnode does not answer over ssh: it is left out" in done.stderr
    assert [line.split()[-3] for line in done.stdout.splitlines() if "check" in line] == ["8", "4"]
    assert str(hosts) in starts[0] and str(hosts) not in starts[1]
    assert "deadnode" in hosts.read_text()


def test_restarts_must_be_a_number(tools: Path) -> None:
    done = start(tools, "run.yaml", RESTARTS="many")
    assert done.returncode == 2 and "RESTARTS=many" in done.stderr and done.stdout == ""


SLURM = """
[ "$1" = requeue ] && echo "requeued $2"
exit 0
"""


@pytest.mark.parametrize(
    ("gpus", "cpus", "threads"), [("8", "64", 8), ("a100:8", "64", 8), ("8", "", 1), ("8", "4", 1)]
)
@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_slurm_requeues_a_stopped_run_and_no_other(
    tools: Path, status: int, gpus: str, cpus: str, threads: int
) -> None:
    """One process per GPU of two nodes; they share the CPUs."""
    for name, script in (("srun", f'echo "srun $*"; exit {status}'), ("scontrol", SLURM)):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}{os.pathsep}{os.defpath}", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    env |= {"SLURM_GPUS_PER_NODE": gpus} | ({"SLURM_CPUS_PER_TASK": cpus} if cpus else {})
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "run.yaml", "--change", "train.lr"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("requeued 42" in done.stdout) == (status == 75)
    assert "salient-ds check run.yaml --gpus 16 --resume auto" in done.stdout
    assert f"srun --ntasks=16 --ntasks-per-node=8 --cpus-per-task={threads} " in done.stdout
    assert "python -m salient_ds.train run.yaml --resume auto --change train.lr" in done.stdout
