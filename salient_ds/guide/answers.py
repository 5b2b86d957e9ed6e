"""What ``salient-ds init`` has to know: given on the command line, else asked in a terminal. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salient_ds.check.fit import bytes_of
from salient_ds.methods.table import methods, unknown_method
from salient_ds.strict import ConfigError

Ask = Callable[..., Any]
"""Asks a question with a default, as ``typer.prompt`` does."""


@dataclass(frozen=True)
class Answers:
    """Everything that was asked."""

    model: str
    data: str
    gpus: int
    """GPUs on all nodes together; 0: one process on the CPU."""
    memory: int
    """Bytes of one GPU, or of the host without one."""
    method: str = "salientlora"
    rank: int = 16
    target_rank: float = 8
    """Mean rank at the end, for methods that have one."""

    @property
    def processes(self) -> int:
        return max(1, self.gpus)


def collect(
    model: str | None,
    data: str | None,
    gpus: int | None,
    gpu_memory: str | None,
    method: str | None,
    ask: Ask | None,
    found: list[int] | None = None,
) -> Answers:
    """Complete the answers.

    Args:
        gpu_memory: such as "80GB".
        ask: None if nobody can be asked; what has no default is a problem then.
        found: bytes of each GPU here (default: look).

    Raises:
        ConfigError: something is missing or wrong.
    """
    found = gpus_here() if found is None else found
    missing = [name for name, value in (("--model", model), ("--data", data)) if value is None]
    if missing and ask is None:
        raise ConfigError([f"{' and '.join(missing)} missing, and there is no terminal to ask in: give them"])
    if model is None and ask is not None:
        model = str(ask("Model: a checkpoint folder, or a name on the Hub"))
    if data is None and ask is not None:
        data = str(ask("Training data: a .json, .jsonl or .parquet file, or a `datasets` name"))
    if gpus is None:
        gpus = len(found) if ask is None else int(ask("GPUs on all nodes together (0: CPU)", default=len(found)))
    memory = _memory(gpus, gpu_memory, ask, found)
    if method is None:
        method = "salientlora" if ask is None else str(ask(f"Method ({', '.join(ready())})", default="salientlora"))
    if method not in methods():
        raise ConfigError([unknown_method(method)])
    if method not in ready():
        needed = ", ".join(f"method.{key}" for key in _needed(method))
        raise ConfigError(
            [
                f"--method {method}: init cannot choose {needed}, which has no default and decides the schedule; begin "
                f"with a recipe of that method, or choose {', '.join(ready())}"
            ]
        )
    return Answers(str(model), str(data), gpus, memory, method)


def _memory(gpus: int, given: str | None, ask: Ask | None, found: list[int]) -> int:
    if gpus < 0:
        raise ConfigError([f"--gpus {gpus}: give 0 for the CPU, or a number of GPUs"])
    if gpus == 0:
        if given is not None:
            raise ConfigError([f"--gpu-memory {given} is of no use with --gpus 0: leave it out"])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if given is None and not found and ask is not None:
        given = str(ask("Memory of one GPU", default="80GB"))
    if given is None and not found:
        raise ConfigError(
            [f"--gpu-memory is missing, and no GPU is here to look at: say how much {gpus} GPUs have each"]
        )
    try:
        return min(found) if given is None else bytes_of(given)
    except ValueError as error:
        raise ConfigError([f"--gpu-memory {error}"]) from error


def ready() -> list[str]:
    """Names of the methods whose options all have defaults, besides the target and what follows from the run."""
    return [name for name in methods() if not _needed(name)]


def _needed(method: str) -> list[str]:
    fields = methods()[method].model_fields
    chosen = {"name", "target_rank", *methods()[method].suggested(1, 1, 1)}
    return [key for key, field in fields.items() if field.is_required() and key not in chosen]


def gpus_here() -> list[int]:
    """Bytes of every NVIDIA GPU of this machine; empty without any, and for other makes."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    numbers = [line.strip() for line in done.stdout.splitlines()]
    return [int(number) * 2**20 for number in numbers if number.isdigit()] if done.returncode == 0 else []


def short_name(text: str) -> str:
    """A name for folders out of a path or hub name: "org/Model-7B" becomes "model-7b"."""
    name = Path(text.rstrip("/")).name.lower()
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.") or "run"
