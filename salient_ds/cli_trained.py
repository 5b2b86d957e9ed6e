"""The commands for what was trained: evaluate, export, shrink. ``cli.py`` joins them to the others."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_show_locals=False)


def launcher_options(hostfile: str | None, master_port: int | None) -> list[str]:
    """What the deepspeed launcher is told about the nodes."""
    options = ["--hostfile", hostfile] if hostfile else []
    return options + (["--master_port", str(master_port)] if master_port else [])


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(help="Run directory, exported adapter (ours or any of PEFT's), merged or plain model.")
    ],
    task: Annotated[
        str | None, typer.Option(help="Task such as glue/rte, or a YAML file with one (default: the target's own).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score (default: those of --split).")] = None,
    split: Annotated[str, typer.Option(help="eval, test (no labels: predictions only) or train.")] = "eval",
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the base model beside it.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write (default: RUN/evaluation, TARGET-evaluation).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens per row (default: as in training).")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (default: the run's, else fp32).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only so many rows.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
    gpus: Annotated[int, typer.Option(min=0, help="Processes on this node (0: all GPUs).")] = 1,
    hostfile: Annotated[str | None, typer.Option(help="File of hosts and slots, one host per line.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port on which the processes meet.")] = None,
) -> None:
    """Score a run, an adapter or a model on a task; write evaluation.json and predictions.jsonl."""
    from salient_ds.run.exits import print_problems
    from salient_ds.run.targets import EvaluateOptions
    from salient_ds.run.verbs import evaluate as body

    for name, value, allowed in (
        ("split", split, ("eval", "test", "train")),
        ("precision", precision, (None, "fp32", "bf16", "fp16")),
    ):
        if value not in allowed:
            print_problems([f"--{name} {value!r} is unknown: choose {', '.join(filter(None, allowed))}"])
            raise typer.Exit(2)
    options = EvaluateOptions(
        task, data, split, base, baseline, output, overwrite, batch, max_length, precision, limit
    )  # fmt: skip
    raise typer.Exit(body(target, options, launcher_options(hostfile, master_port), gpus))


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, finished or not.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Page to write (default: RUN/report.html).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is no report.")] = False,
) -> None:
    """Write one HTML page about a run: curves, events, ranks over time, data, timing, memory, environment, settings."""
    from pathlib import Path

    from salient_ds.monitor.run_page import write_report

    path, problems = write_report(Path(run), Path(output) if output else None, overwrite)
    for problem in problems:
        print(f"note: {problem}")
    print(path)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run directory, or one of its checkpoints.")],
    form: Annotated[
        str | None,
        typer.Option(
            help="ragged (each module at its own rank; also: peft), padded (all at one rank), gguf (for llama.cpp), "
            "merged or shortcuts. Default: padded where that costs less than 1.5 times the size, else ragged."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write (default: RUN/export-FORM).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the tensors: float32, bfloat16 or float16 (default: float32; a merged model: as stored)."
        ),
    ] = None,
    pad_to: Annotated[
        str | None, typer.Option(help='Rank of form padded: a number, or "vllm" for the next one that vLLM accepts.')
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
) -> None:
    """Write the trained adapter for PEFT, vLLM, SGLang or llama.cpp, or a merged model."""
    from salient_ds.run.exits import print_problems
    from salient_ds.run.verbs import export as body

    for name, value, allowed in (
        ("form", form, (None, "ragged", "peft", "padded", "gguf", "merged", "shortcuts")),
        ("dtype", dtype, (None, "float32", "bfloat16", "float16")),
    ):
        if value not in allowed:
            print_problems([f"--{name} {value!r} is unknown: choose {', '.join(filter(None, allowed))}"])
            raise typer.Exit(2)
    raise typer.Exit(body(run, form, output, overwrite=overwrite, base=base, dtype=dtype, pad_to=pad_to))


@app.command()
def shrink(
    adapter: Annotated[str, typer.Argument(help="PEFT LoRA adapter, whoever trained it; or a run directory.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    rank: Annotated[float | None, typer.Option(help="Mean rank per module to keep; may be a fraction.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the squared singular values to keep, such as 0.99.")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Number of adapter parameters to keep at most: 5M, 300k or 5000000.")
    ] = None,
    uniform: Annotated[bool, typer.Option(help="Cut every module to the same rank (the baseline).")] = False,
    form: Annotated[
        str | None,
        typer.Option(
            help="ragged (each module at its own rank; also: peft) or padded (all at one rank). Default: padded where "
            "that costs less than 1.5 times the size, else ragged."
        ),
    ] = None,
    pad_to: Annotated[
        str | None, typer.Option(help='Rank of form padded: a number, or "vllm" for the next one that vLLM accepts.')
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the factors: float32, bfloat16 or float16 (default: as stored).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
) -> None:
    """Cut a trained LoRA adapter to lower ranks, by one threshold over the singular values of all modules (PARA)."""
    from salient_ds.run.exits import print_problems
    from salient_ds.run.shrink import ShrinkOptions
    from salient_ds.run.shrink import shrink as body

    for name, value, allowed in (
        ("form", form, (None, "ragged", "peft", "padded")),
        ("dtype", dtype, (None, "float32", "bfloat16", "float16")),
    ):
        if value not in allowed:
            print_problems([f"--{name} {value!r} is unknown: choose {', '.join(filter(None, allowed))}"])
            raise typer.Exit(2)
    options = ShrinkOptions(rank, energy, parameters, uniform, form, pad_to, dtype, overwrite)
    raise typer.Exit(body(adapter, output, options))


BaseOption = Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")]
TemplateOption = Annotated[
    str | None, typer.Option(help="Prompt template, if nothing says which (default: of training).")
]
PrecisionOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (default: bf16 on GPUs, else fp32).")]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0: always the most probable token.")]
SystemOption = Annotated[str | None, typer.Option(help="System message.")]
CompareOption = Annotated[bool, typer.Option("--compare", help="Ask the base model too.")]
PlaceArgument = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run, adapter, merged or plain model: a folder or a hub name.")
]


@app.command()
def chat(
    place: PlaceArgument,
    compare: CompareOption = False,
    base: BaseOption = None,
    template: TemplateOption = None,
    precision: PrecisionOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    system: SystemOption = None,
) -> None:
    """Talk to what was trained, with the template of training; answers appear as they are made."""
    from salient_ds.run.talk import TalkOptions
    from salient_ds.run.talk import chat as body

    _check_precision(precision)
    raise typer.Exit(
        body(place, TalkOptions(base, template, precision, max_new_tokens, temperature, seed, system, compare))
    )


@app.command()
def generate(
    place: PlaceArgument,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to answer.")] = None,
    file: Annotated[
        str | None, typer.Option(help="Prompts: a line each, or JSON lines with prompt, instruction or messages.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="JSON lines to write (default: answers are printed).")
    ] = None,
    compare: CompareOption = False,
    base: BaseOption = None,
    template: TemplateOption = None,
    precision: PrecisionOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    system: SystemOption = None,
) -> None:
    """Answer prompts with what was trained, with the template of training."""
    from salient_ds.run.talk import TalkOptions
    from salient_ds.run.talk import generate as body

    _check_precision(precision)
    options = TalkOptions(base, template, precision, max_new_tokens, temperature, seed, system, compare)
    raise typer.Exit(body(place, prompts or [], file, output, options))


def _check_precision(value: str | None) -> None:
    from salient_ds.run.exits import print_problems

    if value not in (None, "fp32", "bf16", "fp16"):
        print_problems([f"--precision {value!r} is unknown: choose fp32, bf16, fp16"])
        raise typer.Exit(2)


@app.command()
def push(
    place: Annotated[str, typer.Argument(metavar="RUN", help="Finished run, exported adapter or merged model.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Repository on the hub: owner/name, or name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Name of the base model on the hub, if it was trained from a folder.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload what was trained to the Hugging Face hub (log in with `hf auth login`, or set HF_TOKEN)."""
    from salient_ds.run.push import push as body

    raise typer.Exit(body(place, name, private=private, base=base, message=message))
