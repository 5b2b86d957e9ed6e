"""Run a function on several gloo processes and bring the results back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
        SALIENT_DEEPSPEED_LOG="error",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from salient_ds.zero.environment import start, stop

    start(timeout_minutes=3)
    from deepspeed.accelerator import get_accelerator

    # CPUs without AVX512-FP16 report fp16 as unsupported although the arithmetic works.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    try:
        # plain bytes: tensors sent through the queue die with the sender
        out.put((rank, True, pickle.dumps(function(rank, world, *args))))
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
        out.close()
        out.join_thread()
        os._exit(1)
    stop()


@cache
def _context() -> Any:
    """Fresh processes: forked from a server that has the imports done, which takes ten seconds each time otherwise.

    With GPUs every process starts from nothing, because CUDA does not survive a fork. (Forked processes share their
    hash seed: that a set's order tells processes apart is for tests/launcher to find.)
    """
    if os.environ.get("SALIENT_TEST_GPU"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    path = os.environ.get("PYTHONPATH")  # the server does not get sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return context


def spawn(world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """``function(rank, world, *args)`` on ``world`` processes; results by rank.

    Raises:
        AssertionError: with the tracebacks of the processes that failed, died or hung.
    """
    context = _context()
    out = context.Queue()
    port = free_port()
    processes = [context.Process(target=_child, args=(r, world, port, function, args, out)) for r in range(world)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(failures) < world and time.monotonic() < deadline:
        try:
            rank, ok, value = out.get(timeout=1)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in failures]
            failures.update({r: f"exit code {processes[r].exitcode}" for r in dead if r not in results})
        else:
            if ok:
                results[rank] = pickle.loads(value)
            else:
                failures[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + 8)
    for rank, process in enumerate(processes):
        process.join(30)
        if process.is_alive():
            process.kill()
            failures.setdefault(rank, "still running at the deadline")
    assert not failures, "\n".join(f"process {r}: {text}" for r, text in sorted(failures.items()))
    return [results[r] for r in range(world)]


def spawn_apart(function: Callable[..., Any], *groups: Sequence[Any]) -> list[Any]:
    """``function(0, 1, *group)`` for every group of arguments at the same time, each in a process of its own."""
    _context()
    with ThreadPoolExecutor(len(groups)) as pool:
        return [result for (result,) in pool.map(lambda group: spawn(1, function, *group, timeout=560), groups)]


def forked_process(function: Callable[..., None], *args: Any, output: Path) -> Any:
    """A started process that calls ``function(*args)``, and whose standard streams go to ``output``."""
    process = _context().Process(target=_printing, args=(function, args, output))
    process.start()
    return process


def forked(function: Callable[..., None], *args: Any, output: Path, timeout: float = 240) -> int:
    """Exit status of ``function(*args)`` in a process of its own, whose standard streams go to ``output``."""
    process = forked_process(function, *args, output=output)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {timeout:g} s:\n{output.read_text()}")
    assert process.exitcode is not None
    return int(process.exitcode)


def _printing(function: Callable[..., None], args: tuple[Any, ...], output: Path) -> None:
    with open(output, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*args)
