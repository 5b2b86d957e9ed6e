"""The demo behind `make demo` and `make demo TINY=1`: from nothing to a trained adapter, on two processes.

It prepares model and data, checks the recipe, trains with the real launcher, measures held-out accuracy before and
after training, and shows which ranks were kept. All files go into one cache directory; existing ones are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import bench
import prepare
from rich.console import Console

from salient_ds.config.run import RunConfig, load_config, parse_config
from salient_ds.host import free_port
from salient_ds.strict import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DEFAULT_CACHE = Path(".demo")
PROCESSES = 2
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Demo:
    """One run of the demo: what to train, and its command-line arguments."""

    recipe: Path
    overrides: tuple[str, ...]
    config: RunConfig
    tiny: bool

    @property
    def model(self) -> Path:
        return Path(self.config.model.path)

    @property
    def train_rows(self) -> Path:
        return Path(self.config.data.train)

    @property
    def held_out(self) -> Path:
        return self.train_rows.with_name("held_out.jsonl")

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def arguments(self) -> list[str]:
        """The recipe's path as a user would type it, followed by the overrides."""
        return [os.path.relpath(self.recipe), *self.overrides]


def plan(tiny: bool, steps: int | None, cache: Path) -> Demo:
    """Choose the recipe and point its paths into the cache directory.

    Raises:
        ConfigError: the resulting configuration is invalid.
    """
    recipe = RECIPES / ("demo_tiny.yaml" if tiny else "demo_smollm2.yaml")
    overrides = [] if steps is None else [f"train.max_steps={steps}"]
    if cache != DEFAULT_CACHE:
        config = load_config(recipe)
        paths = {
            "output_dir": config.output_dir, "model.path": config.model.path, "data.train": config.data.train,
        }  # fmt: skip
        overrides += [f"{key}={cache / Path(path).relative_to(DEFAULT_CACHE)}" for key, path in paths.items()]
    return Demo(recipe, tuple(overrides), load_config(recipe, overrides), tiny)


def how_to_start(demo: Demo) -> str:
    """Return the launch option (``--resume auto``, ``--overwrite`` or "") for the demo's run directory.

    An unfinished earlier run with the same settings is continued. A finished or different one is replaced.
    """
    resolved = demo.run / "run.yaml"
    if not resolved.is_file():
        return "--overwrite" if demo.run.is_dir() else ""
    import yaml

    try:
        same = parse_config(yaml.safe_load(resolved.read_text())) == demo.config
    except (ConfigError, yaml.YAMLError):
        same = False
    finished = (demo.adapter / "adapter_config.json").is_file()
    return "--resume auto" if same and not finished else "--overwrite"


def environment() -> dict[str, str]:
    """Environment for child processes: cores divided among them, and this interpreter's folder first on PATH."""
    cores = len(os.sched_getaffinity(0))
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // PROCESSES)))
    return env


def settle() -> None:
    """Set variables and warning filters, also for child processes. Has to run before transformers is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local: never wait for a hub
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # bars for files that load in a second get in the way
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # from one library to another, of no use here
    warnings.simplefilter("ignore", FutureWarning)
    if not has_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def processes() -> int:
    """Number of processes: two, or one if there is only one GPU."""
    import torch

    return min(PROCESSES, torch.cuda.device_count()) if has_gpu() else PROCESSES


def execute(command: list[str]) -> None:
    """Show a command and run it.

    Raises:
        SystemExit: the command is not on PATH, or it failed (then with its exit status).
    """
    env = environment()
    if shutil.which(command[0], path=env["PATH"]) is None:
        raise SystemExit(f"error: {command[0]} is not on PATH: run the demo with `make demo`, or install this package")
    shown = [f"{name}={env[name]}" for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS") if name in env]
    console.print(f"$ {shlex.join([*shown, *command])}", style="bold", markup=False)
    status = subprocess.run(command, env=env, check=False).returncode
    if status != 0:
        console.print(f"error: {command[0]} ended with status {status}; what it said is above", style="red")
        raise SystemExit(status if status > 0 else 1)


def check(demo: Demo) -> None:
    """Check the run as it will be started: an earlier one in its directory is continued or replaced."""
    execute(["salient-ds", "check", *demo.arguments, "--gpus", str(processes()), *how_to_start(demo).split()])


def train(demo: Demo) -> None:
    """Launch the training processes and wait until they end."""
    count = processes()
    start = how_to_start(demo)
    if start:
        console.print({"--overwrite": "replacing an earlier run", "--resume auto": "continuing the last run"}[start])
    execute([
        "deepspeed", "--quiet", "--num_accelerators", str(count), "--master_port", str(free_port()),
        "--module", "salient_ds.train", *demo.arguments, *start.split(),
    ])  # fmt: skip


def show_ranks(demo: Demo) -> None:
    """Show the kept ranks as a heat map in the terminal, and save it as a picture."""
    from salient_ds.export.meta import RECORD_FILE
    from salient_ds.monitor.plots import render_ranks, save_rank_png

    ranks = json.loads((demo.adapter / RECORD_FILE).read_text(encoding="utf-8"))["ranks"]
    initial = demo.config.adapter.rank
    console.print(f"rank of every matrix (all began with {initial})")
    console.print(render_ranks(ranks, width=console.width), soft_wrap=False)
    picture = save_rank_png(ranks, demo.run / "ranks.png", title=f"Ranks kept of {initial} per matrix")
    console.print(f"picture: {picture}")


def show_result(demo: Demo, before: float, after: float, questions: int, minutes: float) -> None:
    """Print both accuracies, and how to load the adapter."""
    console.rule("result")
    console.print(f"held-out accuracy   {before:.1%} -> {after:.1%}   ({questions} questions, half of them yes)")
    console.print(f"adapter             {demo.adapter}  (PEFT's format)")
    console.print(f"time                {minutes:.1f} minutes\n")
    console.print(
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f'base = AutoModelForCausalLM.from_pretrained("{demo.model}")\n'
        f'model = PeftModel.from_pretrained(base, "{demo.adapter}")',
        style="cyan",
        markup=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model with SalientLoRA on two processes.")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model created locally, no download")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="directory for all files (default: .demo)")
    args = parser.parse_args()
    began = time.perf_counter()
    settle()
    try:
        demo = plan(args.tiny, args.steps, args.cache)
        console.rule("1 model and data")
        (prepare.tiny if demo.tiny else prepare.smollm2)(demo.config, args.cache, demo.held_out)
        console.rule("2 check")
        check(demo)
        console.rule("3 accuracy before")
        import score

        questions, before = score.measure(demo.model, demo.held_out, demo.config.data.template)
        console.print(f"{before.correct} of {len(before.chosen)} right: {before.accuracy:.1%}")
        console.rule("4 training")
        train(demo)
        console.rule("5 accuracy after, adapter loaded with PEFT")
        _, after = score.measure(demo.model, demo.held_out, demo.config.data.template, demo.adapter)
        console.print(f"{after.correct} of {len(after.chosen)} right: {after.accuracy:.1%}")
        show_ranks(demo)
        console.rule("6 answers to questions")
        bench.answer_questions(demo.arguments, args.cache, demo.tiny, execute, console.print)
    except (prepare.AssetError, ConfigError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: start it again to continue") from None
    minutes = (time.perf_counter() - began) / 60
    show_result(demo, before.accuracy, after.accuracy, len(questions.right), minutes)


if __name__ == "__main__":
    main()
