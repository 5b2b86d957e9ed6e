"""Which matrices a run adapts, known before its model is loaded. No torch."""

from __future__ import annotations

from salient_ds.adapters.adaptable import Adaptable
from salient_ds.adapters.rank_pattern import ranks_of
from salient_ds.adapters.targets import select_shortcuts, shortcut_candidates
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig
from salient_ds.ranks import RankLayout

_Modules = list[tuple[str, tuple[int, int], int]]


def target_layout(run: RunConfig, adaptable: Adaptable, report: Report) -> RankLayout:
    """The adapted layers, then the shortcuts, at their initial ranks.

    Adds the facts modules and shortcuts, and notes on layers that one could expect and are left out.

    Raises:
        ValueError: ``adapter.target_modules``, ``adapter.rank_pattern`` or ``adapter.shortcuts`` matches nothing.
    """
    rank, wanted = run.adapter.rank, run.adapter.target_modules
    linears: _Modules = []
    if wanted or not run.adapter.shortcuts:
        ranks = ranks_of(adaptable.select(wanted), rank, run.adapter.rank_pattern)
        linears = [(name, adaptable.linears[name], rank) for name, rank in ranks.items() if rank]
        report.notes.extend(adaptable.notes(wanted))
    modules = linears + _shortcuts(run, adaptable, report)
    report.facts["modules"] = len(modules)
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


def _shortcuts(run: RunConfig, adaptable: Adaptable, report: Report) -> _Modules:
    chosen, width = run.adapter.shortcuts, report.facts.get("hidden_size")
    if chosen is None or width is None:
        return []
    found = select_shortcuts(shortcut_candidates(list(adaptable.linears)), chosen.modules)
    report.facts["shortcuts"] = len(found)
    return [(name, (width, width), chosen.rank or run.adapter.rank) for name in found]
