"""Which form an adapter is written in, and how its scales are stated. Pure torch.

There are two kinds of readers. The first computes the scale of a module as ``lora_alpha`` / rows of its tensor: PEFT
with ``rank_pattern``, vLLM from 0.32, llama.cpp. The second takes one rank from the configuration for all modules:
SGLang, older vLLM. llama.cpp does not read ``alpha_pattern``. So no form has one:

ragged  every module has its own rank. One ``lora_alpha``, and B carries the rest of the scale. For the first kind.
padded  rows of zeros give all modules, those at rank 0 too, the same rank. For both kinds.

Shape legend: O = out features, r = rank of a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from salient_ds.export.fold import LoraPair

MAX_COST = 1.5
"""The padded form is chosen where it is smaller than this multiple of the ragged one."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``max_lora_rank`` that vLLM accepts (vLLM 0.33)."""
PeftForm = Literal["ragged", "padded"]


def peft_form(form: str) -> PeftForm:
    """The form of a PEFT directory by its name, or by "peft", the older name of "ragged".

    Raises:
        ValueError: it is none of them.
    """
    if form not in ("ragged", "peft", "padded"):
        raise ValueError(f"form {form!r} is unknown: choose ragged or padded")
    return "padded" if form == "padded" else "ragged"


@dataclass(frozen=True)
class FormChoice:
    """A form, and what the user should know about it."""

    form: PeftForm
    cost: float
    """Elements of the padded form / elements of the ragged one."""
    note: str | None
    """One sentence, if some clients need the other form."""


def choose_form(widths: Mapping[str, int], ranks: Mapping[str, int]) -> FormChoice:
    """The form for an adapter that nobody chose one for.

    Args:
        widths: module -> in + out features, which is what one row costs.
        ranks: module -> rank, 0 included.
    """
    largest = max(ranks.values())
    ragged = sum(widths[name] * rank for name, rank in ranks.items())
    cost = largest * sum(widths.values()) / ragged
    if cost < MAX_COST:
        return FormChoice("padded", cost, None)
    limit = f", and rank {largest} is above vLLM's limit of {VLLM_RANKS[-1]}" if largest > VLLM_RANKS[-1] else ""
    note = (
        f"note: the modules have ranks {min(ranks.values())} to {largest}, and padding all to {largest} would make the "
        f"adapter {cost:.1f} times as large{limit}. It is written as --form ragged, which PEFT, vLLM from 0.32 and "
        "llama.cpp read right; SGLang and vLLM before 0.32 need --form padded or --form merged"
    )
    return FormChoice("ragged", cost, note)


def with_alpha(pair: LoraPair, alpha: int) -> LoraPair:
    """The pair for a reader that multiplies its product by ``alpha`` / r: the inverse goes into B (O, r)."""
    return pair if pair.rank == alpha else replace(pair, B_Or=pair.B_Or * (pair.rank / alpha))
