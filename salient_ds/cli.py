"""The ``salient-ds`` command. What its subcommands do is in modules of their own, imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from salient_ds.cli_trained import app as trained
from salient_ds.cli_trained import launcher_options
from salient_ds.guide.commands import app as guide
from salient_ds.recipes.commands import app as recipes
from salient_ds.run.changes import ChangeOption
from salient_ds.run.exits import print_problems, reported
from salient_ds.run.search import (
    BatchesOption,
    BudgetOption,
    ModeOption,
    OutputOption,
    ProxyOption,
    RankOption,
    ScaleFreeOption,
    SearchOptions,
    UnitOption,
)  # fmt: skip


class OneLineErrors(typer.Typer):
    """Prints errors that a user can mend in one line, whichever command they come from."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise SystemExit(reported(lambda: super(OneLineErrors, self).__call__(*args, **kwargs) or 0))


app = OneLineErrors(
    name="salient-ds",
    help="Fine-tune language models with adapters whose ranks are decided during training.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(recipes, name="recipes")
app.add_typer(guide)
app.add_typer(trained)


def _print_version(wanted: bool) -> None:
    if wanted:
        from salient_ds import __version__

        print(f"salient-ds {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune language models with adapters whose ranks are decided during training."""


@app.command()
def check(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Replace settings of the run file."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes on all nodes together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Tokenise all rows, not only the first ones.")] = False,
    resume: Annotated[str, typer.Option(help="As it will be given to train.")] = "never",
    overwrite: Annotated[bool, typer.Option(help="As it will be given to train.")] = False,
    master_port: Annotated[int | None, typer.Option(help="As it will be given to train: is it free?")] = None,
    fit: Annotated[str | None, typer.Option(help="Also say what fits into this memory of a GPU, such as 24GB.")] = None,
    nodes: Annotated[
        int, typer.Option(min=0, max=100_000, help="Also model traffic and time of steps and events on so many nodes.")
    ] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=1024, help="With --nodes.")] = 8,
    node_bandwidth: Annotated[
        float, typer.Option(min=0.001, help="With --nodes: GB/s of each GPU to other nodes (400 Gbit/s at 80 %: 40).")
    ] = 40.0,
    gpu_rate: Annotated[
        float, typer.Option(min=0.001, help="With --nodes: TFLOP/s of a GPU in training (measured on an H100: 450).")
    ] = 450.0,
) -> None:
    """Check a run without a GPU: run file, ZeRO JSON, data, model files. Print events, parameters and memory."""
    from salient_ds.check.fit import bytes_of
    from salient_ds.check.printing import run_check
    from salient_ds.check.scale import Cluster
    from salient_ds.check.start import StartOptions

    start = StartOptions(gpus, resume, overwrite, master_port, data)
    cluster = Cluster(gpus_per_node, rate=gpu_rate * 1e12, between=node_bandwidth * 1e9)
    memory = bytes_of(fit) if fit is not None else 0
    raise typer.Exit(run_check(run, overrides, gpus, as_json, start, cluster, nodes, memory))


@app.command()
def train(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Replace settings of the run file."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="Processes on this node (0: all GPUs).")] = 0,
    hostfile: Annotated[str | None, typer.Option(help="File of hosts and slots, one host per line.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port on which the processes meet.")] = None,
    resume: Annotated[
        str, typer.Option(help='"auto" (continue from the last whole checkpoint) or the path of a checkpoint.')
    ] = "never",
    change: ChangeOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in output_dir.")] = False,
) -> None:
    """Check a run, then start it with the deepspeed launcher."""
    from salient_ds.run.verbs import launch

    raise typer.Exit(
        launch(
            run,
            overrides or [],
            launcher=launcher_options(hostfile, master_port),
            resume=resume,
            changes=change or [],
            overwrite=overwrite,
            processes=gpus,
        )
    )


@app.command()
def doctor(
    hostfile: Annotated[str | None, typer.Option(help="File of hosts and slots; without it: this machine.")] = None,
    shared: Annotated[str, typer.Option(help="Directory that all nodes should share.")] = ".",
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Port on which the processes will meet.")] = 29500,
    pairs: Annotated[bool, typer.Option(help="Measure an all-reduce between pairs of nodes.")] = True,
) -> None:
    """Look at the nodes before a run does, and say which one is wrong: ssh, versions, GPUs, names, ports, bandwidth."""
    from salient_ds.doctor.command import doctor as body

    raise typer.Exit(body(hostfile, shared, master_port, pairs))


@app.command("last-step", hidden=True)
def last_step(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """Print the step of the newest checkpoint in the run's output_dir, 0 if there is none. launch/train.sh asks."""
    from salient_ds.run.verbs import last_step as body

    raise typer.Exit(body(run, overrides or []))


@app.command()
def search(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Replace settings of the run file."),
    ] = None,
    proxy: ProxyOption = "grad_norm",
    batches: BatchesOption = 32,
    budget: BudgetOption = 0.25,
    unit: UnitOption = "modules",
    mode: ModeOption = "combined",
    scale_free: ScaleFreeOption = False,
    rank: RankOption = None,
    output: OutputOption = None,
    gpus: Annotated[int, typer.Option(min=0, help="Processes on this node (0: all GPUs).")] = 0,
    hostfile: Annotated[str | None, typer.Option(help="File of hosts and slots, one host per line.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port on which the processes meet.")] = None,
) -> None:
    """Score all modules before training and write a run file that trains only the best of them (HeteroLoRA)."""
    from salient_ds.run.verbs import search as body

    options = SearchOptions(
        proxy=proxy,
        batches=batches,
        budget=budget,
        unit=unit,
        mode=mode,
        scale_free=scale_free,
        rank=rank,
        output=output,
    )
    raise typer.Exit(body(run, overrides or [], options, launcher_options(hostfile, master_port), gpus))


@app.command()
def sweep(
    spec: Annotated[str, typer.Argument(metavar="SPEC.yaml", help="Sweep file: arms, learning rates, seeds.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the plan and start nothing.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=0, help="Processes at once on this machine (default: as the sweep file says).")
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Be one more process of a sweep that was started elsewhere.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the runs of arms that have changed.")] = False,
) -> None:
    """Tune learning rates of several arms on one seed, then compare the arms on fresh seeds."""
    from salient_ds.sweep.command import sweep as body

    raise typer.Exit(body(spec, dry_run=dry_run, jobs=jobs, worker=worker, overwrite=overwrite))


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write (default: print it).")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Of sweep files instead of run files.")] = False,
    built_in: Annotated[bool, typer.Option("--built-in", help="Leave out methods of other packages.")] = False,
) -> None:
    """Print the JSON schema of run files, for editors: completion, hover text, errors while typing."""
    from salient_ds.guide.schema import language_server_line
    from salient_ds.guide.schema import schema_text as of_runs
    from salient_ds.sweep.schema import schema_text as of_sweeps

    text = of_sweeps(built_in) if sweep else of_runs(built_in)
    if output is None:
        print(text, end="")
        return
    output.write_text(text, encoding="utf-8")
    kind = "sweep" if sweep else "run"
    print(f"{output}; editors find it by a first line in the {kind} file: {language_server_line(output)}")


@app.command("convert-toml")
def convert_toml(
    lora: Annotated[str, typer.Argument(metavar="LORA.toml", help="LoRA settings of the released HeteroLoRA code.")],
    shortcuts: Annotated[str | None, typer.Option(help="Shortcut settings of that code (ags_*.toml).")] = None,
    model: Annotated[str, typer.Option(help="model_type of the model's config.json, e.g. opt or llama.")] = "opt",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers (for files per layer).")] = None,
    norm: Annotated[str, typer.Option(help="norm_after_shortcut: reuse (as the released code) or none.")] = "none",
    output: Annotated[str | None, typer.Option("--output", "-o", help="YAML file (default: print it).")] = None,
) -> None:
    """Convert TOML settings of the released HeteroLoRA code to an adapter section for a run file."""
    from salient_ds.run.verbs import convert_toml as body

    if norm not in ("none", "reuse"):
        print_problems([f"--norm {norm!r} is unknown: choose none or reuse"])
        raise typer.Exit(2)
    raise typer.Exit(body(lora, shortcuts, model, layers, norm, output))


@app.command()
def show(run: Annotated[str, typer.Argument(help="Run directory.")]) -> None:
    """Show the allocation events of a run and the rank that every matrix kept."""
    from salient_ds.run.verbs import show as body

    raise typer.Exit(body(run))


@app.command(
    "mt-bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def mt_bench(context: typer.Context) -> None:
    """MT-Bench: generate, judge, report, agree, doctor (`salient-ds mt-bench --help`)."""
    from salient_eval.mt_bench.cli import app as evaluation

    evaluation(args=context.args, prog_name="salient-ds mt-bench")


if __name__ == "__main__":
    app()
