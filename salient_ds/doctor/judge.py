"""What is wrong with nodes, from the facts that they gave. Pure: no files, no network."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from salient_ds.doctor.facts import INTERFACES

CLOCK_SECONDS = 5.0
"""A clock that is off by more is noted. Training does not depend on it; logs and file times do."""
USED_SHARE = 0.05
"""Share of a GPU's memory that may be in use."""
SLOW_SHARE = 0.5
"""A node is slow if its fastest pair reaches less than this share of the median pair."""


@dataclass
class Findings:
    """Sentences about nodes, each beginning with the node's name."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Node:
    """A node as the hostfile names it, with its facts."""

    name: str
    slots: int | None
    """Processes that the hostfile wants there; None: there is no hostfile."""
    facts: Mapping[str, Any]
    clock: float = 0.0
    """Seconds by which its clock is ahead."""


def judge(nodes: list[Node], folder: str, port: int) -> Findings:
    """Compare the facts of all nodes that answered.

    Args:
        folder: the directory that should be shared.
        port: where the processes will meet, on the first node.
    """
    found = Findings()
    _alike(nodes, found)
    for node in nodes:
        _gpus(node, found)
        _names(node, nodes, found)
        if not node.facts["shared"]:
            found.problems.append(
                f"{node.name}: {folder} is not the directory that the first node sees: choose an output_dir on a file "
                "system that all nodes share (--shared DIR)"
            )
        if abs(node.clock) > CLOCK_SECONDS:
            found.notes.append(f"{node.name}: its clock is {node.clock:+.0f} s off (training does not mind, logs do)")
    if nodes and nodes[0].facts["port_taken"]:
        found.problems.append(
            f"{nodes[0].name}: port {port} is taken: end what listens there, or choose another with --master_port"
        )
    return found


def _alike(nodes: list[Node], found: Findings) -> None:
    """What most nodes have is right; of two nodes, the first."""
    for key in nodes[0].facts["versions"] if nodes else []:
        _odd_ones(nodes, {node.name: str(node.facts["versions"].get(key)) for node in nodes}, key, found.problems)
    for what, part in (("GPU", "name"), ("driver", "driver")):
        kinds = {node.name: node.facts["gpus"][0][part] for node in nodes if node.facts["gpus"]}
        _odd_ones(nodes, kinds, what, found.notes)
    counts = {node.name: "GPUs" if node.facts["gpus"] else "no GPU" for node in nodes}
    _odd_ones(nodes, counts, "accelerator", found.problems)


def _odd_ones(nodes: list[Node], values: dict[str, str], what: str, sentences: list[str]) -> None:
    if len(set(values.values())) < 2:
        return
    counts = Counter(values.values())
    most = max(counts.values())
    usual = next(values[node.name] for node in nodes if node.name in values and counts[values[node.name]] == most)
    example = next(name for name, value in values.items() if value == usual)
    for name, value in values.items():
        if value != usual:
            sentences.append(f"{name}: {what} is {value}, and {usual} on {example}: give all nodes the same")


def _gpus(node: Node, found: Findings) -> None:
    gpus = node.facts["gpus"]
    cpu = node.facts["environment"].get("DS_ACCELERATOR") == "cpu"
    if gpus and not cpu and node.slots is not None and len(gpus) < node.slots:
        found.problems.append(f"{node.name}: it has {len(gpus)} GPUs, and the hostfile says slots={node.slots}")
    for index, gpu in enumerate([] if cpu else gpus):
        if gpu["total"] and gpu["used"] > USED_SHARE * gpu["total"]:
            found.problems.append(
                f"{node.name}: GPU {index} is in use ({gpu['used'] / 1024:.1f} of {gpu['total'] / 1024:.1f} GiB): "
                "nvidia-smi shows by which process"
            )


def _names(node: Node, nodes: list[Node], found: Findings) -> None:
    """Interfaces by name, and what host names mean here."""
    interfaces, environment = node.facts["interfaces"], node.facts["environment"]
    outside = [name for name, addresses in interfaces.items() if any(map(_reaches_others, addresses))]
    for variable in INTERFACES:
        wanted = environment.get(variable, "").lstrip("=^")
        exact = wanted and not environment[variable].startswith("^")
        names = [part.partition(":")[0] for part in wanted.split(",")] if exact else []
        if names and not any(name.startswith(part) for name in interfaces for part in names):
            found.problems.append(
                f"{node.name}: {variable}={environment[variable]} names no interface there (it has "
                f"{', '.join(outside) or 'none that reaches others'}): correct it in .deepspeed_env"
            )
    if len(nodes) < 2:
        return
    own = node.facts["addresses"].get(node.facts["hostname"])
    gloo = not node.facts["gpus"] or environment.get("DS_ACCELERATOR") == "cpu"
    if (own is None or not _reaches_others(own)) and gloo and "GLOO_SOCKET_IFNAME" not in environment:
        found.problems.append(
            f"{node.name}: its name {node.facts['hostname']} means {own or 'nothing'} there (/etc/hosts), so that gloo "
            f"would tell the others an address that they cannot reach: put GLOO_SOCKET_IFNAME={_first(outside)} into "
            ".deepspeed_env, or correct /etc/hosts"
        )
    main = nodes[0].name.rpartition("@")[2]
    if node is not nodes[0]:
        there = node.facts["addresses"].get(main)
        if there is None or not _reaches_others(there):
            found.problems.append(
                f"{node.name}: {main} means {there or 'nothing'} there: give --master_addr an address"
            )


def _first(names: list[str]) -> str:
    return names[0] if names else "INTERFACE"


def _reaches_others(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_link_local)


def slow_nodes(rates: Mapping[tuple[str, str], float]) -> list[str]:
    """Sentences about nodes whose pairs are all slower than others.

    Args:
        rates: bytes per second by pair of nodes.
    """
    if len(rates) < 3:
        return []
    median = sorted(rates.values())[len(rates) // 2]
    names = dict.fromkeys(name for pair in rates for name in pair)
    best = {name: max(rate for pair, rate in rates.items() if name in pair) for name in names}
    return [
        f"{name}: its fastest pair moves {best[name] / 1e9:.3g} GB/s, the median pair {median / 1e9:.3g} GB/s: look at "
        "its network card and cable"
        for name in names
        if best[name] < SLOW_SHARE * median
    ]
