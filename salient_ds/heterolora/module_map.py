"""Heat map with one number per module, such as a score or how often it was on. Modules that are on are marked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from salient_ds.monitor.grid import OTHER, RankGrid, build_grids
from salient_ds.monitor.heatmap import RAMP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage

MARK = "#d55e00"


def save_module_map(
    values: Mapping[str, float], on: Collection[str], path: Path, title: str, label: str, log: bool = False
) -> Path:
    """Draw {module path: value} as a PNG. Rows are module types, columns are layers; a dot marks the modules in ``on``.

    Args:
        label: label of the colour bar.
        log: use a logarithmic colour scale; ignored if there are fewer than two different positive values.

    Raises:
        ValueError: there are no modules.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not values:
        raise ValueError("no modules: there is nothing to draw")
    shown = {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
    grids, marks = build_grids(shown), build_grids({name: float(name in on) for name in values})
    columns = max(len(grid.layers) for grid in grids)
    names = max(len(row) for grid in grids for row in grid.rows)
    size = max(0.32 * columns + 0.085 * names + 1.8, 5.0), sum(0.32 * len(g.rows) + 0.75 for g in grids) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=[len(g.rows) + 0.8 for g in grids])[:, 0]
    scale = _scale(list(shown.values()), log)
    for axes, grid, mark in zip(panels, grids, marks, strict=True):
        image = _draw(axes, grid, mark, columns, scale)
        if len(grids) > 1:
            axes.set_title(grid.stack, fontsize=9, loc="left", color="#444444")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    figure.supxlabel(f"{len(on)} of {len(values)} modules on (dot)", fontsize=9, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, fraction=0.03, aspect=18)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    figure.savefig(path, dpi=160, format="png")
    return path


def _scale(values: list[float], log: bool) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    positive = [value for value in values if value > 0]
    if log and len(set(positive)) > 1:
        return LogNorm(min(positive), max(positive))
    return Normalize(0, max([*positive, 1e-30]))


def _draw(axes: Axes, grid: RankGrid, mark: RankGrid, columns: int, scale: Normalize) -> AxesImage:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    table = np.full((len(grid.rows), columns), np.nan)
    for (row, layer), value in grid.cells.items():
        place = grid.rows.index(row), grid.layers.index(layer)
        table[place] = value
        if mark.cells[row, layer] > 0.5:
            axes.plot(place[1], place[0], "o", color=MARK, markersize=4)
    ramp = LinearSegmentedColormap.from_list("value", RAMP).with_extremes(bad="white", under=RAMP[0])
    image = axes.imshow(table, cmap=ramp, norm=scale, aspect="auto")
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=9)
    if grid.stack == OTHER:
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(grid.layers)), [str(layer) for layer in grid.layers], fontsize=8)
        axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image
