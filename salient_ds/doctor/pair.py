"""One of two processes that measure an all-reduce between two nodes; prints JSON.

``python -m salient_ds.doctor.pair RANK ADDRESS PORT``
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

MIB = 2**20
SIZES = {"nccl": 256 * MIB, "gloo": 16 * MIB}
"""Bytes of one all-reduce."""
ROUNDS, SECONDS = 5, 40


def measure(rank: int, address: str, port: int) -> dict[str, float | str]:
    """Take part in the all-reduces, and return the bytes per second that one process sends."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=SECONDS))
    data = torch.ones(SIZES[backend] // 4, device="cuda" if backend == "nccl" else "cpu")
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        dist.all_reduce(data)
        data.fill_(1.0)
        float(data[0])  # wait for the device
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return {"backend": backend, "rate": SIZES[backend] / min(times[1:])}


def main() -> None:
    from salient_ds.run.collective_errors import unable_to_join

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rank, address, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        print(json.dumps(measure(rank, address, port)), flush=True)
    except (RuntimeError, OSError, ValueError) as error:
        print(json.dumps({"problem": unable_to_join(error, os.environ)}), flush=True)
    os._exit(0)  # a group that failed may wait in its destructor


if __name__ == "__main__":
    main()
