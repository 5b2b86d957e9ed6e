"""Prints what :func:`salient_ds.check.token_sample.check_tokens` found. No torch."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_tokens(out: Console, tokens: dict[str, Any]) -> None:
    """Percentiles of lengths, the truncated share, and an example with its trained tokens in colour and in marks."""
    few = "" if tokens["rows"] is None else f", the first {tokens['examples']} examples"
    table = Table(title=f"tokens per example{few}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for percentile in tokens["lengths"]:
        name = {"50": "median", "100": "longest"}.get(percentile, f"{percentile} %")
        table.add_column(name, justify="right")
    table.add_row("in all", *map(str, tokens["lengths"].values()))
    table.add_row("trained on", *map(str, tokens["targets"].values()))
    table.caption = (
        f"{tokens['truncated']:.1%} are cut at data.max_length; {tokens['dropped']:.1%} keep no answer token"
    )
    table.caption_justify = "left"
    out.print(table)
    if tokens["example"]:
        text = Text("an example, what is trained on between >> and <<:\n", style="bold")
        for piece in tokens["example"]:
            shown = f">>{piece['text']}<<" if piece["trained"] else piece["text"]
            text.append(shown, style="not bold green" if piece["trained"] else "not bold dim")
        out.print(text)
        out.print()
