"""What one node says of itself, as JSON on its standard output. It runs on every node; imports no torch.

``python -m salient_ds.doctor.facts --folder DIR --token TEXT --port N HOST ...``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from salient_ds.host import installed_version, is_taken

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "salient-ds")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def facts(folder: Path, token: str, port: int, hosts: list[str], wait: float = 10.0) -> dict[str, Any]:
    """Facts of this node.

    Args:
        folder: a directory that should be shared; it holds a file ``token`` with ``token`` in it.
        port: where the processes of a run will meet.
        hosts: names of all nodes.
        wait: seconds until a file that another node wrote must be visible.
    """
    return {
        "time": time.time(),
        "hostname": socket.gethostname(),
        "versions": {"Python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
        "python": sys.executable,
        "gpus": gpus(),
        "interfaces": interfaces(),
        "environment": {name: os.environ[name] for name in (*INTERFACES, "DS_ACCELERATOR") if name in os.environ},
        "addresses": {name: address(name) for name in dict.fromkeys([socket.gethostname(), *hosts])},
        "shared": _shared(folder, token, wait),
        "port_taken": is_taken(port),
    }


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver lists: name, driver version, total and used memory in MiB, utilisation in percent."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "name,driver_version,memory.total,memory.used,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, driver, total, used, busy = (part.strip() for part in line.split(","))
        numbers = [int(text) if text.isdigit() else 0 for text in (total, used, busy)]
        found.append({"name": name, "driver": driver, "total": numbers[0], "used": numbers[1], "busy": numbers[2]})
    return found


def interfaces() -> dict[str, list[str]]:
    """IP addresses of every network interface that is up."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def address(host: str) -> str | None:
    """The first IP address that this node finds for a name; None if it finds none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _shared(folder: Path, token: str, wait: float) -> bool:
    """Whether this node sees the token. It leaves a file of its own, for the node that asks."""
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            if (folder / "token").read_text() == token:
                (folder / f"seen-{socket.gethostname()}-{os.getpid()}").write_text(token)
                return True
        except OSError:
            pass
        time.sleep(0.2)  # network file systems show new files late
    return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("hosts", nargs="*")
    asked = parser.parse_args()
    print(json.dumps(facts(asked.folder, asked.token, asked.port, asked.hosts)))


if __name__ == "__main__":
    main()
