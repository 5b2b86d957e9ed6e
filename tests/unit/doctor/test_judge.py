"""Which node is wrong, from facts that were made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from salient_ds.doctor.command import rounds
from salient_ds.doctor.judge import Node, judge, slow_nodes
from salient_ds.doctor.nodes import Host, HostfileError, read_hostfile

GPU = {"name": "H100", "driver": "570.1", "total": 81559, "used": 4, "busy": 0}
FACTS: dict[str, Any] = {
    "hostname": "n",
    "versions": {"Python": "3.11.7", "torch": "2.13.0"},
    "gpus": [GPU] * 2,
    "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]},
    "environment": {},
    "addresses": {"n": "10.0.0.1", "node0": "10.0.0.1"},
    "shared": True,
    "port_taken": False,
}


def nodes(count: int, changed: int | None = None, clock: float = 0.0, **changes: Any) -> list[Node]:
    """Equal nodes; facts of one of them are replaced."""
    found = []
    for index in range(count):
        facts = copy.deepcopy(FACTS)
        if index == changed:
            facts |= changes
        found.append(Node(f"node{index}", 2, facts, clock if index == changed else 0.0))
    return found


def problems(*arguments: Any, **changes: Any) -> list[str]:
    return judge(nodes(*arguments, **changes), "/shared", 29500).problems


CPU = {"gpus": [], "hostname": "n", "addresses": {"n": "127.0.1.1", "node0": "10.0.0.1"}}
CASES = [
    ({"versions": {"Python": "3.11.7", "torch": "2.11.0"}}, "torch is 2.11.0, and 2.13.0 on node0"),
    ({"gpus": [GPU]}, "it has 1 GPUs, and the hostfile says slots=2"),
    ({"gpus": [GPU, GPU | {"used": 70000}]}, "GPU 1 is in use (68.4 of 79.6 GiB)"),
    ({"gpus": []}, "accelerator is no GPU, and GPUs on node0"),
    ({"shared": False}, "/shared is not the directory that the first node sees"),
    ({"environment": {"NCCL_SOCKET_IFNAME": "=ib0"}}, "NCCL_SOCKET_IFNAME==ib0 names no interface there (it has eth0)"),
    ({"addresses": {"n": "10.0.0.1", "node0": "127.0.1.1"}}, "node0 means 127.0.1.1 there"),
    ({"addresses": {"n": "10.0.0.1", "node0": None}}, "node0 means nothing there"),
]


def test_equal_nodes_are_sound() -> None:
    assert problems(3) == []
    environment = {"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "^docker,lo"}
    assert problems(2, changed=1, environment=environment) == []


@pytest.mark.parametrize(("changes", "expected"), CASES)
def test_the_node_that_differs_is_named(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems(3, changed=2, **changes)
    assert problem.startswith("node2: ") and expected in problem


def test_the_odd_one_is_the_first_node() -> None:
    (problem,) = problems(3, changed=0, versions={"Python": "3.12.1", "torch": "2.13.0"})
    assert problem.startswith("node0: Python is 3.12.1, and 3.11.7 on node1")


def test_a_name_that_means_127_0_1_1_matters_for_gloo_alone() -> None:
    (problem,) = [p for p in problems(2, changed=1, **CPU) if "127.0.1.1" in p]
    assert problem.startswith("node1: its name n means 127.0.1.1") and "GLOO_SOCKET_IFNAME=eth0" in problem
    assert problems(2, changed=1, addresses=CPU["addresses"]) == []  # NCCL chooses interfaces itself


def test_a_taken_port_counts_on_the_first_node() -> None:
    assert problems(2, changed=0, port_taken=True)[0].startswith("node0: port 29500 is taken")
    assert problems(2, changed=1, port_taken=True) == []


def test_a_clock_is_a_note() -> None:
    found = judge(nodes(2, changed=1, clock=86400.0), "/shared", 29500)
    assert found.problems == [] and found.notes == [
        "node1: its clock is +86400 s off (training does not mind, logs do)"
    ]


def test_a_slow_node_is_told_from_slow_pairs() -> None:
    fast = {("a", "b"): 10e9, ("a", "c"): 9e9, ("b", "c"): 11e9}
    assert slow_nodes(fast) == []
    slow = fast | {("a", "d"): 1e9, ("b", "d"): 1.1e9, ("c", "d"): 0.9e9}
    (sentence,) = slow_nodes(slow)
    assert sentence.startswith("d: its fastest pair moves 1.1 GB/s")


@pytest.mark.parametrize("count", range(1, 9))
def test_every_pair_is_measured_once_and_no_node_twice_at_a_time(count: int) -> None:
    seen = []
    for pairs in rounds(count):
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
        seen += pairs
    assert sorted(seen) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_of_many_nodes_neighbours_are_measured() -> None:
    assert sorted(pair for pairs in rounds(100) for pair in pairs) == [(k, k + 1) for k in range(99)]


def test_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# nodes\n\nnode1 slots=8   # first\nroot@node2   slots = 4\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("root@node2", 4)]
    for text, expected in (
        ("node1\n", "line 1: 'node1' is not"), ("a slots=1\na slots=2\n", "line 2: a is there twice"),
        ("# none\n", "names no host"), ("-oProxyCommand=x slots=1\n", "is not of the form"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(HostfileError, match=expected):
            read_hostfile(path)
