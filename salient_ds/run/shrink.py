"""Body of the command ``shrink``: a trained LoRA adapter in, a smaller one and its report out."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from salient_ds.run.exits import RUN_ERROR, USAGE_ERROR, print_problems
from salient_ds.salience.spectral_cut import Criterion, Cut

if TYPE_CHECKING:
    from rich.table import Table

    from salient_ds.export.peft_format import PadTo
    from salient_ds.export.shrink import LoraSource, ModuleCut, Shrinkage

CSV_FILE, PICTURE_FILE = "shrink.csv", "shrink.png"
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_WORST = 5
"""Modules listed under the table."""


@dataclass(frozen=True)
class ShrinkOptions:
    """The command line as it was given."""

    rank: float | None = None
    energy: float | None = None
    parameters: str | None = None
    uniform: bool = False
    form: str | None = None
    pad_to: str | None = None
    dtype: str | None = None
    overwrite: bool = False

    def cut(self) -> Cut:
        """The one criterion that was given.

        Raises:
            ValueError: none or several were given, or the amount is out of range.
        """
        given: dict[Criterion, float | str] = {}
        for name, value in (("rank", self.rank), ("energy", self.energy), ("parameters", self.parameters)):
            if value is not None:
                given[cast(Criterion, name)] = value
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ValueError(f"give exactly one of --rank, --energy and --parameters ({found} given)")
        ((criterion, amount),) = given.items()
        return Cut(criterion, count_of(amount) if isinstance(amount, str) else amount, self.uniform)

    def rows(self) -> PadTo:
        """``--pad-to`` as a number, "vllm" or None.

        Raises:
            ValueError: it is something else, or goes with another form.
        """
        if self.pad_to is None:
            return None
        if self.form not in ("padded", None):
            raise ValueError(f"--pad-to {self.pad_to} belongs to --form padded: leave it out, or write the padded form")
        return rows_of(self.pad_to)


def rows_of(text: str | None) -> PadTo:
    """``--pad-to`` of the command line.

    Raises:
        ValueError: it is neither a rank nor "vllm".
    """
    if text is None or text == "vllm":
        return cast("PadTo", text)
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f'--pad-to {text!r} is neither a rank above 0 nor "vllm"')
    return int(text)


def count_of(text: str) -> int:
    """A number of parameters: "5000000", "300k", "5M" or "1.5b".

    Raises:
        ValueError: it is no such number.
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([kmbg]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"--parameters {text!r} is no number of parameters: write 5000000, 300k or 5M")
    whole, digits, unit = match[1], match[2] or "", match[3]
    scaled, rest = divmod(int(whole + digits) * _SIZES[unit], 10 ** len(digits))
    if rest:
        raise ValueError(f"--parameters {text!r} is not a whole number of parameters")
    return scaled


def shrink(adapter: str, target: str, options: ShrinkOptions) -> int:
    """Shrink an adapter directory or a run's adapter, and print what was kept.

    Returns:
        0; 2 after printing why the command is wrong; 1 after printing why the work is not possible.
    """
    try:
        cut, rows = options.cut(), options.rows()
    except ValueError as error:
        print_problems([str(error)])
        return USAGE_ERROR
    import torch

    from salient_ds.engine.shard_files import CheckpointError
    from salient_ds.export.shrink import plan_cut
    from salient_ds.export.shrunk_folder import check_out, chosen_form, write_shrunk

    out = Path(target)
    kind = getattr(torch, options.dtype) if options.dtype is not None else None
    try:
        source = open_source(Path(adapter))
        check_out(source, out, options.overwrite)
        shrinkage = plan_cut(source, cut)
        choice = chosen_form(shrinkage)
        form = options.form or ("padded" if rows is not None else choice.form)
        write_shrunk(
            source, shrinkage, out, form=form, dtype=kind, pad_to=rows,
            overwrite=options.overwrite, also=lambda folder: _write_report(shrinkage, folder),
        )  # fmt: skip
    except (ValueError, OSError, CheckpointError) as error:
        print_problems([str(error)])
        return RUN_ERROR
    _print_report(source, shrinkage, out)
    if options.form is None and rows is None and choice.note is not None:
        print(choice.note, file=sys.stderr, flush=True)
    return 0


def open_source(place: Path) -> LoraSource:
    """A PEFT adapter directory, or the newest checkpoint of a run directory.

    Raises:
        ValueError, CheckpointError: it is neither, or cannot be read.
    """
    from salient_ds.export.lora_folder import LoraFolder

    is_adapter = (place / "adapter_config.json").is_file()
    if not is_adapter and ((place / "run.yaml").is_file() or (place / "manifest.json").is_file()):
        from salient_ds.run.checkpoint_source import CheckpointSource

        return CheckpointSource(place)
    folder = LoraFolder(place)
    for note in folder.notes():
        print(f"note: {note}", file=sys.stderr, flush=True)
    return folder


def _write_report(shrinkage: Shrinkage, folder: Path) -> None:
    """One line per module as CSV, and the ranks as a picture."""
    from salient_ds.monitor.heatmap import save_rank_png

    with (folder / CSV_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["module", "out", "in", "rank_before", "rank_after", "energy", "energy_kept"])
        for module in shrinkage.modules:
            writer.writerow(
                [module.name, *module.shape, module.before, module.after, module.spectrum.energy, module.kept]
            )  # fmt: skip
    title = f"Rank after {_asked(shrinkage.cut)} (energy kept: {_percent(shrinkage.energy_kept)})"
    top = max(module.before for module in shrinkage.modules)
    save_rank_png(shrinkage.ranks, folder / PICTURE_FILE, title, top)


def _asked(cut: Cut) -> str:
    return f"--{cut.criterion} {cut.amount:.12g}" + (" --uniform" if cut.uniform else "")


def _percent(share: float) -> str:
    """A share in words, where 100 % and 0 % mean exactly that."""
    text = f"{100 * share:.2f} %"
    if text == "100.00 %" and share < 1:
        return "above 99.99 %"
    return "below 0.01 %" if text == "0.00 %" and share > 0 else text


def _print_report(source: LoraSource, shrinkage: Shrinkage, out: Path) -> None:
    from rich.console import Console

    from salient_ds.export.disk_names import CLASS_OF_TASK_TYPE
    from salient_ds.export.peft_loading import peft_warning

    console = Console(highlight=False, soft_wrap=True)
    if shrinkage.keeps_everything:
        console.print(f"{_asked(shrinkage.cut)} covers all that the adapter has: everything is kept")
    console.print(_summary(shrinkage))
    lost = 1 - shrinkage.energy_kept
    console.print(f"energy kept {_percent(1 - lost)}; relative error of the update {_percent(max(lost, 0) ** 0.5)}")
    worst = sorted((m for m in shrinkage.modules if m.after < len(m.spectrum.values)), key=lambda m: m.kept)[:_WORST]
    if worst:
        console.print(_worst_table(worst))
    console.print(str(out), markup=False)
    base, task = source.config.get("base_model_name_or_path"), source.config.get("task_type")
    kept = [module.name for module in shrinkage.modules if module.after]
    warning = peft_warning(kept, base, task) if base and task in CLASS_OF_TASK_TYPE else None
    if warning is not None:
        print(warning, file=sys.stderr, flush=True)


def _summary(shrinkage: Shrinkage) -> Table:
    from rich.table import Table

    modules, (size_before, size_after) = shrinkage.modules, shrinkage.parameters
    before, after = [m.before for m in modules], [m.after for m in modules]
    table = Table("", "before", "after", title=f"shrink {_asked(shrinkage.cut)}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("modules with an update", str(sum(map(bool, before))), str(sum(map(bool, after))))
    table.add_row("total rank", f"{sum(before):,}", f"{sum(after):,}")
    table.add_row("mean rank", f"{sum(before) / len(modules):.2f}", f"{sum(after) / len(modules):.2f}")
    table.add_row("lowest to highest rank", f"{min(before)} to {max(before)}", f"{min(after)} to {max(after)}")
    table.add_row("parameters", f"{size_before:,}", f"{size_after:,}")
    zeros = sum(m.before - len(m.spectrum.values) for m in modules)
    if zeros:
        table.caption = f"{zeros} rows carried nothing (singular values of 0) and were left out"
        table.caption_justify = "left"
    return table


def _worst_table(worst: list[ModuleCut]) -> Table:
    from rich.table import Table

    table = Table("lowest energy kept", "before", "after", "energy kept")
    for column in table.columns[1:]:
        column.justify = "right"
    for module in worst:
        table.add_row(module.name, str(module.before), str(module.after), _percent(module.kept))
    return table
