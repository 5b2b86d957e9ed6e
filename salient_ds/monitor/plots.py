"""Plots of a run: how the ranks changed from event to event. ``heatmap`` shows them at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salient_ds.monitor.events import AllocationRecord
from salient_ds.monitor.grid import type_labels
from salient_ds.monitor.heatmap import render_ranks, save_rank_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["mean_rank_by_type", "render_ranks", "save_history_png", "save_rank_png"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#332288")
"""Colours that colour-blind readers can tell apart. Further lines repeat them dashed."""


def mean_rank_by_type(record: AllocationRecord, modules: Sequence[str]) -> dict[str, float]:
    """Mean live rank of each module type after one event.

    Raises:
        ValueError: the record was written for another number of modules.
    """
    if len(record.ranks) != len(modules):
        raise ValueError(
            f"the event of step {record.step} has {len(record.ranks)} ranks for {len(modules)} modules: "
            "are log and model of the same run?"
        )
    found: dict[str, list[int]] = {}
    for label, rank in zip(type_labels(modules).values(), record.ranks, strict=True):
        found.setdefault(label, []).append(rank)
    return {label: sum(ranks) / len(ranks) for label, ranks in found.items()}


def save_history_png(
    records: Sequence[AllocationRecord],
    modules: Sequence[str],
    path: Path,
    initial_ranks: Sequence[int] | None = None,
    last_step: int | None = None,
) -> Path:
    """Plot the total rank with its budget, and the mean rank of every module type, over training steps.

    Args:
        modules: module paths in the order of the records' ``ranks``.
        initial_ranks: ranks before the first event, plotted from step 0.
        last_step: the step up to which the last decision is plotted.

    Raises:
        ValueError: there is no event, or records and modules do not belong together.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not records:
        raise ValueError("no allocation event yet: there is nothing to draw")
    means = [mean_rank_by_type(record, modules) for record in records]
    steps, totals = [record.step for record in records], [record.total_rank for record in records]
    if initial_ranks is not None:
        first = records[0].model_copy(update={"ranks": list(initial_ranks)})
        means.insert(0, mean_rank_by_type(first, modules))
        steps.insert(0, 0)
        totals.insert(0, sum(initial_ranks))
    end = max(last_step or 0, steps[-1] + max((steps[-1] - steps[0]) // 20, 1))
    figure = Figure(figsize=(8.5, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
    budgets = [record.budget for record in records]
    _draw_total(above, steps, totals, [record.step for record in records], budgets, end)
    _draw_types(below, steps, means, end)
    below.set_xlabel("optimizer step")
    below.set_xlim(steps[0], end)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=160, format="png")
    return path


def _held(values: Sequence[float]) -> list[float]:
    """Repeat the last value: the last decision holds until the end of the axis."""
    return [*values, values[-1]]


def _draw_total(
    axes: Axes,
    steps: Sequence[int],
    totals: Sequence[int],
    at: Sequence[int],
    budgets: Sequence[int],
    end: int,
) -> None:
    axes.step([*steps, end], _held(totals), where="post", color="#0b3c75", linewidth=2, label="total rank")
    axes.plot(at, budgets, "o", color="#d55e00", fillstyle="none", markersize=6, label="budget of the event")
    axes.set_ylabel("total rank")
    axes.set_title("Ranks during training", loc="left", weight="bold")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plain(axes)


def _draw_types(axes: Axes, steps: Sequence[int], means: Sequence[dict[str, float]], end: int) -> None:
    names = sorted(means[-1], key=lambda name: -means[-1][name])
    for i, name in enumerate(names):
        values = _held([mean.get(name, 0.0) for mean in means])
        style = ("-", "--", ":", "-.")[i // len(_COLOURS) % 4]
        colour = _COLOURS[i % len(_COLOURS)]
        label = f"{name}  {values[-1]:.1f}"
        axes.step([*steps, end], values, where="post", color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set_ylabel("mean rank by module type")
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title="at the end",
        title_fontsize=8,
    )
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
