"""What a run sends and how long its steps and events take on many GPUs: a model, not a measurement. No torch.

Bytes follow from the formulas of docs/communication.md, which tests count on real processes. Seconds follow from bytes
and a :class:`Cluster`, with these assumptions:

* Every GPU has the run's micro-batch. Rows of the table accumulate one micro-batch, so that the global batch grows with
  the GPUs; the row with the run's own number of processes accumulates as its batch sizes say.
* A micro-batch computes 4 FLOP per frozen parameter and token, 6 per trainable one, 6 for every layer, hidden size and
  position of attention, 2 more per frozen parameter if layers are recomputed; all at one rate.
* A collective takes its bytes at the bandwidth of the slowest link that it crosses, and 2 log2(processes) latencies.
* Nothing overlaps. So seconds are above what is measured where communication hides behind computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from salient_ds.check.report import MemoryInputs, Report
from salient_ds.config.run import RunConfig
from salient_ds.zero.ds_json import DsSummary, summary

SIZES = (8, 64, 512, 4096)
"""Numbers of GPUs in the table."""
EVENT_SECONDS_PER_ROW = 0.5 / 107_520
"""Gathering apart, an event took 0.06 to 0.5 s with 107,520 rows (records of 22 November 2026, one H100)."""


@dataclass(frozen=True)
class Cluster:
    """What the model assumes of the machines."""

    gpus_per_node: int = 8
    rate: float = 450e12
    """FLOP/s of a GPU while it trains: 766e12 of its products, at 1.7 times their time (an H100, bf16, compiled layers,
    4 x 512 tokens; eval/records/2026-11-27_llama-7b_salientlora-peft_1xh100)."""
    inside: float = 300e9
    """Bytes/s of a GPU to others of its node (NVLink)."""
    between: float = 40e9
    """Bytes/s of a GPU to other nodes (one 400 Gbit/s adapter for each, at 80 %)."""
    latency: float = 20e-6
    """Seconds per hop of a collective."""

    def seconds(self, sent: float, processes: int, calls: int = 1) -> float:
        """Time of ``calls`` collectives in which a process sends ``sent`` bytes altogether."""
        if processes == 1:
            return 0.0
        speed = self.inside if processes <= self.gpus_per_node else self.between
        return sent / speed + calls * 2 * math.ceil(math.log2(processes)) * self.latency


@dataclass(frozen=True)
class Traffic:
    """What one process puts into the collectives of a step, in bytes. Sums are taken in rings: see :meth:`sent`."""

    summed: float
    """All-reduces: gradients (and the method's sums)."""
    gathered: float
    """All-gathers: the whole of what every process has afterwards."""
    calls: int

    def sent(self, processes: int) -> float:
        """Bytes that leave a process: a ring all-reduce sends everything nearly twice, a ring all-gather once."""
        return (processes - 1) / processes * (2 * self.summed + self.gathered)


@dataclass(frozen=True)
class Work:
    """The sizes of a run that its traffic and time depend on."""

    stage: int
    sharded_base: bool
    elements: int
    """Trainable elements (rows that exist)."""
    element_bytes: int
    base_parameters: int
    layer_bytes: int
    """Bytes of a layer of the frozen base."""
    layers: int
    bucket: int
    """Elements of a reduction bucket."""
    step_sums: Callable[[int], int]
    """Bytes that the method sums in a step without an event, by micro-batches accumulated."""
    event_sums: int
    """Bytes that the method sums at an event."""
    rows: int
    flops: float
    """FLOPs of a micro-batch."""
    micro_batch: int

    def step(self, accumulation: int) -> Traffic:
        """Traffic of a step without an event."""
        each = self.elements * self.element_bytes
        rounds = accumulation if self.stage >= 2 else 1
        buckets = max(1, math.ceil(self.elements / max(1, self.bucket)))
        gathered, calls = 0, rounds * buckets + 4
        if self.stage >= 1:
            gathered += each
            calls += 2
        if self.stage == 3:
            times = 2 * max(0, self.layers - 2) if self.sharded_base else 2 * self.layers
            gathered += accumulation * times * self.layer_bytes
            calls += accumulation * times
        return Traffic(rounds * each + self.step_sums(accumulation) + 24, gathered, calls)

    def event(self) -> Traffic:
        """What an event adds to its step."""
        return Traffic(self.event_sums, 32, 4)


def work_of(run: RunConfig, inputs: MemoryInputs, ds: DsSummary) -> Work:
    """The sizes of a checked run."""
    layout, shape, method = inputs.layout, inputs.architecture, run.method
    elements = method.adapter_parameters(layout) + inputs.in_full
    width = 4 if run.train.precision == "fp32" else 2
    tokens = run.train.micro_batch_size * run.data.max_length
    layers = shape.layers if shape is not None else 0
    layer = shape.layer_parameters if shape is not None else 0
    recomputed = run.train.activation_checkpointing == "all" or run.train.activation_memory == 0
    attention = 6 * layers * shape.hidden_size * run.data.max_length if shape is not None else 0
    flops = tokens * ((6 if recomputed else 4) * inputs.base_parameters + 6 * elements + attention)
    return Work(
        stage=ds.stage, sharded_base=run.speed_plan(ds.stage).sharded_base, elements=elements, element_bytes=width,
        base_parameters=inputs.base_parameters, layer_bytes=width * layer, layers=layers,
        bucket=ds.reduce_bucket_size, step_sums=lambda accumulation: method.step_traffic(layout, accumulation),
        event_sums=method.event_traffic(layout, elements), rows=layout.total, flops=flops,
        micro_batch=run.train.micro_batch_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One number of GPUs. Bytes are those that leave one GPU."""

    gpus: int
    global_batch: int
    step_bytes: float
    step_seconds: float
    waiting: float
    """Share of the step in which the GPU would only communicate."""
    event_bytes: float
    event_seconds: float


def rows(work: Work, cluster: Cluster, processes: int, accumulation: int, nodes: int) -> list[Row]:
    """The table: :data:`SIZES`, that many nodes, and the run's own number of processes with its accumulation."""
    wanted = dict.fromkeys((*SIZES, nodes * cluster.gpus_per_node), 1) | {processes: accumulation}
    return [_row(work, cluster, gpus, wanted[gpus]) for gpus in sorted(wanted)]


def _row(work: Work, cluster: Cluster, gpus: int, accumulation: int) -> Row:
    step, event = work.step(accumulation), work.event()
    computing = accumulation * work.flops / cluster.rate
    sending = cluster.seconds(step.sent(gpus), gpus, step.calls)
    deciding = EVENT_SECONDS_PER_ROW * work.rows if work.event_sums else 0.0
    return Row(
        gpus=gpus,
        global_batch=gpus * accumulation * work.micro_batch,
        step_bytes=step.sent(gpus),
        step_seconds=computing + sending,
        waiting=sending / (computing + sending) if computing + sending else 0.0,
        event_bytes=event.sent(gpus),
        event_seconds=cluster.seconds(event.sent(gpus), gpus, event.calls) + deciding,
    )


def scale_facts(run: RunConfig, report: Report, cluster: Cluster, nodes: int) -> dict[str, Any] | None:
    """What ``check --nodes`` prints, as JSON: assumptions and rows. None if the model's layers are not known."""
    inputs, processes = report.memory_inputs, int(report.facts["processes"])
    if inputs is None or inputs.architecture is None or "ds_config" not in report.facts:
        return None
    accumulation = max(1, run.train.global_batch_size // (run.train.micro_batch_size * processes))
    work = work_of(run, inputs, summary(report.facts["ds_config"]))
    table = rows(work, cluster, processes, accumulation, nodes)
    return {"cluster": asdict(cluster), "rows": [asdict(row) for row in table]}


def scale_table(facts: Mapping[str, Any]) -> Table:
    """The rows for people."""
    cluster = facts["cluster"]
    table = Table(
        title="a model of larger numbers of GPUs (not a measurement)",
        caption=f"assumed: {cluster['rate'] / 1e12:.0f} TFLOP/s per GPU, {cluster['inside'] / 1e9:.0f} GB/s within "
        f"nodes of {cluster['gpus_per_node']}, {cluster['between'] / 1e9:.0f} GB/s per GPU between them, "
        f"{cluster['latency'] * 1e6:.0f} us per hop, nothing overlaps; docs/communication.md",
        title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for name in ("GPUs", "global batch", "sent/step", "s/step", "sending", "sent/event", "s/event"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in facts["rows"]:
        table.add_row(
            f"{row['gpus']:,}", f"{row['global_batch']:,}", size(row["step_bytes"]), f"{row['step_seconds']:.3g}",
            f"{row['waiting']:.0%}", size(row["event_bytes"]), f"{row['event_seconds']:.2g}",
        )  # fmt: skip
    return table


def size(count: float) -> str:
    """Bytes for people: 0 B, 1.2 MB, 3.4 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"
