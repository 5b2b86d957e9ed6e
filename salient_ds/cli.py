"""The ``salient-ds`` command. Verbs live in modules of their own and are imported when they are called."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="salient-ds",
    help="Fine-tune language models with adapters whose ranks are decided during training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Fine-tune language models with adapters whose ranks are decided during training."""


@app.command()
def check(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Overrides.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes, all nodes together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Validate a run without GPUs: config, ZeRO JSON, data, model files; print events, parameters and memory."""
    from salient_ds.check import run_check

    raise typer.Exit(run_check(run, overrides, gpus, as_json))


@app.command()
def train(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Overrides.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="Processes on this node (0: all GPUs).")] = 0,
    hostfile: Annotated[str | None, typer.Option(help="Hosts and slots, one per line, for several nodes.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port of the rendezvous.")] = None,
    resume: Annotated[str, typer.Option(help='"auto": go on from the last whole checkpoint; or its path.')] = "never",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in output_dir.")] = False,
) -> None:
    """Check a run, then start it with the deepspeed launcher."""
    from salient_ds.run_verbs import launch

    launcher = ["--hostfile", hostfile] if hostfile else []
    launcher += ["--master_port", str(master_port)] if master_port else []
    raise typer.Exit(launch(run, overrides or [], launcher, resume, overwrite, gpus))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run directory, or one of its checkpoints.")],
    form: Annotated[str, typer.Option(help="peft (own rank per matrix), padded (one rank) or merged.")] = "peft",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Target (default: RUN/export-FORM).")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for adapters.")] = "float32",
    pad_to: Annotated[
        str | None, typer.Option(help='padded: a rank, or "vllm" for the next one that vLLM takes.')
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the target.")] = False,
) -> None:
    """Write the trained adapter for PEFT or vLLM, or a merged model."""
    from salient_ds.run_verbs import export as body
    from salient_ds.run_verbs import print_problems

    for name, value, allowed in (
        ("form", form, ("peft", "padded", "merged")),
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
    ):
        if value not in allowed:
            print_problems([f"--{name} {value!r} is unknown: choose {', '.join(allowed)}"])
            raise typer.Exit(2)
    raise typer.Exit(body(run, form, output, overwrite, base, dtype, pad_to))


@app.command()
def show(run: Annotated[str, typer.Argument(help="Run directory.")]) -> None:
    """Show the allocation events of a run and the rank that every matrix kept."""
    from salient_ds.run_verbs import show as body

    raise typer.Exit(body(run))


@app.command(
    "mt-bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def mt_bench(context: typer.Context) -> None:
    """MT-Bench: judge, report, agree, doctor (`salient-ds mt-bench --help`)."""
    from salient_eval.mt_bench.cli import app as evaluation

    evaluation(args=context.args, prog_name="salient-ds mt-bench")


if __name__ == "__main__":
    app()
