"""Reaches the nodes of a hostfile over ssh, as DeepSpeed's launcher does, and runs small programs there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salient_ds.strict import Reported

SECONDS = 60
"""How long one program may take on a node."""
ENVIRONMENT_FILE = ".deepspeed_env"
_PASSED_ON = ("PYTHON", "NCCL", "UCX")
"""How variables begin that DeepSpeed's launcher passes on."""
_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]


class HostfileError(ValueError, Reported):
    """A hostfile cannot be read. The message names the line."""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile, or this machine (``name`` is empty then)."""

    name: str
    slots: int | None = None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in their order.

    Raises:
        HostfileError: a line is not ``HOST slots=N``, a host is there twice, or there is none.
        OSError: the file cannot be read.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d{1,4})", text)
        if found is None or found[1].startswith("-"):
            raise HostfileError(f"{path}, line {number}: {text[:80]!r} is not of the form 'HOST slots=NUMBER'")
        if found[1] in hosts:
            raise HostfileError(f"{path}, line {number}: {found[1]} is there twice: give each node one line")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise HostfileError(f"{path} names no host: write one 'HOST slots=NUMBER' a line")
    return list(hosts.values())


@dataclass(frozen=True)
class Answer:
    """What a program on a node came to."""

    value: Any = None
    problem: str | None = None
    began: float = 0.0
    ended: float = 0.0
    """Time of this machine when it was started and when it had answered."""


def ask(host: Host, module: str, arguments: Sequence[str], seconds: float = SECONDS) -> Answer:
    """Run ``python -m MODULE ARGUMENTS`` on a node, and read the JSON in the last line that it prints."""
    inner = [sys.executable, "-m", module, *arguments]
    command = inner if not host.name else [*_SSH, host.name, _script(inner)]
    began = time.time()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
            env=_local_environment() if not host.name else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(problem=f"it gave no answer within {seconds:.0f} s", began=began, ended=time.time())
    except OSError as error:
        return Answer(problem=f"{command[0]} cannot be started here ({error.strerror})")
    ended = time.time()
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
    if host.name and done.returncode == 255:
        return Answer(problem=f"ssh does not get in ({said}): it has to work without a password, from this machine")
    try:
        return Answer(json.loads(done.stdout.strip().splitlines()[-1]), began=began, ended=ended)
    except (ValueError, IndexError):
        where = f"{sys.executable} -m {module}"
        return Answer(problem=f"{where} failed there ({said}): all nodes need the same Python environment and paths")


def ask_all(hosts: Sequence[Host], module: str, arguments: Sequence[Sequence[str]]) -> list[Answer]:
    """:func:`ask` on all hosts at once, each with its own arguments."""
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64) or 1) as pool:
        return list(pool.map(lambda pair: ask(pair[0], module, pair[1]), zip(hosts, arguments, strict=True)))


def _script(inner: list[str]) -> str:
    """What the shell of a node runs: the same folder and variables as under DeepSpeed's launcher."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables().items()]
    return "; ".join([*exports, f"cd {shlex.quote(str(Path.cwd()))}", f"exec {shlex.join(inner)}"])


def _local_environment() -> dict[str, str]:
    return os.environ | variables()


def variables() -> dict[str, str]:
    """The variables that training processes get on every node."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    found["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    for folder in (Path.home(), Path.cwd()):
        if (folder / ENVIRONMENT_FILE).is_file():
            for line in (folder / ENVIRONMENT_FILE).read_text().splitlines():
                name, sign, value = line.partition("=")
                if sign and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                    found[name] = value
    return found
