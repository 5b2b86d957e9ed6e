"""How far a merged model is from the adapter model: the largest difference of a logit on a few prompts, measured.

Both compute in fp32 on the CPU, with weights as they are stored. So what is measured is the rounding of the merged
weights (and every mistake of a merge), not the rounding of activations. The models are loaded one after the other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.export.meta import RECORD_FILE, Form
from salient_ds.own_files import write_whole
from salient_ds.run.applying import add_checkpoint
from salient_ds.run.export import best_checkpoint, checkpoint_facts, export_run, newest_checkpoint

PROMPTS = (
    "The capital of France is Paris, and the capital of Austria is",
    "Write a short letter to a friend about the weather.",
    "If a train travels 60 miles in an hour and a half, its average speed is",
    "def fibonacci(n):\n    ",
)
_LONGEST = 64
"""Tokens of a prompt at most."""


@dataclass(frozen=True)
class Deviation:
    """What was measured."""

    largest_logit_difference: float
    logit_range: float
    """Largest less smallest logit of the adapter model, to compare with."""
    same_token: int
    """Positions at which both find the same token most probable."""
    positions: int
    dtype: str
    """Of the merged model's adapted weights."""

    def line(self) -> str:
        """What to tell the user."""
        return (
            f"the merged model ({self.dtype}) differs from the adapter model by at most "
            f"{self.largest_logit_difference:.2g} in a logit (they span {self.logit_range:.3g}) on {len(PROMPTS)} "
            f"prompts; the most probable token is the same at {self.same_token} of {self.positions} positions"
        )


def export_and_measure(
    run: Path, form: Form | None, target: Path | None, *, checkpoint: Path | None = None, base: str | None = None,
    **more: Any,
) -> Path:  # fmt: skip
    """What ``salient-ds export`` does: :func:`~salient_ds.run.export.export_run`, and the deviation of a merged model.

    Args:
        more: as for ``export_run``.
    """
    if form == "merged" and checkpoint is None:
        checkpoint = best_checkpoint(run) or newest_checkpoint(run)
    written = export_run(run, form, target, checkpoint=checkpoint, base=base, **more)
    if form == "merged" and checkpoint is not None:
        report_deviation(run, checkpoint, written, base)
    return written


def report_deviation(run: Path, checkpoint: Path, merged: Path, base: str | None) -> None:
    """Measure, print a line, and add it to the merged model's record. Where it is not measured, the line says why.

    Args:
        base: base model, if it is not where training found it.
    """
    config = checkpoint_facts(run, checkpoint)[0]
    why = _not_measured(config, merged)
    if why is not None:
        print(f"the deviation of the merged model was not measured: {why}", file=sys.stderr, flush=True)
        return
    found = measure(config, checkpoint, merged, base)
    print(found.line(), file=sys.stderr, flush=True)
    record = json.loads((merged / RECORD_FILE).read_text(encoding="utf-8"))
    write_whole(
        merged / RECORD_FILE, json.dumps(record | {"deviation": asdict(found)}, indent=2, ensure_ascii=False) + "\n"
    )


def measure(config: dict[str, Any], checkpoint: Path, merged: Path, base: str | None) -> Deviation:
    """Compute logits of both models.

    Args:
        config: the run file of the checkpoint.
    """
    import transformers

    model = config["model"]
    code = bool(model.get("trust_remote_code"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model.get("tokenizer") or base or model["path"], trust_remote_code=code
    )
    rows = [tokenizer(text, return_tensors="pt").input_ids[:, :_LONGEST] for text in PROMPTS]
    load = transformers.AutoModelForCausalLM.from_pretrained
    first = load(
        base or model["path"], dtype=torch.float32, trust_remote_code=code,
        revision=None if base else model.get("revision"),
    )  # fmt: skip
    norm = (config["adapter"].get("shortcuts") or {}).get("norm_after_shortcut")
    add_checkpoint(first, checkpoint, norm)
    expected = _logits(first, rows)
    del first
    found = _logits(load(str(merged), dtype=torch.float32, trust_remote_code=code), rows)
    return Deviation(
        largest_logit_difference=max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
        logit_range=max(float(a.max()) for a in expected) - min(float(a.min()) for a in expected),
        same_token=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True)),
        positions=sum(a.shape[0] for a in expected),
        dtype=_stored(merged),
    )


@torch.no_grad()
def _logits(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """Logits of each prompt, (tokens, vocabulary)."""
    model.eval()
    return [model(input_ids=ids).logits[0].float() for ids in rows]


def _not_measured(config: dict[str, Any], merged: Path) -> str | None:
    """Why the deviation cannot be measured here, as a clause."""
    task = config["model"]["task"]
    if task != "causal-lm":
        return f"that needs a language model, and model.task={task}"
    needed = sum(2 * path.stat().st_size for path in merged.glob("*.safetensors"))
    there = _free_memory()
    if there is not None and needed > there:
        return f"a copy in fp32 takes about {needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} GiB are free"
    return None


def _free_memory() -> int | None:
    """Bytes that processes of this host can still get; None if that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _stored(merged: Path) -> str:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "as stored")
