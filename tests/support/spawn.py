"""Run a function on several gloo processes and bring the results back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


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


def spawn(world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """``function(rank, world, *args)`` on ``world`` processes; results by rank.

    Raises:
        AssertionError: with the tracebacks of the processes that failed, died or hung.
    """
    context = multiprocessing.get_context("spawn")
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
