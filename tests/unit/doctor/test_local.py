"""``salient-ds doctor`` on this machine alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from salient_ds.doctor import nodes
from salient_ds.doctor.command import doctor
from salient_ds.doctor.nodes import Host, ask


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor(None, str(tmp_path), port, pairs=True) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {socket.gethostname()}: port {port} is taken")
    assert "; torch " in said.out and list(tmp_path.iterdir()) == []


def test_a_program_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(Host(""), "salient_ds.no_such_module", [])
    assert answer.problem is not None and "No module named salient_ds.no_such_module" in answer.problem
    monkeypatch.setattr(nodes, "_SSH", ["no-such-ssh"])
    assert ask(Host("node1"), "salient_ds.doctor.facts", []).problem == (
        "no-such-ssh cannot be started here (No such file or directory)"
    )
    monkeypatch.setattr(nodes, "_SSH", ["sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255"])
    problem = ask(Host("node1"), "salient_ds.doctor.facts", []).problem
    assert problem is not None and problem.startswith("ssh does not get in (Permission denied (publickey).)")


def test_variables_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_SECRET", "1")
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n\nnot a variable\n")
    found = nodes.variables()
    assert found["NCCL_DEBUG"] == "INFO" and found["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "MY_SECRET" not in found and found["PYTHONPATH"].startswith(str(tmp_path))
