"""The command ``salient-ds recipes``: list, show, write. No torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from salient_ds.recipes.book import RUN_HERE, ZERO, Recipe, recipe, recipes, zero_json

app = typer.Typer(help="Run files for the tables of the papers.", no_args_is_help=False, add_completion=False)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Such as glue/mnli/salientlora.")]


@app.callback(invoke_without_command=True)
def listing(
    context: typer.Context,
    like: Annotated[str, typer.Option(help="Only recipes whose name has this in it, such as glue/mnli.")] = "",
) -> None:
    """List the recipes with the published numbers, show one, or write one to a file."""
    if context.invoked_subcommand is not None:
        return
    chosen = [found for name, found in recipes().items() if like in name]
    if not chosen:
        _stop(f"no recipe has {like!r} in its name; `salient-ds recipes` lists all {len(recipes())}")
    names, models = (max(len(getattr(found, part)) for found in chosen) for part in ("name", "model"))
    for found in chosen:
        print(f"{found.name:{names}}  {found.model:{models}}  {found.published}")
    print(f"{len(chosen)} recipes. Run here: {RUN_HERE}. `salient-ds recipes show NAME` prints a run file.")


@app.command()
def show(name: NameArgument) -> None:
    """Print the complete run file of a recipe, with the published number and its source."""
    print(_found(name).text(), end="")


@app.command()
def write(
    name: NameArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Run file to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Write the run file of a recipe, and the DeepSpeed JSON that it names beside it."""
    found = _found(name)
    if not output.parent.is_dir():
        _stop(f"there is no folder {output.parent} for {output.name}: create it, or choose another place")
    files = {output: found.text().replace("salient_ds.train FILE", f"salient_ds.train {output}"),
             output.parent / ZERO: zero_json()}  # fmt: skip
    for path, text in files.items():
        if path.is_dir():
            _stop(f"{path} is a folder: give a file")
        if path.exists() and not overwrite and path.read_text(encoding="utf-8", errors="replace") != text:
            _stop(f"{path} exists and holds something else: choose another file, or add --overwrite")
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    print(f"{output} and {output.parent / ZERO}; next: salient-ds check {output}")


def _found(name: str) -> Recipe:
    try:
        return recipe(name)
    except ValueError as error:
        _stop(str(error))
        raise AssertionError from error  # not reached


def _stop(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise typer.Exit(2)
