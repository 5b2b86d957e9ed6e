"""The two pictures of a sweep: metric over learning rate, and paired differences with their intervals. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salient_ds.monitor.curves import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["data_uri", "differences", "over_rates"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#332288")
"""Colours that colour-blind readers can tell apart. Further arms repeat them with other markers."""
_MARKERS = "osD^vP"


def over_rates(arms: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Metric on the tuning seeds over learning rate, one line per arm; None if there is no value yet.

    A filled marker is the chosen rate. A cross at the upper edge is a rate whose runs did not finish.
    """
    from matplotlib.figure import Figure

    if not any(rate["value"] is not None for arm in arms for rate in arm["tuning"]):
        return None
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(arms):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index // len(_COLOURS) % len(_MARKERS)]
        points = [(rate["lr"], rate["value"]) for rate in arm["tuning"] if rate["value"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, markerfacecolor="white",
                      label=_plain(arm["name"]), linewidth=1.6)  # fmt: skip
        best = [point for point in points if point[0] == arm["lr"]]
        if best:
            axes.plot(*zip(*best, strict=True), marker=marker, color=colour, linestyle="none")
        lost = [r["lr"] for r in arm["tuning"] if r["value"] is None and r["status"] not in ([], ["waiting"])]
        if lost:
            axes.plot(lost, [0.985] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(_plain(f"held-out {metric}, tuning seeds"))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _quiet(axes, "both")
    return figure


def differences(comparisons: Sequence[Mapping[str, Any]], metric: str, baseline: str) -> Figure | None:
    """Paired differences from the baseline: every seed, the mean and its 95 % interval; None if there are none."""
    from matplotlib.figure import Figure

    if not comparisons:
        return None
    figure = Figure(figsize=(7.2, 1.3 + 0.45 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for place, item in enumerate(comparisons):
        told = item["verdict"] != "not told apart"
        colour = _COLOURS[0] if told else "#7f7f7f"
        axes.plot(item["values"], [place] * item["n"], "|", color=colour, markersize=11, alpha=0.6)
        if item["low"] is not None:
            axes.plot([item["low"], item["high"]], [place, place], color=colour, linewidth=2)
        axes.plot([item["mean"]], [place], "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [_plain(item["arm"]) for item in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel(_plain(f"difference of held-out {metric} from {baseline}, same seed (95 % interval)"))
    _quiet(axes, "x")
    return figure


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _quiet(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e5e5", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
