"""Tokens per second and hours per epoch, where a record of this project measured a run of the same shape. No torch.

The numbers are those of eval/records, which a test compares. Nothing is scaled: a run of another model, method, ZeRO
stage, number of GPUs, precision or amount of recomputation has no guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

from salient_ds.check.model_shapes import Architecture
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig

LLAMA_7B = Architecture(
    hidden_size=4096, intermediate_size=11008, layers=32, vocab_size=32000, heads=32, kv_heads=32, head_dim=128
)
TOKENS = 2048
"""Tokens per forward pass of every record: 4 x 512."""


@dataclass(frozen=True)
class Measured:
    """One arm of a record: bf16, compiled layers, all activations kept, every linear layer adapted."""

    record: str
    """Folder in eval/records."""
    method: str
    stage: int
    gpus: int
    gpu: str
    rank: int
    """Of every matrix."""
    tokens_per_second: float
    """Of all GPUs together."""


_FIVE_METHODS = "2026-11-26_llama-7b_salientlora-lora2-heterolora-increlora-adalora_1xh200"
RECORDS = (
    Measured("2026-11-22_llama-7b_salientlora_1xh100-4", "salientlora", 2, 1, "H100", 480, 11498),
    Measured("2026-11-22_llama-7b_salientlora_1xh100-4", "salientlora", 2, 1, "H100", 64, 15897),
    Measured("2026-11-22_llama-7b_salientlora_2xh200-3", "salientlora", 2, 2, "H200", 480, 22094),
    Measured("2026-11-22_llama-7b_salientlora_2xh200-6", "salientlora", 3, 2, "H200", 64, 24309),
    Measured(_FIVE_METHODS, "lora2", 2, 1, "H200", 64, 12162),
    Measured("2026-11-27_llama-7b_heterolora_1xh100", "heterolora", 2, 1, "H100", 64, 12502),
)  # fmt: skip


def pace(run: RunConfig, report: Report) -> dict[str, Any] | None:
    """What the nearest fitting record says; None if none fits.

    Returns:
        record, gpu, gpus, rank, tokens_per_second, and where the lengths of the rows are known tokens_per_epoch and
        hours_per_epoch.
    """
    inputs, zero = report.memory_inputs, report.facts.get("zero")
    train, facts = run.train, report.facts
    if inputs is None or zero is None or inputs.architecture != LLAMA_7B or train.precision != "bf16":
        return None
    if zero["offload_optimizer"] or zero["offload_param"]:
        return None
    if train.activation_checkpointing != "none" or train.activation_memory < 1 or run.speed.liger != "none":
        return None
    passed = train.micro_batch_size * run.data.max_length
    if not TOKENS / 2 <= passed <= TOKENS * 2 or len(inputs.layout.modules) != 7 * LLAMA_7B.layers:
        return None
    mean = inputs.layout.total / len(inputs.layout.modules)
    fitting = [
        found
        for found in RECORDS
        if (found.method, found.stage, found.gpus) == (run.method.name, zero["stage"], facts["processes"])
        and abs(log(found.rank / mean)) <= log(2)
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda found: abs(log(found.rank / mean)))
    known: dict[str, Any] = {
        "record": best.record, "gpu": best.gpu, "gpus": best.gpus, "rank": best.rank,
        "tokens_per_second": best.tokens_per_second,
    }  # fmt: skip
    if "tokens" in facts and facts.get("rows"):
        tokens = round(facts["rows"] * facts["tokens"]["mean"])
        known |= {"tokens_per_epoch": tokens, "hours_per_epoch": tokens / best.tokens_per_second / 3600}
    return known


def pace_text(known: dict[str, Any] | None) -> str:
    """One line for the report of ``check``."""
    if known is None:
        return "no record of eval/records fits this run, so its speed is not guessed"
    text = f"{known['tokens_per_second']:,.0f} tokens/s"
    if "hours_per_epoch" in known:
        text += f", {known['hours_per_epoch']:.1f} hours per epoch of {known['tokens_per_epoch']:,} tokens"
    cards = f"{known['gpus']} {known['gpu']}" if known["gpus"] > 1 else f"one {known['gpu']}"
    return f"{text}, if it runs as eval/records/{known['record']} did ({cards}, rank {known['rank']}, no padding)"
