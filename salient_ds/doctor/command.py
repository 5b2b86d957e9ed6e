"""Body of ``salient-ds doctor``."""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from salient_ds.doctor.judge import Findings, Node, judge, slow_nodes
from salient_ds.doctor.nodes import Answer, Host, ask_all, read_hostfile

ALL_PAIRS = 8
"""Up to so many nodes, every pair is measured; of more, neighbours in the hostfile."""


def doctor(hostfile: str | None, shared: str, port: int, pairs: bool) -> int:
    """Look at all nodes and print what is wrong.

    Args:
        hostfile: path of a hostfile; None: this machine alone.
        shared: a directory that all nodes should share.
        port: where the processes will meet.
        pairs: measure an all-reduce between pairs of nodes.

    Returns:
        0 if there is nothing wrong, else 1.

    Raises:
        HostfileError, OSError: the hostfile cannot be read, or the shared directory cannot be written to.
    """
    hosts = [Host("")] if hostfile is None else read_hostfile(Path(hostfile))
    place = Path(shared).expanduser().resolve() / f".salient-doctor-{secrets.token_hex(4)}"
    place.mkdir(parents=True)
    try:
        nodes, found = _look(hosts, place, port)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for node in nodes:
        print(_line(node), flush=True)
    if pairs and len(nodes) > 1:
        _measure(nodes, hosts, port, found)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    if not found.problems:
        print(f"nothing wrong on {len(nodes)} node{'s' if len(nodes) > 1 else ''}")
    return 1 if found.problems else 0


def _look(hosts: list[Host], place: Path, port: int) -> tuple[list[Node], Findings]:
    """Facts of the nodes that answer, and what they tell."""
    token = secrets.token_hex(8)
    (place / "token").write_text(token)
    names = [host.name.rpartition("@")[2] for host in hosts if host.name]
    arguments = ["--folder", str(place), "--token", token, "--port", str(port), *names]
    answers = ask_all(hosts, "salient_ds.doctor.facts", [arguments] * len(hosts))
    nodes, silent = [], []
    for host, answer in zip(hosts, answers, strict=True):
        name = host.name or socket.gethostname()
        if answer.problem is not None:
            silent.append(f"{name}: {answer.problem}")
        else:
            nodes.append(Node(name, host.slots, answer.value, _clock(answer)))
    found = judge(nodes, str(place.parent), port)
    found.problems[:0] = silent
    return nodes, found


def _clock(answer: Answer) -> float:
    """Seconds by which a node's clock is surely ahead of or behind this machine's."""
    there = float(answer.value["time"])
    return there - min(max(there, answer.began), answer.ended)


def _line(node: Node) -> str:
    facts = node.facts
    gpus = facts["gpus"]
    free = min((gpu["total"] - gpu["used"] for gpu in gpus), default=0) / 1024
    shown = f"{len(gpus)} x {gpus[0]['name']}, {free:.0f} GiB free or more" if gpus else "no GPU"
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "deepspeed", "salient-ds"))
    addresses = [f"{name} {found[0]}" for name, found in facts["interfaces"].items() if found and name != "lo"]
    return f"{node.name}: {shown}; {versions}; {', '.join(addresses) or 'no network'}"


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Pairs of nodes to measure, in rounds in which no node is in two pairs."""
    if count > ALL_PAIRS:
        yield [(k, k + 1) for k in range(0, count - 1, 2)]
        yield [(k, k + 1) for k in range(1, count - 1, 2)]
        return
    ring = list(range(count + count % 2))  # the last one is nobody if the count is odd
    for _ in range(len(ring) - 1):
        facing = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if max(a, b) < count]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _measure(nodes: list[Node], hosts: list[Host], port: int, found: Findings) -> None:
    """All-reduces between pairs of nodes with which nothing is wrong so far."""
    sound = [node for node in nodes if not any(text.startswith(f"{node.name}:") for text in found.problems)]
    if len(sound) < len(nodes):
        found.notes.append("no all-reduce was measured with nodes that have a problem: mend that first")
    by_name = {host.name: host for host in hosts}
    rates: dict[tuple[str, str], float] = {}
    for pairs in rounds(len(sound)):
        asked: list[tuple[Host, list[str]]] = []
        for first, second in pairs:
            main = sound[first].name.rpartition("@")[2]
            address = sound[second].facts["addresses"].get(main) or main
            for rank, index in enumerate((first, second)):
                asked.append((by_name[sound[index].name], [str(rank), address, str(port)]))
        answers = ask_all([host for host, _ in asked], "salient_ds.doctor.pair", [words for _, words in asked])
        for (first, second), two in zip(pairs, zip(answers[::2], answers[1::2], strict=True), strict=True):
            names = sound[first].name, sound[second].name
            problem = next((p for p in (a.problem or a.value.get("problem") for a in two) if p), None)
            if problem is not None:
                found.problems.append(f"{names[0]} and {names[1]}: {problem}")
                continue
            rates[names] = min(float(answer.value["rate"]) for answer in two)
            backend = two[0].value["backend"]
            print(f"{names[0]} and {names[1]}: all-reduce at {rates[names] / 1e9:.3g} GB/s ({backend})", flush=True)
    found.problems += slow_nodes(rates)
