"""Runs one request in processes of its own and brings back its result or the reason why there is none. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


class ArmFailed(RuntimeError):
    """The processes of an arm ended without a result; the message says why in one line."""


def run_worker(
    request: dict[str, Any], gpus: int, launcher: bool, cpu: bool, timeout: float, log: Path
) -> dict[str, Any]:
    """Start the worker, wait for it, and read what it wrote.

    Args:
        request: what worker.py understands.
        gpus: processes; with ``launcher`` (always for more than one) DeepSpeed's launcher starts them.
        cpu: keep DeepSpeed off any GPU.
        timeout: seconds after which all its processes are ended.
        log: file that their output is added to.

    Returns:
        The result plus ``exit_status`` (not 0, or None after the time limit, if only taking leave went wrong).

    Raises:
        ArmFailed: non-zero exit, no result, or time out.
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
    """A process in a session of its own, which is gone with all its children when the block ends."""
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
    """End every process of the session that ``process`` leads: ask, wait a little, insist."""
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
    process.poll()  # collect the leader, so that it does not count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
