"""The two pictures of a report: a radar chart of the categories, and bars of the averages with intervals."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .report import Report

# Okabe and Ito's colours, which colour-blind readers can tell apart. Further models reuse them with other line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
STYLES = ("-", "--", ":", "-.")
HIGHEST = 10.0


def radar(report: Report) -> Figure:
    """Draw the category means, from 0 to 10.

    A line passes over a category without a mean. A mean with missing verdicts has a hollow point.
    """
    models = report["single"]["models"]
    names = list(dict.fromkeys(name for entry in models for name in entry["categories"]))
    angles = np.linspace(0.0, 2 * np.pi, len(names), endpoint=False)
    figure = Figure(figsize=(5.8, 5.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    for place, entry in enumerate(models):
        cells = [entry["categories"].get(name, {}).get("both", {}) for name in names]
        there = [(angle, cell) for angle, cell in zip(angles, cells, strict=True) if cell.get("mean") is not None]
        colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
        path = there + there[:1]
        axes.plot(
            [angle for angle, _ in path], [cell["mean"] for _, cell in path],
            color=colour, linestyle=style, linewidth=1.8, label=entry["model"],
        )  # fmt: skip
        for angle, cell in there:
            whole = not cell["unparsed"] + cell["failed"]
            axes.plot(angle, cell["mean"], "o", color=colour, markersize=3.5 if whole else 5,
                      markerfacecolor=colour if whole else "white")  # fmt: skip
    axes.set_xticks(angles, names)
    axes.tick_params(axis="x", pad=4)
    for label, side in zip(axes.get_xticklabels(), np.sin(angles), strict=True):
        label.set_horizontalalignment("center" if abs(side) < 0.01 else "left" if side > 0 else "right")
    axes.set_ylim(0.0, HIGHEST)
    axes.set_yticks([2, 4, 6, 8, 10])
    axes.set_rlabel_position(180.0 / max(len(names), 1))  # type: ignore[attr-defined]
    axes.tick_params(axis="y", labelsize=8, labelcolor="#666666")
    axes.grid(color="#cccccc", linewidth=0.7)
    axes.spines["polar"].set_color("#999999")
    figure.legend(loc="outside lower center", ncols=min(3, len(models)), frameon=False)
    figure.suptitle(f"{report['score_name']} by category\njudge: {report['judge']}", fontsize=11)
    return figure


def bars(report: Report) -> Figure:
    """Draw turn 1, turn 2 and the pooled average of each model. The average has its interval."""
    models = report["single"]["models"]
    figure = Figure(figsize=(6.4, 1.8 + 0.95 * len(models)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(models), dtype=float)
    parts = (("turn_1", "turn 1", "#9ecae1"), ("turn_2", "turn 2", "#4292c6"), ("average_pooled", "average", "#08519c"))
    for shift, (name, label, colour) in enumerate(parts):
        means = [entry[name]["mean"] for entry in models]
        heights = [mean or 0.0 for mean in means]
        rows = places + (shift - 1) * 0.26
        errors = None
        if name == "average_pooled":
            spans = [entry[name]["interval"] or (h, h) for entry, h in zip(models, heights, strict=True)]
            errors = np.array([[h - low, high - h] for h, (low, high) in zip(heights, spans, strict=True)]).T
        axes.barh(
            rows, heights, height=0.24, color=colour, label=label, xerr=errors,
            error_kw={"ecolor": "#222222", "elinewidth": 1.1, "capsize": 2.5},
        )  # fmt: skip
        for row, mean, height, entry in zip(rows, means, heights, models, strict=True):
            high = (entry[name].get("interval") or (0.0, height))[1]
            text = "no average: too many failures" if mean is None else f"{mean:.2f}"
            axes.text(max(high, height) + 0.08, row, text, va="center", fontsize=8, color="#333333")
    axes.set_yticks(places, [entry["model"] for entry in models])
    axes.invert_yaxis()
    axes.set_xlim(0.0, HIGHEST + 0.6)
    axes.set_xticks(range(0, 11, 2))
    axes.set_xlabel("score, 1 to 10 (bar on the average: 95 % bootstrap interval over questions)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{report['score_name']}, judge: {report['judge']}", fontsize=11)
    return figure


def to_svg(figure: Figure) -> str:
    """Return the figure as SVG text without a date or random ids, so that equal reports give equal bytes."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "salient", "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write radar.png, radar.svg, bars.png and bars.svg, and return their paths. Nothing without single grading."""
    if "single" not in report:
        return []
    written = []
    for name, draw in (("radar", radar), ("bars", bars)):
        figure = draw(report)
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": ""})
        (folder / f"{name}.svg").write_text(to_svg(figure), encoding="utf-8")
        written += [folder / f"{name}.png", folder / f"{name}.svg"]
    return written
