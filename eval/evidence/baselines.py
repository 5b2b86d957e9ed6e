"""Baselines of a sweep that are no run of ours: PEFT's LoRA in a plain loop, and PARA (wide LoRA, cut when trained).

    python eval/evidence/baselines.py peft SWEEP.yaml --lrs 2e-3,4e-3,8e-3 --out peft.csv
    python eval/evidence/baselines.py para SWEEP.yaml --out para.csv

Both read the sweep's file: the same model, rows, batches in the same order, steps, schedule, clipping and seeds. The
PEFT loop compiles every layer, and keeps fp32 adapters under autocast, as PEFT does by default.
"""

from __future__ import annotations

import contextlib
import csv
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from salient_ds.adapters.packed_model import layer_of
from salient_ds.adapters.survey import survey
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.engine.build import scheduler_factory
from salient_ds.export.lora_folder import LoraFolder
from salient_ds.export.shrink import plan_cut
from salient_ds.export.shrunk_folder import write_shrunk
from salient_ds.models.heads import pad_with
from salient_ds.models.loading import DTYPES, PEFT_TASK_TYPES, load_base, load_tokenizer
from salient_ds.run.applying import add_adapter
from salient_ds.run.evaluating import Speaker, evaluate
from salient_ds.run.inputs import Inputs, load_inputs, micro_batches
from salient_ds.salience.spectral_cut import Cut
from salient_ds.sweep.arms import arm_runs, fresh_data, job_run
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.plan import Job
from salient_ds.sweep.spec import SweepSpec, load_spec
from salient_ds.zero.environment import start

app = typer.Typer(add_completion=False)
Sweep = Annotated[Path, typer.Argument(exists=True, help="A file that arms.py has written.")]
Out = Annotated[Path, typer.Option(help="CSV file to write, a row per run.")]


class Problem:
    """The data and the settings that the runs of a sweep share."""

    def __init__(self, spec_path: Path, arm: str) -> None:
        self.spec: SweepSpec = load_spec(spec_path)
        self.run = arm_runs(self.spec, spec_path)[arm]
        self.fresh = fresh_data(self.spec, spec_path)
        self.device = start(10.0)
        self._inputs: dict[str, Inputs] = {}

    def config(self, lr: float, seed: int, fresh: bool) -> RunConfig:
        """The settings of one run, as the sweep would write them."""
        return parse_config(job_run(self.run, lr, seed, Path("unused"), self.fresh if fresh else None))

    def inputs(self, config: RunConfig, tokenizer: Any) -> Inputs:
        key = str(config.data.eval)
        if key not in self._inputs:
            self._inputs[key] = load_inputs(config, tokenizer)
        return self._inputs[key]

    def held_out(self, model: Any, inputs: Inputs, config: RunConfig, tokenizer: Any) -> dict[str, float]:
        """Held-out loss and metrics of ``model``."""
        model.eval()
        with autocast(config, self.device):
            speaker = Speaker(model, lambda **settings: model.generate(**settings))  # classifiers cannot
            found = evaluate(inputs, speaker, config.train.micro_batch_size, self.device, tokenizer)
        model.train()
        return {f"eval_{name}": value for name, value in found.values.items()}


def autocast(config: RunConfig, device: torch.device) -> Any:
    low = config.train.precision != "fp32"
    return torch.autocast(device.type, DTYPES[config.train.precision]) if low else contextlib.nullcontext()


def base_model(config: RunConfig, inputs: Inputs) -> tuple[nn.Module, tuple[str, ...]]:
    """The base and the names of its new parameters. The same seed draws the same head as in our runs."""
    torch.manual_seed(config.train.seed)
    base = load_base(config.model, config.train, {}, inputs.labels)
    pad_with(base.model, inputs.collator.pad_token_id)
    return base.model, base.fresh


class PeftLoRA:
    """A PEFT model that is set back for every run, so that its layers are compiled once."""

    def __init__(self, problem: Problem, compiled: bool) -> None:
        from peft import LoraConfig, get_peft_model

        self.problem = problem
        config = problem.config(1e-3, 0, False)
        self.tokenizer = load_tokenizer(config.model)
        inputs = problem.inputs(config, self.tokenizer)
        model, self.fresh = base_model(config, inputs)
        chosen = survey(model).select(config.adapter.target_modules)
        heads = sorted({name.split(".")[0] for name in self.fresh}) or None
        settings = LoraConfig(
            r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), target_modules=chosen, modules_to_save=heads,
            task_type=PEFT_TASK_TYPES[config.model.task],
        )  # fmt: skip
        self.model: Any = get_peft_model(model.to(problem.device), settings)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.initial = [p.detach().clone() for p in self.trained]
        if compiled:
            for path in sorted({layer_of(name) for name in chosen} - {""}):
                layer = model.get_submodule(path)
                layer.forward = torch.compile(layer.forward, dynamic=True)  # batches differ in length

    def set_back(self, config: RunConfig, inputs: Inputs) -> None:
        """Draw the adapters anew, and a new head as our run with this seed draws it."""
        torch.manual_seed(config.train.seed)
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.initial, strict=True):
                parameter.copy_(value)
            if self.fresh:
                drawn = dict(base_model(config, inputs)[0].named_parameters())
                heads = {name.replace(".modules_to_save.default", ""): p for name, p in self.model.named_parameters()}
                for name in self.fresh:
                    heads[f"base_model.model.{name}"].copy_(drawn[name])
        for module in self.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)

    def train(self, lr: float, seed: int, fresh: bool) -> dict[str, Any]:
        """One run from begin to end, and its held-out numbers."""
        device = self.problem.device
        config = self.problem.config(lr, seed, fresh)
        inputs = self.problem.inputs(config, self.tokenizer)
        self.set_back(config, inputs)
        train = config.train
        sampler = inputs.sampler(train)
        optimizer = torch.optim.AdamW(self.trained, lr=lr, betas=train.betas, eps=train.eps, weight_decay=0.0)
        steps = inputs.total_steps(config)
        schedule = scheduler_factory(train, steps)(optimizer)
        began, losses = time.perf_counter(), []
        self.model.train()
        for step in range(steps):
            batches, _ = micro_batches(
                inputs, sampler, step, global_rank=0, world_size=1, size=train.micro_batch_size, device=device
            )
            (batch,) = batches
            with autocast(config, device):
                loss = self.model(**batch.inputs).loss
            loss.backward()
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.trained, train.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        seconds = time.perf_counter() - began
        last = float(torch.stack(losses[-20:]).mean())
        return {
            "arm": "peft-lora", "lr": lr, "seed": seed, "phase": "fresh" if fresh else "tune", "steps": steps,
            "train_loss": last, **self.problem.held_out(self.model, inputs, config, self.tokenizer),
            "trainable": sum(p.numel() for p in self.trained), "seconds": seconds,
        }  # fmt: skip


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


@app.command()
def peft(
    sweep: Sweep,
    out: Out,
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "2e-3,4e-3,8e-3,1.6e-2",
    compiled: Annotated[bool, typer.Option(help="Compile every layer.")] = True,
) -> None:
    """Tune PEFT's LoRA on the sweep's tuning seeds and run the best learning rate on its fresh seeds."""
    problem = Problem(sweep, "lora")
    model = PeftLoRA(problem, compiled)
    rows: list[dict[str, Any]] = []

    def run(lr: float, seed: int, fresh: bool) -> float:
        rows.append(model.train(lr, seed, fresh))
        _write(out, rows)
        print({key: rows[-1][key] for key in ("lr", "seed", "phase", "eval_loss", "seconds")}, flush=True)
        return float(rows[-1]["eval_loss"])

    seeds = problem.spec.seeds
    score = {lr: sum(run(lr, seed, False) for seed in seeds.tune) for lr in map(float, lrs.split(","))}
    best = min(score, key=lambda lr: score[lr])
    for seed in seeds.fresh:
        run(best, seed, True)


@app.command()
def para(
    sweep: Sweep,
    out: Out,
    arm: Annotated[str, typer.Option(help="The arm that trains wide.")] = "lora-wide",
    rank: Annotated[int, typer.Option(min=1, help="Rank of uniform LoRA: the budget.")] = 1,
) -> None:
    """Cut the adapters of the sweep's wide arm to the budget, by one threshold and to equal ranks, and evaluate."""
    problem = Problem(sweep, arm)
    rows: list[dict[str, Any]] = []
    sweeps = SweepFolder(Path(problem.spec.output_dir))
    for outcome in sweeps.outcomes().values():
        if outcome.arm != arm or outcome.phase != "fresh" or outcome.status != "finished":
            continue
        config = problem.config(outcome.lr, outcome.seed, True)
        tokenizer = load_tokenizer(config.model)
        inputs = problem.inputs(config, tokenizer)
        job = Job(outcome.arm, outcome.lr, outcome.seed, outcome.phase)
        source = LoraFolder(sweeps.run_directory(job) / "adapter")
        uniform = plan_cut(source, Cut("rank", rank, uniform=True))
        budget = rank * sum(sum(module.shape) for module in uniform.modules)
        for name, cut in (
            ("para", plan_cut(source, Cut("parameters", budget))),
            ("uniform-cut", uniform),
        ):
            model, _ = base_model(config, inputs)
            with tempfile.TemporaryDirectory() as folder:
                adapted: Any = add_adapter(model, write_shrunk(source, cut, Path(folder) / "cut")).to(problem.device)
            values = problem.held_out(adapted, inputs, config, tokenizer)
            known = {"arm": name, "lr": outcome.lr, "seed": outcome.seed, "phase": "fresh"}
            rows.append(known | {"trainable": cut.parameters[1]} | values)
            print(rows[-1], flush=True)
            _write(out, rows)


if __name__ == "__main__":
    app()
