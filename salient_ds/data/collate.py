"""Turns examples into a batch of tensors that a model takes as it is: `model(**collator(examples))`.

Shapes: B examples (or packed rows of them), S tokens after padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from salient_ds.data.conversation import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_FILL = {"labels": IGNORED}
_SEGMENTS = "segment_ids"


class Collator:
    """Pads on the right to a multiple of `pad_to_multiple_of` tokens. Padding is neither attended to nor trained on.

    Returns int64 tensors (B, S): input_ids, labels, attention_mask (1 = token), and any further column of the examples,
    padded with 0. Packed examples (with "segment_ids") get position_ids instead of a mask. They restart at 0 in each
    example, and transformers makes the masks from that: one for each type of layer, with its window or chunk. Each
    token of the padding has position 0, so it is an example by itself. The model must run without a cache.

    With "flash_attention_2" all packed examples are in one row (1, B * S): that attention looks at a single row.

    `fill_to`: fill every row up to this many tokens, so that batches have one shape. 0: to the longest of the batch.
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int = 8, attn_implementation: str = "sdpa", fill_to: int = 0
    ) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: must be at least 1")
        if attn_implementation not in _ATTENTION:
            raise ValueError(f'attn_implementation="{attn_implementation}": known are {", ".join(_ATTENTION)}')
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of
        self.attention = attn_implementation
        self.fill_to = fill_to

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        assert examples, "an empty batch"
        if _SEGMENTS in examples[0]:
            return self._packed(examples)
        batch = self._padded(examples)
        lengths_B = torch.tensor([len(example["input_ids"]) for example in examples])
        size = batch["input_ids"].shape[1]
        batch["attention_mask"] = (torch.arange(size)[None, :] < lengths_B[:, None]).long()
        return batch

    def _packed(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [{name: column for name, column in example.items() if name != _SEGMENTS} for example in examples]
        if self.attention == "flash_attention_2":
            joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            return self._padded([joined], self.fill_to * len(rows))
        return self._padded(rows)

    def _padded(self, examples: Sequence[Mapping[str, Any]], least: int | None = None) -> dict[str, torch.Tensor]:
        least = self.fill_to if least is None else least
        return {name: self._pad(name, [example[name] for example in examples], least) for name in examples[0]}

    def _pad(self, name: str, rows: Sequence[npt.NDArray[Any]], least: int) -> torch.Tensor:
        fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
        size = _round_up(max(least, *(len(row) for row in rows)), self.multiple)
        padded_BS = np.full((len(rows), size), fill, np.int64)
        for row_S, values in zip(padded_BS, rows, strict=True):
            row_S[: len(values)] = values
        return torch.from_numpy(padded_BS)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, else its end token, as for LLaMA (padding is masked anyway).

    Raises ValueError when it has neither.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise ValueError("the tokenizer has neither pad_token nor eos_token to fill batches with: set its pad_token")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
