"""Groups that cannot begin: one sentence with the way out on each process that notices, and no traceback."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from salient_ds.run.exits import RUN_ERROR
from tests.launcher import runs
from tests.support.spawn import forked, forked_process

TAKEN = "of this machine is taken, so that the processes cannot meet there: choose another one"

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("rank", "variables", "expected"),
    [
        (0, {}, TAKEN),
        (0, {"GLOO_SOCKET_IFNAME": "eth7"}, "GLOO_SOCKET_IFNAME=eth7"),
        (1, {"MASTER_ADDR": "no-such-host.invalid"}, "does not know the address no-such-host.invalid"),
        (1, {}, "could not join the others at 127.0.0.1:"),
    ],
)
def test_one_sentence(
    rank: int, variables: dict[str, str], expected: str, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca, train={"timeout_minutes": 0.1})
    output = tmp_path / "output"
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        if expected != TAKEN:
            taken.close()
        other = forked_process(member, run, 1 - rank, port, variables, output=tmp_path / "other")
        if "GLOO_SOCKET_IFNAME" not in variables:
            other.kill()
        status = forked(member, run, rank, port, variables, output=output)
        other.join(60)
    text = output.read_text()
    assert status == RUN_ERROR, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and expected in errors[0], text
    assert "Traceback" not in text and len(text.splitlines()) < 8, text


def member(run: Path, rank: int, port: int, variables: dict[str, str]) -> None:
    """One of two processes, with more variables."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    os.environ.update(variables)
    runs.train(run, ())
