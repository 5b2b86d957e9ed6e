"""Static search of modules (HeteroLoRA): scores all modules of a run once, before training.

It writes the configuration of a run that trains only the best modules. It works on one process, or under a launcher:
``deepspeed --module salient_ds.search run.yaml --proxy grad_norm ...``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, load_config, parse_config
from salient_ds.run.exits import known, sentences
from salient_ds.run.process import join_described_group, launched, refused

if TYPE_CHECKING:
    import torch


ProxyOption = Annotated[
    str, typer.Option(help="How modules are scored: grad_norm, snip, synflow, fisher, alpha_test or constant.")
]
BatchesOption = Annotated[int, typer.Option(min=1, help="Number of training batches that modules are scored on.")]
BudgetOption = Annotated[
    float, typer.Option(help="Share of the modules (or of their parameters) to keep, above 0 and up to 1.")
]
UnitOption = Annotated[str, typer.Option(help="What --budget counts: modules or params.")]
ModeOption = Annotated[
    str,
    typer.Option(
        help="Shortcuts compete with LoRA modules (combined), among themselves (separated), or are always on (off)."
    ),
]
ScaleFreeOption = Annotated[bool, typer.Option("--scale-free", help="Divide the scaling alpha / r out of the scores.")]
RankOption = Annotated[
    int | None, typer.Option(min=1, help="Rank of the chosen modules (default: as in the run file).")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", help="Folder for the results (default: OUTPUT_DIR-search).")
]


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search on the command line. The ``Option`` types above describe them."""

    proxy: str = "grad_norm"
    batches: int = 32
    budget: float = 0.25
    unit: str = "modules"
    mode: str = "combined"
    scale_free: bool = False
    rank: int | None = None
    """Rank of the chosen modules; None: as in the run file."""
    output: str | None = None


def search_config(run: RunConfig, options: SearchOptions) -> RunConfig:
    """The run with method HeteroLoRA and a search before the first step.

    If the run's method is HeteroLoRA already, its other options are kept.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """
    data = run.model_dump(mode="json", by_alias=True, exclude_unset=True)
    own = data["method"] if run.method.name == "heterolora" else {}
    data["method"] = own | {
        "name": "heterolora", "proxy": options.proxy, "probe_batches": options.batches, "keep": options.budget,
        "budget_unit": options.unit, "mode": options.mode, "scale_free": options.scale_free, "constant_epochs": 0,
        "interval": 1, "interval_unit": "steps",
    }  # fmt: skip
    return parse_config(data)


def next_method(run: RunConfig) -> dict[str, Any] | None:
    """Section ``method`` of the resulting configuration: the run's own, or None (LoRA) if that is HeteroLoRA."""
    if run.method.name == "heterolora":
        return None
    return run.method.model_dump(mode="json", by_alias=True, exclude_unset=True)


def main(
    run: Annotated[str, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace settings of the run file.")
    ] = None,
    proxy: ProxyOption = "grad_norm",
    batches: BatchesOption = 32,
    budget: BudgetOption = 0.25,
    unit: UnitOption = "modules",
    mode: ModeOption = "combined",
    scale_free: ScaleFreeOption = False,
    rank: RankOption = None,
    output: OutputOption = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Score the modules of a run and write the configuration that trains the best of them."""
    join_described_group(local_rank)
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
    raise SystemExit(run_search(run, overrides or [], options))


def run_search(path: str, overrides: list[str], options: SearchOptions) -> int:
    """Search on the processes that the launcher started, and return the exit status."""
    try:
        run = load_config(path, overrides)
        config = search_config(run, options)
        problems = preflight(config, int(os.environ.get("WORLD_SIZE", "1")), quick=True, run_source=path).problems
    except known() as error:
        problems = [_as_typed(problem) for problem in sentences(error)]
    return refused(problems) or launched(
        lambda device: _search(run, config, options, device), config.train.timeout_minutes
    )


def _as_typed(problem: str) -> str:
    """Replace keys of the method in a message by the command-line options that set them."""
    for option, key in (("proxy", "proxy"), ("budget", "keep"), ("unit", "budget_unit"), ("mode", "mode")):
        problem = problem.replace(f"method.{key}=", f"--{option} ")
    return problem


def _search(run: RunConfig, config: RunConfig, options: SearchOptions, device: torch.device) -> None:
    from salient_ds.heterolora.probe_events import ProbeEvents
    from salient_ds.heterolora.probing import ProbingMethod
    from salient_ds.heterolora.results import write_search
    from salient_ds.run.same_everywhere import agreed, setup_facts
    from salient_ds.run.training import Training
    from salient_ds.zero.collectives import all_succeeded

    agreed(lambda: setup_facts(config), device)
    training = Training(config, device)
    training.load_data()
    training.build()  # nothing is written to the run's directory
    engine, method = training.engine, training.engine.method
    assert isinstance(method, ProbingMethod)
    assert isinstance(engine.before, ProbeEvents)
    engine.before.take(method.searches[0])
    folder = Path(options.output or f"{run.output_dir.rstrip('/')}-search")
    written: dict[str, Any] | None = {}
    if training.is_main:
        written = write_search(folder, run, method.record, options.rank, next_method(run))
    if not all_succeeded(written is not None, device):
        reason = method.record.history[-1].get("skipped", "")
        raise ValueError(f"nothing was chosen: {reason}; use train.precision=bf16 or fp32, or another proxy")
    training.say(f"chosen: {folder / 'final.yaml'}")
