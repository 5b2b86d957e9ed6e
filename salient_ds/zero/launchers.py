"""What launchers tell a process about its group, in their own environment variables. Imports no torch.

DeepSpeed's launcher and torchrun set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
MPI's and SLURM's set names of their own, which are translated here. A group that is described in part is refused:
otherwise each of its processes would train alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

_START = "start with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class _Names:
    """Variables of one launcher. Of several names, the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    """Equal for all processes of the group, and different in another one."""


_LAUNCHERS = (
    _Names("mpirun", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
           ("OMPI_COMM_WORLD_LOCAL_SIZE",), ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid")),
    _Names("mpirun", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",),
           ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    _Names("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",),
           job=("SLURM_JOB_ID", "SLURM_JOBID")),
    _Names("mpirun", ("PMI_RANK", "PMIX_RANK"), ("PMI_SIZE", "PMIX_SIZE"), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
           ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"), ("PMIX_NAMESPACE", "PMI_JOBID")),
)  # fmt: skip
"""Open MPI, MVAPICH, SLURM, MPICH and Intel MPI. SLURM comes before PMI, which it may offer besides."""


def describe_process(environ: MutableMapping[str, str], local_rank: int = -1) -> list[str]:
    """Set ``RANK`` and its companions from what the launcher told this process, and return what is wrong.

    Nothing is set if something is wrong, or if no launcher is found.

    Args:
        environ: the environment, changed in place.
        local_rank: number of this process on its node as an option of the command; -1: there was none.
    """
    if local_rank >= 0:
        environ.setdefault("LOCAL_RANK", str(local_rank))
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _described(environ)
    names = next((names for names in _LAUNCHERS if _first(environ, names.rank + names.size)), None)
    if names is None:
        return []
    try:
        found = _translated(environ, names)
    except _Refused as error:
        return [str(error)]
    environ.update({name: value for name, value in found.items() if name not in environ})
    return []


class _Refused(Exception):
    """Why a process cannot join its group."""


def _described(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with variables in the form of torchrun."""
    try:
        size = _number(environ, ("WORLD_SIZE",), least=1)
        rank = _number(environ, ("RANK",))
        if size is None or rank is None:
            there, lacks = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
            if environ[there] == ("0" if size is None else "1"):
                return []  # one process
            raise _Refused(f"{there}={environ[there]} is set and {lacks} is not: {_START}")
        if rank >= size:
            raise _Refused(f"RANK={rank} is not below WORLD_SIZE={size}: {_START}")
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if not environ.get(name)]
        if size > 1 and lacking:
            raise _Refused(
                f"WORLD_SIZE={size} and RANK={rank} describe several processes, but not how they find each other or "
                f"their devices: set {', '.join(lacking)} too, or start with deepspeed or torchrun"
            )
        _number(environ, ("LOCAL_RANK",))
        _number(environ, ("MASTER_PORT",), least=1, most=65535)
    except _Refused as error:
        return [str(error)]
    return []


def _translated(environ: Mapping[str, str], names: _Names) -> dict[str, str]:
    """The variables of torchrun, from those of another launcher; empty for a group of one process."""
    rank, size = _number(environ, names.rank), _number(environ, names.size, least=1)
    if size == 1 and not rank:
        return {}
    shown = _first(environ, names.size) or _first(environ, names.rank)
    if size is None or rank is None:
        lacks = names.size if size is None else names.rank
        raise _Refused(f"{shown} says that {names.launcher} started this process, but {lacks[0]} is not set: {_START}")
    if rank >= size:
        raise _Refused(f"{_first(environ, names.rank)} is not below {shown}: {_START}")
    if names.launcher == "srun" and "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        raise _Refused(
            f"{shown} says that {size} processes train together, but srun did not start this one: put srun before the "
            "command, or set RANK=0 and WORLD_SIZE=1 to train on this process alone"
        )
    local = _number(environ, (*names.local_rank, "LOCAL_RANK"))
    if local is None:
        raise _Refused(f"{shown} is set, but {names.local_rank[0]} is not: set LOCAL_RANK, or {_START}")
    found = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}
    found["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _address(environ, names, size) or ""
    found["MASTER_PORT"] = environ.get("MASTER_PORT") or _port(environ, names) or ""
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not found[name]]
    if lacking:
        how = "export MASTER_ADDR=node1 MASTER_PORT=29500; srun"
        if names.launcher == "mpirun":
            how = "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500"
        raise _Refused(
            f"{shown} says that {size} processes train together, but not where they meet: set {' and '.join(lacking)} "
            f"for all of them (address of the first node, a free port), as with: {how} ..."
        )
    _number(found, ("MASTER_PORT",), least=1, most=65535)
    return found


def _address(environ: Mapping[str, str], names: _Names, size: int) -> str | None:
    """The node of the first process, if the launcher tells it."""
    if _number(environ, names.local_size) == size:
        return "127.0.0.1"
    if names.launcher == "srun":
        if _number(environ, ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")) == 1:
            return "127.0.0.1"
        return first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "")
    return None


def first_host(listed: str) -> str | None:
    """The first host of a list as SLURM writes it (``gpu[03-05,09],login`` begins with ``gpu03``), or None."""
    found = re.match(r"([^\[\],\s]+)(?:\[([^\]\-,]+)[^\]]*\]([^\[\],\s]*))?(?=,|$)", listed)
    return None if found is None else found[1] + (found[2] or "") + (found[3] or "")


def _port(environ: Mapping[str, str], names: _Names) -> str | None:
    """A port that all processes of a job compute alike, and another job hardly ever."""
    job = _first(environ, names.job)
    if job is None:
        return None
    step = environ.get("SLURM_STEP_ID", "") if names.launcher == "srun" else ""
    return str(20000 + zlib.crc32(f"{job}.{step}".encode()) % 10000)


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of the variables that is set, as ``NAME=value``."""
    return next((f"{name}={environ[name]}" for name in names if environ.get(name)), None)


def _number(environ: Mapping[str, str], names: tuple[str, ...], least: int = 0, most: int = 10**7) -> int | None:
    """The value of the first of the variables that is set; None if none is.

    Raises:
        _Refused: it is no whole number between ``least`` and ``most``.
    """
    shown = _first(environ, names)
    if shown is None:
        return None
    value = shown.partition("=")[2].strip()
    if not (value.isascii() and value.isdigit() and len(value) < 9 and least <= int(value) <= most):
        raise _Refused(f"{shown[:60]} is no whole number from {least} to {most}: {_START}")
    return int(value)
