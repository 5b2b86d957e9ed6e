"""The rank of every module as a heat map: in the terminal (rich) and as a PNG (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from salient_ds.monitor.grid import OTHER, RankGrid, build_grids, stack_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

RAMP = ("#eef3fa", "#b7d0ea", "#6fa8d6", "#2f74b3", "#0b3c75")
"""One hue from light (rank 1) to dark (the highest rank). The order stays visible in greyscale and to colour-blind
readers."""
ZERO = "#c9c5bf"
"""Rank 0, a module that is switched off: outside the ramp."""


def shade(rank: float, top: float) -> str:
    """Hex colour of a rank between 0 and ``top``."""
    if rank <= 0:
        return ZERO
    position = min(rank / max(top, 1), 1.0) * (len(RAMP) - 1)
    low = min(int(position), len(RAMP) - 2)
    pair = [[int(RAMP[low + k][i : i + 2], 16) for i in (1, 3, 5)] for k in (0, 1)]
    mixed = [round(a + (b - a) * (position - low)) for a, b in zip(*pair, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink(background: str) -> str:
    """Black or white, whichever is read more easily on ``background``."""
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"


def digits(rank: float) -> str:
    """A rank as text for a cell: whole, or with one decimal if it is the mean of several modules."""
    return f"{rank:.0f}" if rank == int(rank) else f"{rank:.1f}"


def render_ranks(ranks: Mapping[str, int], width: int = 80, top: int | None = None) -> RenderableType:
    """Heat map of {module path: rank} for the terminal, at most ``width`` characters wide.

    Rows are module types, columns are layers. Colour and digits both show the rank; "." is a module that is not
    adapted. Layers that do not fit side by side continue below.

    Args:
        top: rank of the darkest shade (default: the highest rank in ``ranks``).
    """
    if not ranks:
        return Text("no adapted modules")
    top = top or max(max(ranks.values()), 1)
    grids = build_grids(ranks)
    lines: list[Text] = []
    for grid in grids:
        if len(grids) > 1:
            lines.append(Text(grid.stack if grid.stack == OTHER else stack_name(grid.stack), style="bold"))
        lines += _grid_lines(grid, width, top)
    return Group(*lines, Text(summary_line(ranks), style="bold"))


def summary_line(ranks: Mapping[str, int]) -> str:
    """One line with the total, mean, lowest and highest rank, and the number of modules at rank 0."""
    values = list(ranks.values())
    return (
        f"total rank {sum(values)}  mean {sum(values) / len(values):.1f}  min {min(values)}  max "
        f"{max(values)}  "
        f"off {values.count(0)}/{len(values)}"
    )


def _grid_lines(grid: RankGrid, width: int, top: int) -> list[Text]:
    heads = [str(layer) for layer in grid.layers] if grid.stack != OTHER else [""]
    cell = 1 + max(len(text) for text in [*heads, *map(digits, grid.cells.values())])
    label = min(max(len(row) for row in (*grid.rows, "layer")), width - cell - 1)
    per_block = max((width - label - 1) // cell, 1)
    blocks = math.ceil(len(grid.layers) / per_block)
    per_block = math.ceil(len(grid.layers) / blocks)
    lines: list[Text] = []
    for start in range(0, len(grid.layers), per_block):
        columns = range(start, min(start + per_block, len(grid.layers)))
        if grid.stack != OTHER:
            head = "".join(heads[i].rjust(cell) for i in columns)
            lines.append(Text("layer".rjust(label) + " " + head, style="dim"))
        for row in grid.rows:
            line = Text(row[-label:].rjust(label) + " ")
            for i in columns:
                line.append_text(_cell_text(grid.cells.get((row, grid.layers[i])), cell, top))
            lines.append(line)
    return lines


def _cell_text(rank: float | None, cell: int, top: int) -> Text:
    if rank is None:
        return Text(".".rjust(cell), style="dim")
    background = shade(rank, top)
    return Text(digits(rank).rjust(cell), style=Style(color=ink(background), bgcolor=background))


def save_rank_png(ranks: Mapping[str, int], path: Path, title: str = "", top: int | None = None) -> Path:
    """The same heat map as a PNG, one panel per stack of layers.

    Raises:
        ValueError: if there are no modules.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not ranks:
        raise ValueError("no adapted modules: there is nothing to draw")
    top = top or max(max(ranks.values()), 1)
    grids = build_grids(ranks)
    columns = max(len(grid.layers) for grid in grids)
    label = max(len(row) for grid in grids for row in grid.rows)
    size = (
        max(0.42 * columns + 0.085 * label + 1.6, 5.0),
        sum(0.36 * len(g.rows) + 0.75 for g in grids) + 0.9,
    )
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=[len(g.rows) + 0.8 for g in grids])[:, 0]
    for axes, grid in zip(panels, grids, strict=True):
        image = _draw_grid(axes, grid, top, columns)
        if len(grids) > 1:
            axes.set_title(grid.stack, fontsize=9, loc="left", color="#444444")
    figure.suptitle(title or "Rank of every adapted matrix", fontsize=12, x=0.01, ha="left", weight="bold")
    legend = "   (grey: rank 0)" if 0 in ranks.values() else ""
    figure.supxlabel(summary_line(ranks) + legend, fontsize=9, x=0.01, ha="left")
    bar = figure.colorbar(
        image, ax=list(panels), pad=0.01, fraction=0.03, aspect=18, ticks=MaxNLocator(6, integer=True)
    )
    bar.set_label("rank", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=160, format="png")
    return path


def _draw_grid(axes: Axes, grid: RankGrid, top: int, columns: int) -> AxesImage:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    values = np.full((len(grid.rows), columns), np.nan)
    for (row, layer), rank in grid.cells.items():
        values[grid.rows.index(row), grid.layers.index(layer)] = rank
    ramp = LinearSegmentedColormap.from_list("rank", RAMP).with_extremes(bad="white", under=ZERO)
    image = axes.imshow(values, cmap=ramp, vmin=1e-9, vmax=top, aspect="auto")
    for (row, column), rank in np.ndenumerate(values):
        if not np.isnan(rank):
            colour = ink(shade(rank, top))
            number = axes.text(column, row, digits(rank), ha="center", va="center", fontsize=7.5, color=colour)
            number.set_in_layout(False)  # the layout engine would measure each of hundreds, several times
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=9)
    axes.set_xticks(range(len(grid.layers)), [str(layer) for layer in grid.layers], fontsize=8)
    if grid.stack == OTHER:
        axes.set_xticks([])
    else:
        axes.set_xlabel("layer", fontsize=9)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(grid.rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image
