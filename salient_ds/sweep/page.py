"""The report of a sweep as one self-contained HTML page. Every value from outside is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_ds.sweep import plots
from salient_ds.sweep.spec import lr_text

_TEMPLATE = "report.html.j2"


def to_html(found: dict[str, Any]) -> str:
    """Render the page.

    Args:
        found: from :func:`salient_ds.sweep.report.collect`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(number=number, signed=signed, rate=rate, count=count, gib=gib, seconds=seconds)
    metric = found["metric"]["name"]
    figures = {
        "rates": plots.over_rates(found["arms"], metric),
        "differences": plots.differences(found["comparisons"], metric, found["baseline"]),
    }
    pictures = {name: plots.data_uri(figure) for name, figure in figures.items() if figure is not None}
    return environment.get_template(_TEMPLATE).render(s=found, metric=metric, pictures=pictures)


def number(value: float | None) -> str:
    """Four significant digits; a dash for what is unknown."""
    return "–" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}"


def rate(value: float | None) -> str:
    return "–" if value is None else lr_text(value)


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def gib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:.2f} GiB"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"
