"""A worker that torchrun has started again joins with keys of its own attempt."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch

from salient_ds.zero import environment


@pytest.mark.parametrize(("count", "prefix"), [(None, "salient/attempt-0"), ("2", "salient/attempt-2")])
def test_keys_belong_to_the_attempt(count: str | None, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    described = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "3"}
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    if count is None:
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **settings: given.update(settings))
    environment._join_this_attempt("gloo", datetime.timedelta(seconds=20))
    assert (given["rank"], given["world_size"]) == (1, 3)
    given["store"].set("here", "yes")
    assert server.get(f"{prefix}/here") == b"yes"


def test_only_workers_of_torchrun_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(backend: str, limit: Any) -> None:
        raise InterruptedError

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)  # start() would set them for good
    monkeypatch.setattr(environment, "_join_this_attempt", joined)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(InterruptedError):
        environment.start(1.0)
