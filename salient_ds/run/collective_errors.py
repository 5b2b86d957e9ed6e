"""Errors of torch's process groups in one sentence: what happened, and the way out."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SIGNS = re.compile(
    r"gloo|nccl|c10d|TCPStore|connection (?:closed|reset|refused)|timed out|socket|broken pipe|rendezvous",
    re.IGNORECASE,
)
_NOISE = re.compile(r"\[[^\]]*(?:/|\.cc:|\.cpp:)[^\]]*\]\s*|Exception raised from.*|frame #.*", re.DOTALL)
_FRAMES = re.compile(r"frame #|<omitting python|Exception raised from|\[[EW]\d{4} [^\]]*\] \[c10d\]|\s*$")
_SHOWN = 200
"""Characters of a library's own message."""


def in_collective(error: BaseException) -> str | None:
    """The core of a message, if the error comes from a process group; None if it is of another kind."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not (
        type(error).__name__.startswith("Dist") or _SIGNS.search(text.partition("\n")[0])
    ):
        return None
    return _core(text)


def unable_to_join(error: BaseException, environ: Mapping[str, str]) -> str:
    """Why a process cannot join its group, as a sentence with the way out.

    Args:
        environ: its environment, with where the processes should meet.
    """
    text, core = str(error), _core(str(error))
    address, port = environ.get("MASTER_ADDR", "?"), environ.get("MASTER_PORT", "?")
    who = f"process {environ.get('RANK', '0')} of {environ.get('WORLD_SIZE', '1')}"
    if re.search("address already in use|EADDRINUSE", text, re.IGNORECASE):
        return (
            f"port {port} of this machine is taken, so that the processes cannot meet there: choose another one "
            f"(deepspeed --master_port, torchrun --master_port, MASTER_PORT)"
        )
    if re.search("unable to find (?:address|interface)|could not resolve|no socket interface", text, re.IGNORECASE):
        named = {k: v for k, v in environ.items() if k in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        shown = ", ".join(f"{key}={value}" for key, value in named.items()) or "GLOO_SOCKET_IFNAME is not set"
        return (
            f"{who} finds no network interface for its connections ({shown}; {core}): set GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the one that reaches the other nodes (ip addr), on every node"
        )
    if re.search(r"127\.0\.1\.|connectFullMesh|full mesh", text, re.IGNORECASE):
        return (
            f"{who} cannot connect to the others ({core}): if this node's name is 127.0.1.1 in /etc/hosts, or it has "
            "several interfaces, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the one that reaches the other nodes "
            "(ip addr), on every node"
        )
    if not _known(address):
        return (
            f"{who} does not know the address {address}: give --master_addr (MASTER_ADDR) a name that all nodes resolve"
        )
    return (
        f"{who} could not join the others at {address}:{port} ({core}): look whether all processes were started, with "
        "the same MASTER_ADDR and MASTER_PORT, and whether a firewall lets them through (salient-ds doctor --hostfile "
        "FILE looks)"
    )


def _known(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True


@contextmanager
def without_frames() -> Iterator[None]:
    """Leave out what torch's C++ code prints to stderr about failed connections: 20 lines of addresses for each.

    Everything else that is printed meanwhile comes out at the end.
    """
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            kept.seek(0)
            for line in kept.read().decode(errors="replace").splitlines():
                if not _FRAMES.match(line):
                    print(line, file=sys.stderr, flush=True)


def _core(text: str) -> str:
    """A library's message without places in its source, in one line."""
    kept = " ".join(_NOISE.sub("", text).split())
    return kept[:_SHOWN].rstrip(" .:,") or "no message"
