"""Training without a model: made-up singular values, cut into shards, drive a method as the engine would.

Shape legend: N = singular values, M = matrices, S = steps (row s holds the values after step s + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salient_ds.methods.duties import Method
from salient_ds.ranks import Part, RankDecision, RankLayout


def layout_of(ranks: Iterable[int]) -> RankLayout:
    ranks = tuple(ranks)
    names = tuple(f"layer.{k}" for k in range(len(ranks)))
    return RankLayout(names, ranks, (16,) * len(ranks), (16,) * len(ranks))


@dataclass
class FakeView:
    """One flat buffer; its parts of E in the order of ``sigma``, with parts of A and B between them."""

    key: str
    layout: RankLayout
    rows: list[int]
    values_N: Tensor
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        parts: list[Part] = []
        for row in self.rows:
            module = int(self.layout.module_of_row_N[row])
            lo, rank = row - self.layout.offsets[module], self.layout.ranks[module]
            if parts and parts[-1].module == module and parts[-1].lo + parts[-1].numel == lo:
                last = parts.pop()
                parts.append(Part("E", module, last.lo, last.numel + 1, (rank,), 0))
            else:
                parts.append(Part("E", module, lo, 1, (rank,), 0))
        others = [Part(f, p.module, 0, 7, (p.shape[0], 16), 0) for p in parts for f in "AB"]
        mixed = [part for pair in zip(parts, others, strict=False) for part in pair] + others[len(parts) :]
        self.parts = tuple(mixed)

    def sigma(self) -> tuple[Tensor, Tensor]:
        rows_n = torch.tensor(self.rows, dtype=torch.int64)
        return rows_n, self.values_N[rows_n]

    def value(self, part: Part) -> Tensor:
        raise AssertionError("SalientLoRA looks at singular values only")

    grad = value


@dataclass
class Process:
    """One process: its method object and its views on the shared values."""

    method: Method
    views: list[FakeView]


@dataclass
class Simulation:
    """The engine's part: hook, event, decision in force. All processes live here."""

    make: Callable[[], Any]
    layout: RankLayout
    shards: list[list[list[int]]]
    """Per process, per view: the rows it owns."""
    values_N: Tensor = field(init=False)
    decisions: list[RankDecision] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        total = self.layout.total
        self.values_N = torch.zeros(total)
        self.latest = RankDecision(0, total, torch.ones(total, dtype=torch.bool))
        self.in_force = self.latest
        self.processes = []
        for owned in self.shards:
            views = [FakeView(f"buffer{i}", self.layout, rows, self.values_N) for i, rows in enumerate(owned)]
            method = self.make()
            method.attach(self.layout, views)
            self.processes.append(Process(method, views))

    def run(self, values_SN: Tensor, penalties_SM2: Tensor) -> Simulation:
        """Take the steps that follow; both tensors begin with step 1 of the run."""
        for values_N, penalty_M2 in zip(values_SN[self.step :], penalties_SM2[self.step :], strict=True):
            self.train_step(values_N, penalty_M2)
        return self

    def train_step(self, after_optimizer_N: Tensor, penalty_M2: Tensor) -> Tensor:
        """One step; returns the values as they are after the hook."""
        self.step += 1
        self.in_force = self.latest
        self.values_N.copy_(after_optimizer_N).masked_fill_(~self.in_force.mask_N, 0)
        for process in self.processes:
            for view in process.views:
                process.method.observe(view, self.step)
            process.method.end_step(self.step, penalty_M2)
        event = next((e for e in self.processes[0].method.events if e.step == self.step), None)
        if event is not None:
            parts = [process.method.contribution() for process in self.processes]
            statistics = {name: sum(part[name] for part in parts) for name in parts[0]}
            made = [p.method.allocate(statistics, event, self.latest) for p in self.processes]  # type: ignore[arg-type]
            assert len({decision.digest() for decision in made}) == 1
            self.latest = made[0]
            self.decisions.append(self.latest)
        return self.values_N.clone()

    def save(self) -> dict[str, Any]:
        """What a checkpoint holds: shared state once, local state by matrix."""
        stored: dict[tuple[str, int], Tensor] = {}
        for process in self.processes:
            for name, part, value in process.method.local_state():
                assert part.factor == "E"
                whole = stored.setdefault(
                    (name, part.module), torch.full((*value.shape[:-1], part.shape[0]), torch.nan)
                )
                whole[..., part.lo : part.lo + part.numel] = value
        shared = [process.method.shared_state() for process in self.processes]
        assert all(torch.equal(s["losses_tM2"], shared[0]["losses_tM2"]) for s in shared)
        return {"step": self.step, "latest": self.latest, "shared": shared[0], "stored": stored}

    def load(self, saved: dict[str, Any]) -> Simulation:
        """Go on from a checkpoint, whatever the shards were."""

        def read(name: str, part: Part) -> Tensor:
            return saved["stored"][name, part.module][..., part.lo : part.lo + part.numel]

        self.step, self.latest = saved["step"], saved["latest"]
        for process in self.processes:
            process.method.load_state(saved["shared"], read)
        return self
