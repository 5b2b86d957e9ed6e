"""Which matrices a run adapts, known before its model is loaded. No torch."""

from __future__ import annotations

from salient_ds.adapters.adaptable import Adaptable
from salient_ds.adapters.rank_pattern import ranks_of
from salient_ds.adapters.targets import is_suffix, listed, select_shortcuts, shortcut_candidates
from salient_ds.check.built_model import BuiltModel
from salient_ds.check.model_files import ModelFiles
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig
from salient_ds.models.heads import head_problem, label_problem
from salient_ds.ranks import RankLayout

_Modules = list[tuple[str, tuple[int, int], int]]


def target_layout(run: RunConfig, built: BuiltModel, files: ModelFiles, report: Report) -> RankLayout:
    """The adapted layers, then the shortcuts, at their initial ranks.

    Adds the facts modules, targets, shortcuts and in_full, and notes on layers that one could expect and are left out.

    Raises:
        ValueError: ``adapter.target_modules``, ``rank_pattern``, ``also_train`` or ``shortcuts`` matches nothing.
    """
    rank, wanted = run.adapter.rank, run.adapter.target_modules
    full = _in_full(run, built, files, report)
    adaptable = built.adaptable.without(full)
    linears: _Modules = []
    if wanted or not run.adapter.shortcuts:
        ranks = ranks_of(adaptable.select(wanted), rank, run.adapter.rank_pattern)
        linears = [(name, adaptable.linears[name], rank) for name, rank in ranks.items() if rank]
        report.notes.extend(adaptable.notes(wanted))
    modules = linears + _shortcuts(run, adaptable, report)
    report.facts["modules"] = len(modules)
    names = [name for name, _, _ in linears]
    report.facts["targets"] = {item: sum(is_suffix(name, item) for name in names) for item in listed(wanted)}
    if run.adapter.rank_pattern:
        report.facts["rank_pattern"] = f"{sum(rank for _, _, rank in linears)} rows in {len(linears)} of {len(ranks)}"
    narrow = [(name, shape, rank) for name, shape, rank in linears if rank > min(shape)]
    if narrow:
        name, (tall, wide), rank = narrow[0]
        report.notes.append(
            f"adapter.rank={rank} is above the smaller side of {len(narrow)} of {len(linears)} matrices "
            f"({name} is {tall} x {wide}): the surplus adds nothing there"
        )
    return RankLayout(
        modules=tuple(name for name, _, _ in modules),
        ranks=tuple(rank for _, _, rank in modules),
        in_features=tuple(wide for _, (_, wide), _ in modules),
        out_features=tuple(tall for _, (tall, _), _ in modules),
    )


def _in_full(run: RunConfig, built: BuiltModel, files: ModelFiles, report: Report) -> list[str]:
    """Paths of the modules that are trained in full, as far as the checkpoint's files tell which head is fresh."""
    parts, fresh = built.parts, built.parts.fresh(files.tensors)
    full = parts.trained(run.adapter, fresh)
    if parts.head and not files.tensors and run.adapter.train_head == "auto":
        report.notes.append(f"head {', '.join(parts.head)}: it begins at random values if the checkpoint has none")
    elif fresh and run.adapter.train_head is False:
        report.notes.append(
            f"{', '.join(fresh)} is not in the checkpoint and stands still at random values (adapter.train_head=false)"
        )
    if full:
        report.facts["in_full"] = {"modules": full, "fresh": fresh, "parameters": parts.elements(full)}
    task = run.data.task
    if task is not None and run.model.task in ("sequence-classification", "regression"):
        shapes = {name: info.shape for name, info in files.tensors.items()}
        problem = head_problem(run.model, shapes, parts.head, task.num_labels)
        report.problems += [problem] if problem else []
        stored = files.config.get("id2label")
        kept = files.tensors and not fresh and isinstance(stored, dict) and task.label_names
        problem = label_problem(stored, task.label_names or ()) if kept and isinstance(stored, dict) else None
        report.problems += [problem] if problem else []
    return full


def _shortcuts(run: RunConfig, adaptable: Adaptable, report: Report) -> _Modules:
    chosen, width = run.adapter.shortcuts, report.facts.get("hidden_size")
    if chosen is None or width is None:
        return []
    found = select_shortcuts(shortcut_candidates(list(adaptable.linears)), chosen.modules)
    report.facts["shortcuts"] = len(found)
    return [(name, (width, width), chosen.rank or run.adapter.rank) for name in found]
