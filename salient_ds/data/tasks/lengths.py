"""Which texts a tokenizer had to cut. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def were_cut(
    encoded: Sequence[Sequence[int]],
    texts: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[bool]:
    """Per example, whether its tokens were cut to ``max_length``.

    Only rows that fill it are tokenised once more.

    Args:
        encoded: token ids per example, after truncation.
        texts: one list per part of an example (a pair has two), each with one text per example.
    """
    full = [number for number, ids in enumerate(encoded) if len(ids) >= max_length]
    cut = [False] * len(encoded)
    if full:
        whole = tokenizer(*([part[number] for number in full] for part in texts), verbose=False)["input_ids"]
        for number, ids in zip(full, whole, strict=True):
            cut[number] = len(ids) > max_length
    return cut
