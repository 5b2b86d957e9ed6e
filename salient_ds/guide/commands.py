"""The commands for the first minutes: init, options, templates. Bodies are imported when they are called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
def init(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, or a name on the Hub.")] = None,
    data: Annotated[str | None, typer.Option(help="A .json, .jsonl or .parquet file, or a `datasets` name.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs on all nodes together; 0: one CPU process (default: those here).")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 80GB (default: look).")] = None,
    method: Annotated[str | None, typer.Option(help="Method that decides the ranks (default: salientlora).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run file to write; nothing is overwritten.")] = Path(
        "run.yaml"
    ),
) -> None:
    """Write a run file for your model, data and GPUs. Asks for what is not given; chooses by the memory estimate."""
    from salient_ds.guide.answers import collect
    from salient_ds.guide.init import refuse_present, write_run
    from salient_ds.guide.printing import print_init

    refuse_present(output)
    ask = typer.prompt if sys.stdin.isatty() else None
    answers = collect(model, data, gpus, gpu_memory, method, ask)
    run, report, notes = write_run(answers, output)
    raise typer.Exit(print_init(output, answers, run, report, notes))


@app.command()
def options(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Option or section, such as train.lr.")] = None,
    built_in: Annotated[bool, typer.Option("--built-in", help="Leave out methods of other packages.")] = False,
) -> None:
    """Explain the options of a run file: all of them as Markdown, or those under KEY."""
    from salient_ds.guide.options_page import options_of, options_page

    print(options_page(built_in) if key is None else options_of(key), end="")


@app.command()
def templates(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One template (default: all of ours).")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name: render with its tokens and its chat template.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="FastChat's templates too.")] = False,
) -> None:
    """List the prompt templates, each with a rendered sample in which the trained parts are marked."""
    from rich.console import Console

    from salient_ds.guide.templates import print_templates, samples, tokenizer_of

    loaded = None if tokenizer is None else tokenizer_of(tokenizer)
    print_templates(Console(highlight=False), samples(name, everything, loaded))
