"""``salient-ds report``: one self-contained HTML page about a run. Every value from outside is escaped. No torch."""

from __future__ import annotations

import datetime
from pathlib import Path
from statistics import median
from typing import Any

import salient_ds
from salient_ds.monitor import curves
from salient_ds.monitor.run_facts import RunFacts, flat, gather, is_number
from salient_ds.own_files import write_whole
from salient_ds.strict import ConfigError

_TEMPLATE = "run_page.html.j2"
_MARK = 'content="width=device-width, initial-scale=1">\n<title>Run '
"""Text by which a report of ours is known, so that only such a file is replaced."""


def write_report(run: Path, output: Path | None, overwrite: bool = False) -> tuple[Path, list[str]]:
    """Write the page.

    Args:
        output: file to write (default: report.html in the run).

    Returns:
        The file, and a sentence for everything that could not be used.

    Raises:
        RunDirectoryError: ``run`` is no run directory.
        ConfigError: ``output`` is there and is no report of ours.
    """
    found = gather(run)
    target = output or run / "report.html"
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError([f"{target} cannot be written: give a file in a folder that is there"])
    if target.exists() and not overwrite and _MARK not in target.read_text(encoding="utf-8", errors="replace")[:400]:
        raise ConfigError([f"{target} is there and is no report: choose another file, or add --overwrite"])
    write_whole(target, to_html(found))
    return target, found.problems


def to_html(found: RunFacts) -> str:
    """Render the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    template = found.facts.get("template")
    sample = template.get("sample") if isinstance(template, dict) else None
    finished = found.facts.get("finished") is not None
    return environment.get_template(_TEMPLATE).render(
        r=found,
        state=_state(found),
        finished=finished,
        summary=_summary(found),
        pictures=_pictures(found),
        data=_data(found),
        sample=sample,
        environment=flat(_section(found.facts, "environment")),
        settings=flat(found.settings),
        ds_config=flat(found.ds_config),
        changes=_changes(found),
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=salient_ds.__version__,
    )


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _state(found: RunFacts) -> str:
    finished, total = found.facts.get("finished"), found.facts.get("total_steps")
    if finished is not None:
        return f"finished after step {finished}" + (f" of {total}" if total not in (None, finished) else "")
    last = max((row["step"] for row in found.metrics), default=0)
    return f"not finished: step {last} of {'?' if total is None else total} is the last that was logged"


def _summary(found: RunFacts) -> list[tuple[str, str]]:
    s, rows = found.summary, []
    method, model = _section(found.settings, "method").get("name"), _section(found.settings, "model").get("path")
    rows += [("model", str(model))] if model else []
    rows += [("method", f"{method} on {len(found.modules)} matrices")] if method else []
    if is_number(found.facts.get("processes")):
        rows.append(("processes", str(found.facts["processes"])))
    for label, key, form in (
        ("last training loss", "loss", "{:.4f}"),
        ("total rank", "total_rank", "{:,}"),
        ("tokens since the last start", "tokens", "{:,}"),
        ("seconds since the last start", "seconds", "{:,.1f}"),
        ("tokens per second, mean", "tokens_per_second", "{:,.0f}"),
        ("skipped steps", "skipped_steps", "{:,}"),
    ):
        if is_number(s.get(key)):
            rows.append((label, form.format(s[key])))
    speeds = found.series("tokens_per_second")[1]
    if speeds:
        rows.append(("tokens per second, median of logged steps", f"{median(speeds):,.0f}"))
    used = found.series("mfu")[1]
    if used:
        rows.append(("MFU, median of logged steps", f"{median(used):.1%}"))
    memory = found.series("memory")[1]
    if memory:
        rows.append(("memory of the main process, highest logged", f"{max(memory) / 2**30:.2f} GiB"))
    if found.records:
        took = sum(r.seconds_gather + r.seconds_solve + r.seconds_apply for r in found.records)
        rows.append(("allocation events", f"{len(found.records)} in {took:.3f} s"))
    rows += [(f"held out: {key}", value) for key, value in flat(_section(s, "evaluation"))]
    rows += [(f"best: {key}", value) for key, value in flat(_section(s, "best"))]
    rows += [(f"evaluate: {key}", value) for key, value in flat(found.evaluation)]
    rows += [(f"speed: {key}", value) for key, value in flat(_section(s, "speed"))]
    return rows


def _data(found: RunFacts) -> list[tuple[str, str]]:
    rows = flat(_section(found.facts, "data"))
    if rows:
        return rows
    return flat(_section(_section(found.facts, "identity"), "data_settings"))


def _changes(found: RunFacts) -> list[tuple[str, str]]:
    changes = found.facts.get("changes")
    rows: list[tuple[str, str]] = []
    for number, change in enumerate(changes if isinstance(changes, list) else [], 1):
        if isinstance(change, dict):
            rows += flat(change, f"{number}. ")
    return rows


def _pictures(found: RunFacts) -> dict[str, str]:
    figures = {"curves": curves.curves(found), "strip": curves.rank_strip(found)}
    pictures = {name: curves.data_uri(figure) for name, figure in figures.items() if figure is not None}
    ranks = found.records[-1].ranks if found.records else found.start_ranks()
    if ranks and found.modules:
        pictures["map"] = _map(dict(zip(found.modules, ranks, strict=True)))
    return pictures


def _map(ranks: dict[str, int]) -> str:
    import base64
    import tempfile

    from salient_ds.monitor.heatmap import save_rank_png

    with tempfile.TemporaryDirectory() as folder:
        path = save_rank_png(ranks, Path(folder) / "ranks.png")
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
