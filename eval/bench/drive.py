"""Run one request in separate processes, and return its result or the reason why there is none. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salient_ds.host import free_port

WORKER = Path(__file__).with_name("worker.py")


class ArmFailed(RuntimeError):
    """The processes of an arm ended without a result. The message gives the reason in one line."""


def run_worker(
    request: dict[str, Any], gpus: int, launcher: bool, cpu: bool, timeout: float, log: Path
) -> dict[str, Any]:
    """Start the worker, wait for it, and read its result.

    Args:
        request: a request that worker.py understands.
        gpus: number of processes.
        launcher: start them with DeepSpeed's launcher. More than one process is always started with it.
        cpu: make DeepSpeed use the CPU.
        timeout: seconds after which all processes are ended.
        log: file to which the output of the processes is appended.

    Returns:
        The result plus ``exit_status``. The status is not 0 if the processes failed after they had written the result,
        and None if they did not end in time.

    Raises:
        ArmFailed: the worker reported an error, or it ended or timed out without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder, "spec.json"), Path(folder, "result.json")
        spec.write_text(json.dumps(request))
        start = [sys.executable]
        if launcher or gpus > 1:
            start += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus), "--master_port", str(free_port())]
            start += ["--no_local_rank"]
        with open(log, "ab") as out, started([*start, str(WORKER), str(spec), str(result)], cpu, out) as process:
            try:
                status: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
        found = json.loads(result.read_text()) if result.exists() and result.stat().st_size else {}
    if "error" in found:
        raise ArmFailed(found["error"])
    if not found and status is None:
        raise ArmFailed(f"took longer than {timeout:g} s (--timeout) and was ended")
    if not found:
        raise ArmFailed(f"exit status {status} without a result")
    return {**found, "exit_status": status}


@contextlib.contextmanager
def started(command: list[str], cpu: bool, out: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own. When the block ends, the process and all its children are ended."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    if cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        end_session(process)


def end_session(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """End every process of the session that ``process`` leads: SIGTERM first, SIGKILL after ``patience`` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and group_alive(process):
            time.sleep(0.1)
    process.wait()


def group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader, otherwise it still counts as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
