"""The record of a planted-rank run: README.md with tables and findings, and pictures. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import record
from .planted_metrics import random_recall
from .planted_plan import Training
from .planted_summary import Row, findings, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("student", "lr", "ranks kept", "precision", "recall", "Spearman", "mean difference", "loss",
           "loss - true ranks", "loss - lora", "update error")  # fmt: skip
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
REGIME_TEXT = {
    "equal_energy": "all planted updates that are not zero have the same Frobenius norm (norms do not show ranks)",
    "equal_singular_value": "all planted singular values are equal (norms grow with the root of the rank)",
    "power_law": "updates have full rank and singular values c i^-a, a from 0.3 to 1.5 and c from 0.35 to 1 by matrix "
    "(no rank is true; the planted ones are those of the largest values of all)",
}


def table_row(row: Row) -> list[str]:
    """One row of the table, with the cells of :data:`COLUMNS`."""
    kept = sorted(set(row.kept))
    shown = "-" if not kept else str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
    measures = ("precision", "recall", "spearman", "mean_difference", "loss", "above_oracle", "above_uniform",
                "update_error")  # fmt: skip
    name = row.arm + (f" ({row.failed} of {row.failed + row.seeds} runs failed)" if row.failed else "")
    return [name, f"{row.lr:g}", shown, *(show(row.estimates[measure]) for measure in measures)]


def readme(page: Mapping[str, Any], rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """The record as a Markdown page."""
    size, training, hardware = page["size"], page["training"], page["hardware"]
    budget, matrices = sum(size["planted"]), len(size["planted"])
    chance = random_recall(size["planted"], training["initial_rank"], budget)
    parts = [
        "# Planted ranks: do the methods find them?",
        f"Command, at commit {page['commit']}, {page['date']}, on {hardware['cpu']} ({hardware['cpu_cores']} cores, "
        f"{page['workers']} workers, {page['seconds']:.0f} s):",
        f"    {page['command']}",
        f"A frozen residual network ({matrices} matrices of {size['width']} x {size['hidden']}, random weights) and a "
        f"teacher that differs from it by updates of ranks {', '.join(map(str, size['planted']))}, dealt to the "
        f"matrices anew by every seed. Students see {size['train_examples']} noisy outputs of the teacher (noise "
        f"{size['noise']:g} of its difference from the frozen network), {training['steps']} steps of AdamW with "
        f"{training['batch']} examples, learning rate falling linearly to 0. All end at the planted total of {budget} "
        f"ranks. {students_text(page)}",
        "Loss: squared error on noiseless held-out outputs, 1 = the frozen network. Precision and recall: sum over "
        "matrices of min(recovered, planted) relative to the recovered and the planted total (equal if the budget is "
        f"met; by lot, recall would be {chance:.3f}). Mean difference: of ranks per matrix. Update error: squared "
        "distance to the planted weights, relative to their energy. "
        f"Means over seeds {', '.join(map(str, page['seeds']))} with 95% intervals (Student's t, cut where a measure "
        f"ends; differences of losses seed by seed); of so many, one in twenty misses by chance. {rates_text(page)}",
    ]
    for regime in page["regimes"]:
        own = [row for row in rows if row.regime == regime]
        if own:
            parts += [
                f"## {regime}", f"Here {REGIME_TEXT[regime]}.",
                record.markdown_table(COLUMNS, [table_row(row) for row in own]),
                "\n".join(f"- {line}" for line in findings(own, budget)),
            ]  # fmt: skip
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    if page["tuning"]:
        parts += ["## Learning rates", tuning_table(page)]
    if page["left_out"]:
        parts += ["Not in the tables:", "\n".join(f"- {item['arm']}: {item['reason']}" for item in page["left_out"])]
    return "\n\n".join(parts) + "\n"


def students_text(page: Mapping[str, Any]) -> str:
    """Text that explains the names of the students, and when they decide on ranks."""
    training = Training(**page["training"])
    first, last = training.phase
    return (
        f"Ranks are decided between steps {first} and {last}. adalora, lora2 (every {training.interval} steps) and "
        f"salientlora (windows of {training.window_initial} to {training.window_final} steps) prune from "
        f"{training.initial_rank} ranks per matrix; increlora grows from 1, its multiplier falling with the rank; all "
        "others have the multiplier 1. salientlora-PRESET-NORMALISATION: the preset of the paper or of the released "
        "code, the latter with the final prune that it lacks (as-is: without). lora and svd-lora: the same rank "
        "everywhere. true-ranks and true-ranks-plain: the planted ranks given, in SVD and in plain form. lora2 has "
        f"an inner width of {training.initial_rank}, so that its ranks may be right, but it does not train fewer "
        f"weights. Orthogonality penalty {training.orthogonality:g} where there is one, gradients clipped at "
        f"{training.clip:g}."
    )


def rates_text(page: Mapping[str, Any]) -> str:
    """Text that says how the learning rates were chosen."""
    lrs = ", ".join(f"{lr:g}" for lr in page["lrs"])
    if len(page["lrs"]) == 1:
        return f"Learning rate {lrs} for all, not tuned."
    return (
        f"Learning rate by the lowest held-out loss on seed {page['tuning_seed']}, which nothing else uses, out of "
        f"{lrs}, for every student and regime."
    )


def tuning_table(page: Mapping[str, Any]) -> str:
    """Table of the held-out loss of every student at every learning rate, on the tuning seed."""
    lrs = page["lrs"]
    found = {(run["regime"], run["arm"], run["lr"]): run["loss"] for run in page["tuning"]}
    pairs = list(dict.fromkeys((regime, arm) for regime, arm, _ in found))
    lines = []
    for regime, arm in pairs:
        losses = [found.get((regime, arm, lr), "missing") for lr in lrs]
        cells = [f"{loss:.3g}" if isinstance(loss, float) else "diverged" if loss is None else "-" for loss in losses]
        lines.append([regime, arm, *cells])
    return record.markdown_table(["regime", "student", *(f"loss at {lr:g}" for lr in lrs)], lines)


def draw(page: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[str]:
    """Write the pictures and return their file names."""
    names = []
    for regime in page["regimes"]:
        runs = [run for run in page["runs"] if run["regime"] == regime and run["loss"] is not None]
        if runs:
            draw_ranks(
                runs, folder / f"ranks_{regime}.png", f"{regime}: rank of every matrix, {len(page['seeds'])} seeds"
            )
            names.append(f"ranks_{regime}.png")
    if any(row.estimates["spearman"] for row in rows):
        draw_spearman(rows, folder / "spearman.png")
        names.append("spearman.png")
    return names


def draw_ranks(runs: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one panel per student: recovered against planted rank, one point per matrix and seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns = min(4, len(arms))
    lines = -(-len(arms) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, arm in zip(panels, arms, strict=False):
        _panel(axes, [run for run in runs if run["arm"] == arm], arm)
    for axes in list(figure.axes)[len(arms) :]:
        axes.remove()
    figure.suptitle(title)
    figure.supxlabel("planted rank")
    figure.supylabel("recovered rank")
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, runs: Sequence[Mapping[str, Any]], title: str) -> None:
    top = max(max(*run["planted"], *run["recovered"]) for run in runs)
    axes.plot([0, top], [0, top], color="#7f7f7f", linewidth=0.8)
    for index, run in enumerate(runs):
        shift = 0.5 * (index / max(len(runs) - 1, 1) - 0.5)  # shift seeds sideways, so that equal points stay visible
        axes.plot([rank + shift for rank in run["planted"]], run["recovered"], "o", markersize=3.5, alpha=0.7,
                  color=_COLOURS[0])  # fmt: skip
    axes.set_title(title, fontsize=9)


def draw_spearman(rows: Sequence[Row], path: Path) -> None:
    """Draw Spearman's correlation of recovered and planted ranks per student and regime, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.estimates["spearman"] is not None]
    arms = list(dict.fromkeys(row.arm for row in shown))
    regimes = list(dict.fromkeys(row.regime for row in shown))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / len(regimes)
    for row in shown:
        value = row.estimates["spearman"]
        assert value is not None
        index = regimes.index(row.regime)
        place = arms.index(row.arm) + height * (index - (len(regimes) - 1) / 2)
        first = row.arm == next(other.arm for other in shown if other.regime == row.regime)
        axes.barh(place, value.mean, height, color=_COLOURS[index % len(_COLOURS)], label=row.regime if first else None)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("Spearman correlation of recovered and planted ranks (95% interval)")
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
