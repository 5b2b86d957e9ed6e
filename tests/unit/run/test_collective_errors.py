"""Errors of torch's process groups become one sentence. The messages are as torch 2.13 writes them, shortened."""

from __future__ import annotations

import os

import pytest
import torch

from salient_ds.run.collective_errors import in_collective, unable_to_join, without_frames

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [10.0.0.2]:8113: Connection reset by peer. "
    "This is typically caused by a remote worker hanging"
)
SLOW = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv operation"
)
ENVIRON = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def joining(text: str, **environ: str) -> str:
    found = unable_to_join(RuntimeError(text), ENVIRON | environ)
    assert "\n" not in found and len(found) < 600
    return found


def test_errors_of_collectives_are_told_from_others() -> None:
    assert in_collective(RuntimeError(GLOO)) is not None
    found = in_collective(RuntimeError(SLOW))
    assert found == "Timed out waiting 30000ms for recv operation"
    assert in_collective(torch.distributed.DistNetworkError("Broken pipe\nframe #0: x")) is not None
    assert in_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert in_collective(ValueError(GLOO)) is None


def test_a_taken_port() -> None:
    text = joining(
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use\nException raised from makeWithPort\nframe #0: c10"
    )
    assert text.startswith("port 29500 of this machine is taken") and "--master_port" in text and "frame" not in text


def test_an_interface_that_does_not_exist() -> None:
    text = joining(
        "[enforce fail at gloo/transport/tcp/device.cc:80] Unable to find interface for: ethX",
        GLOO_SOCKET_IFNAME="ethX",
    )
    assert "GLOO_SOCKET_IFNAME=ethX" in text and "(ip addr)" in text and "process 3 of 8" in text


def test_a_name_that_means_the_node_itself() -> None:
    text = joining("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error")
    assert "127.0.1.1" in text and "GLOO_SOCKET_IFNAME" in text


def test_an_unknown_name() -> None:
    text = joining("The client socket has timed out after 6000ms", MASTER_ADDR="no-such-host.invalid")
    assert "does not know the address no-such-host.invalid" in text


def test_frames_of_torch_are_left_out_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), without_frames():
        os.write(
            2, b"[E1126 20:47:30.97 socket.cpp:1028] [c10d] The client socket has timed out\nframe #0: c10 (0x7)\n"
        )
        os.write(2, b"Exception raised from throwTimeoutError\n\nNCCL WARN something\n")
        raise RuntimeError
    assert capfd.readouterr().err == "NCCL WARN something\n"


def test_anything_else_says_what_to_look_at() -> None:
    text = joining("The client socket has timed out after 60000ms while trying to connect to (node1, 29500).")
    assert "could not join the others at 127.0.0.1:29500" in text and "salient-ds doctor" in text
