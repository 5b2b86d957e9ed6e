"""The real launcher over ssh and pdsh, between two hosts: `deepspeed --hostfile hosts --module salient_ds.train`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.multinode.two_hosts import HOSTS, TwoHosts, missing, two_hosts

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
REASON = missing() or ("" if DEEPSPEED.is_file() else f"needs {DEEPSPEED}")
MARK = "SALIENT_TWO_HOSTS_MARK"

pytestmark = [pytest.mark.multinode, pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(900)]


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> Path:
    """A working directory that both hosts see: run file, hostfile, environment file."""
    run = {
        "output_dir": "run",
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 6, "alpha": 12, "init_std": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "method": {"name": "salientlora", "target_rank": 2, "initial_warmup": 2, "final_warmup": 3,
                   "window_initial": 3, "window_final": 6},
        "data": {"train": str(tiny_alpaca), "max_length": 128},
        "train": {"max_steps": 16, "global_batch_size": 8, "micro_batch_size": 2, "lr": 0.01, "precision": "fp32",
                  "timeout_minutes": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    settings = {MARK: "arrived", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    return tmp_path


def environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    return env | {"PYTHONPATH": str(ROOT), "PATH": f"{DEEPSPEED.parent}{os.pathsep}{env['PATH']}"}


def over_ssh(hosts: TwoHosts, workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (
        f"{DEEPSPEED} --hostfile hosts --master_addr 10.77.0.1 --master_port 29611 "
        f"--module salient_ds.train run.yaml {' '.join(arguments)}"
    )
    return hosts.run(command, cwd=workplace, env=environment())


def on_one_host(workplace: Path, *arguments: str) -> None:
    """The same training by two processes of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(DEEPSPEED), "--num_accelerators", "2", "--master_port", str(port), "--module", "salient_ds.train",
               "run.yaml", *arguments]  # fmt: skip
    env = environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def decisions(run: Path) -> list[tuple[int, int, str]]:
    lines = (run / "allocations.jsonl").read_text().splitlines()
    return [(row["step"], row["total_rank"], row["digest"]) for row in map(json.loads, lines)]


def environments_of(hosts: TwoHosts, index: int) -> Iterator[dict[str, str]]:
    """The environment of every training process that runs on a host now."""
    for pid in hosts.pids(index):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:  # it has ended since
            continue
        if "salient_ds.train" in command and "--local_rank" in command:
            yield dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Watcher(threading.Thread):
    """Looks at the training processes of both hosts until it is told to stop."""

    def __init__(self, hosts: TwoHosts) -> None:
        super().__init__(daemon=True)
        self.hosts = hosts
        self.seen: list[dict[str, str]] = [{}, {}]
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            for index in range(2):
                for found in environments_of(self.hosts, index):
                    self.seen[index] = found

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        self.join()


def test_two_hosts_train_as_one_does(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts, Watcher(hosts) as watcher:
        done = over_ssh(hosts, workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    for index, host in enumerate(HOSTS):
        assert watcher.seen[index].get(MARK) == "arrived", f"{MARK} did not reach {host}"
        assert watcher.seen[index]["GLOO_SOCKET_IFNAME"] == "eth0"
        assert watcher.seen[index]["RANK"] == str(index)

    on_one_host(workplace, "output_dir=alone")
    assert decisions(workplace / "run"), "no event took place"
    assert decisions(workplace / "run") == decisions(workplace / "alone")
    name = "adapter_model.safetensors"
    together, alone = (load_file(workplace / run / "adapter" / name) for run in ("run", "alone"))
    assert together.keys() == alone.keys()
    assert all(together[key].equal(alone[key]) for key in together)


def test_an_output_directory_that_is_not_shared_is_refused(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with two_hosts(tmp_path_factory.mktemp("hosts"), private_on_second=workplace / "run") as hosts:
        done = over_ssh(hosts, workplace)
    assert done.returncode != 0
    assert "is not on a file system that all nodes share" in done.stderr + done.stdout
    assert not (workplace / "run" / "adapter").exists()

    on_one_host(workplace)  # what the refused run left behind is in nobody's way
    assert (workplace / "run" / "adapter" / "adapter_model.safetensors").is_file()
