"""Environment variables of launchers: translated, or refused in one sentence; never two runs beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from salient_ds.zero.launchers import describe_process, first_host

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-77@1"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "31", "SLURM_STEP_ID": "0",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[03-04]"}  # fmt: skip
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (OMPI, ("1", "2", "1", "127.0.0.1")),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "node1"}, ("1", "2", "1", "node1")),
        (SRUN, ("5", "8", "1", "gpu03")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu04"}, ("5", "6", "1", "gpu04")),
        (SRUN | {"SLURM_JOB_NUM_NODES": "1"}, ("5", "8", "1", "127.0.0.1")),
        (MPICH | {"MASTER_PORT": "29501"}, ("0", "2", "0", "127.0.0.1")),
        (SRUN | HAND, ("1", "2", "1", "node1")),  # torchrun or deepspeed under srun: theirs count
    ],
)
def test_a_described_group_is_joined(told: dict[str, str], expected: tuple[str, ...]) -> None:
    environ = dict(told)
    assert describe_process(environ) == []
    assert tuple(environ[name] for name in GROUP[:4]) == expected
    assert 1024 < int(environ["MASTER_PORT"]) < 65536


def test_all_processes_of_a_job_compute_one_port_and_another_job_another() -> None:
    ports = []
    for told in (SRUN, SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, SRUN | {"SLURM_JOB_ID": "32"}):
        environ = dict(told)
        assert describe_process(environ) == []
        ports.append(environ["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize(
    "told",
    [{}, {"SLURM_JOB_ID": "31"}, SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"RANK": "0"}, {"WORLD_SIZE": "1"},
     {"RANK": "0", "WORLD_SIZE": "1"}, {"PMI_RANK": "0", "PMI_SIZE": "1"}],
)  # fmt: skip
def test_one_process_needs_no_launcher(told: dict[str, str]) -> None:
    environ = dict(told)
    assert describe_process(environ) == []
    assert environ == told


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (without(HAND, "MASTER_ADDR", "MASTER_PORT"), "set MASTER_ADDR, MASTER_PORT too"),
        (without(HAND, "LOCAL_RANK"), "set LOCAL_RANK too"),
        (without(HAND, "RANK"), "WORLD_SIZE=2 is set and RANK is not"),
        (without(HAND, "WORLD_SIZE"), "RANK=1 is set and WORLD_SIZE is not"),
        (HAND | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (HAND | {"RANK": "one"}, "RANK=one is no whole number"),
        (HAND | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no whole number from 1 to 65535"),
        (without(OMPI, "PMIX_NAMESPACE"), "OMPI_COMM_WORLD_SIZE=2 says that 2 processes train together"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR for all of them"),
        (without(OMPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK is not"),
        (without(OMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK=2 is not below"),
        (without(SRUN, "SLURM_STEP_ID"), "put srun before the command"),
        (without(SRUN, "SLURM_JOB_ID"), "set MASTER_PORT for all of them"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 says that mpirun started this process, but PMI_SIZE is not set"),
        (MPICH, "set MASTER_PORT for all of them"),
    ],
)
def test_a_group_that_is_described_in_part_is_refused(told: dict[str, str], said: str) -> None:
    environ = dict(told)
    (problem,) = describe_process(environ)
    assert said in problem
    assert "\n" not in problem
    assert environ == told


def test_the_local_rank_of_the_command_counts() -> None:
    environ = without(HAND, "LOCAL_RANK")
    assert describe_process(environ, local_rank=3) == []
    assert environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    ("listed", "first"),
    [("gpu[03-05,09],login", "gpu03"), ("a1,a2", "a1"), ("node7", "node7"), ("r[1,3]-n", "r1-n"),
     ("n[001-128]", "n001"), ("", None), ("[1-2]", None)],
)  # fmt: skip
def test_first_host(listed: str, first: str | None) -> None:
    assert first_host(listed) == first


@pytest.mark.parametrize("told", [without(SRUN, "SLURM_JOB_ID"), without(HAND, "MASTER_PORT")], ids=["srun", "by hand"])
@pytest.mark.parametrize("module", ["salient_ds.train"])
def test_the_command_ends_before_it_reads_the_run(tmp_path: Path, told: dict[str, str], module: str) -> None:
    """Also on processes other than the main one, and with the status of a wrong command."""
    environ = without(dict(os.environ), *GROUP) | told
    done = subprocess.run(
        [sys.executable, "-m", module, "no.yaml"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "MASTER_PORT" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_requeued_slurm_job_keeps_the_log_of_its_first_part() -> None:
    script = (Path(__file__).resolve().parents[3] / "launch" / "slurm.sbatch").read_text()
    options = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert "--requeue" not in options or "--open-mode=append" in options
    assert any(option.startswith("--output=") for option in options)
