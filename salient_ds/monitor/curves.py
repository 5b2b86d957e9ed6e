"""The pictures of a run's report: curves over steps, and the rank of every matrix from event to event. No torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from salient_ds.monitor.grid import place_of, type_labels
from salient_ds.monitor.heatmap import RAMP, ZERO
from salient_ds.monitor.run_facts import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 4000
"""Points of a curve at most; longer ones are thinned out evenly."""
_BLUE, _RED, _GREY = "#0072b2", "#d55e00", "#c9c5bf"


def data_uri(figure: Figure, dpi: int = 140) -> str:
    """The figure as PNG, to stand in an ``src`` attribute."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def curves(found: RunFacts) -> Figure | None:
    """One panel per metric that was logged, over steps. Thin lines are allocation events. None without any metric."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [(title, draw) for title, draw, there in _panels(found) if there]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.5, 2.5 * rows), layout="constrained")
    drawn = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, draw) in zip(drawn, panels, strict=False):
        for record in found.records if len(found.records) <= 60 else ():
            axes.axvline(record.step, color=_GREY, linewidth=0.7, zorder=0)
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    for axes in drawn[len(panels) :]:
        axes.set_visible(False)
    return figure


def _panels(found: RunFacts) -> list[tuple[str, Callable[[Axes], None], bool]]:
    def line(key: str, scale: float = 1.0) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            steps, values = thinned(*found.series(key))
            _plot(axes, steps, [value * scale for value in values])

        return draw

    def loss(axes: Axes) -> None:
        steps, values = thinned(*found.series("loss"))
        _plot(axes, steps, values, "training")
        steps, values = thinned(*found.series("eval_loss"))
        if steps:
            axes.plot(steps, values, "o-", color=_RED, markersize=3, linewidth=1.2, label="held out")
        axes.legend(frameon=False, fontsize=8)

    def held_out(axes: Axes) -> None:
        for name in others:
            steps, values = thinned(*found.series(f"eval_{name}"))
            axes.plot(steps, values, "o-", markersize=3, linewidth=1.2, label=name.replace("$", r"\$"))
        axes.legend(frameon=False, fontsize=8)

    others = [name for name in found.held_out_names() if name != "loss" and found.series(f"eval_{name}")[0]]
    return [
        ("loss", loss, bool(found.series("loss")[0] or found.series("eval_loss")[0])),
        ("held-out metrics", held_out, bool(others)),
        *(
            (title, line(key, scale), bool(found.series(key)[0]))
            for title, key, scale in (
                ("learning rate", "lr", 1.0),
                ("gradient norm, before clipping", "grad_norm", 1.0),
                ("tokens per second", "tokens_per_second", 1.0),
                ("MFU (%)", "mfu", 100.0),
                ("memory of the main process (GiB)", "memory", 1 / 2**30),
                ("total rank", "total_rank", 1.0),
                ("orthogonality penalty", "penalty", 1.0),
            )
        ),
    ]


def _plot(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str = "") -> None:
    style = "o-" if len(steps) < 3 else "-"
    axes.plot(steps, values, style, color=_BLUE, markersize=3, linewidth=1.3, label=label)


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most about :data:`MOST_POINTS` of the points, first and last included."""
    stride = -(-len(steps) // MOST_POINTS) or 1
    kept = list(range(0, len(steps), stride))
    if kept and kept[-1] != len(steps) - 1:
        kept.append(len(steps) - 1)
    return [steps[i] for i in kept], [values[i] for i in kept]


def rank_strip(found: RunFacts) -> Figure | None:
    """The rank of every matrix (rows, by type and layer) after every event (columns). None without events."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    modules, records = found.modules, found.records
    if not records or not modules:
        return None
    labels = type_labels(modules)
    kinds = list(dict.fromkeys(labels.values()))
    order = sorted(
        range(len(modules)), key=lambda i: (kinds.index(labels[modules[i]]), place_of(modules[i]).layer or 0)
    )
    start = found.start_ranks()
    columns = ([start] if start else []) + [record.ranks for record in records]
    names = (["start"] if start else []) + [str(record.step) for record in records]
    values = np.array(columns, dtype=float).T[order]
    figure = Figure(figsize=(10.5, min(max(0.05 * len(modules) + 1.6, 2.6), 14)), layout="constrained")
    axes = figure.subplots()
    ramp = LinearSegmentedColormap.from_list("rank", RAMP).with_extremes(under=ZERO)
    image = axes.imshow(values, cmap=ramp, vmin=1e-9, vmax=max(values.max(), 1), aspect="auto", interpolation="nearest")
    borders = [i for i in range(1, len(order)) if labels[modules[order[i]]] != labels[modules[order[i - 1]]]]
    for border in borders:
        axes.axhline(border - 0.5, color="white", linewidth=1.5)
    edges = [0, *borders, len(order)]
    centres = [(low + high - 1) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    axes.set_yticks(centres, [labels[modules[order[low]]].replace("$", r"\$") for low in edges[:-1]], fontsize=8)
    stride = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), stride), names[::stride], fontsize=8)
    axes.set_xlabel("after the event of step", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, ticks=MaxNLocator(6, integer=True))
    bar.set_label("rank", fontsize=9)
    bar.outline.set_visible(False)
    return figure
