"""``salient-ds doctor`` between two hosts over ssh: what is wrong with which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multinode.two_hosts import HOSTS, TwoHosts, missing, two_hosts

ROOT = Path(__file__).resolve().parents[2]
REASON = missing()

pytestmark = [pytest.mark.multinode, pytest.mark.skipif(bool(REASON), reason=str(REASON)), pytest.mark.timeout(600)]


def doctor(hosts: TwoHosts, workplace: Path, *options: str, before: str = "true") -> subprocess.CompletedProcess[str]:
    (workplace / "hosts").write_text("# nodes\n\n" + "".join(f"{host} slots=1\n" for host in HOSTS))
    env = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "GLOO_SOCKET_IFNAME")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "COLUMNS": "200"}
    command = f"{before}; {sys.executable} -m salient_ds.cli doctor --hostfile hosts {' '.join(options)}"
    return hosts.run(command, cwd=workplace, env=env)


def settings(workplace: Path, **variables: str) -> None:
    text = "".join(f"{name}={value}\n" for name, value in {"OMP_NUM_THREADS": "1", **variables}.items())
    (workplace / ".deepspeed_env").write_text(text)


def test_sound_hosts_and_one_that_is_not(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings(tmp_path, GLOO_SOCKET_IFNAME="eth0")
    private = tmp_path / "private"
    private.mkdir()
    with two_hosts(tmp_path_factory.mktemp("hosts"), private_on_second=private) as hosts:
        done = doctor(hosts, tmp_path, "--master-port", "29655")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nodea and nodeb: all-reduce at " in done.stdout and "nothing wrong on 2 nodes" in done.stdout
        assert "nodea: no GPU; torch" in done.stdout and "eth0 10.77.0.2" in done.stdout

        done = doctor(hosts, tmp_path, "--shared", "private")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: nodeb: {private} is not the directory that the first node sees")
        assert done.stderr.count("\n") == 1 and "all-reduce at" not in done.stdout

        (tmp_path / "listen.py").write_text(
            "import socket, time\ns = socket.create_server(('', 29655))\ntime.sleep(60)\n"
        )
        listen = f"{sys.executable} listen.py & sleep 1"
        done = doctor(hosts, tmp_path, "--master-port", "29655", "--no-pairs", before=listen)
        assert done.returncode == 1 and "error: nodea: port 29655 is taken" in done.stderr

        settings(tmp_path, GLOO_SOCKET_IFNAME="eth7")
        done = doctor(hosts, tmp_path, "--no-pairs")
        assert "error: nodeb: GLOO_SOCKET_IFNAME=eth7 names no interface there (it has eth0)" in done.stderr
        assert list(tmp_path.glob(".salient-doctor*")) == []


def test_names_of_debian(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings(tmp_path)
    with two_hosts(tmp_path_factory.mktemp("hosts"), debian=True) as hosts:
        done = doctor(hosts, tmp_path)
        assert done.returncode == 1
        for host in HOSTS:
            assert f"error: {host}: its name {host} means 127.0.1.1 there" in done.stderr
        assert "put GLOO_SOCKET_IFNAME=eth0 into .deepspeed_env" in done.stderr
        settings(tmp_path, GLOO_SOCKET_IFNAME="eth0")
        done = doctor(hosts, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
