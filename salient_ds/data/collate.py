"""Turns examples into a batch of tensors that a model takes as it is: `model(**collator(examples))`.

Shapes: B examples, S tokens after padding, P examples packed into a sequence.
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

PADDING_SEGMENT = -1
_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_FILL = {"labels": IGNORED, "segment_ids": PADDING_SEGMENT}


class Collator:
    """Pads on the right to a multiple of `pad_to_multiple_of` tokens. Padding is neither attended to nor trained on.

    Returns int64 tensors (B, S): input_ids, labels, attention_mask (1 = token), and any further column of the examples,
    padded with 0. Packed examples (with "segment_ids") get position_ids and a mask that keeps segments apart. The mask
    has the form that the model's attention takes (transformers 5.23, masking_utils and models/llama):

    * "sdpa": (B, 1, S, S) bool.
    * "eager": the same as an additive float32 mask. This attention adds the mask to the scores: True would count as 1.
    * "flash_attention_2": no mask. All sequences are in one row (1, B * S), and position_ids that restart at 0 delimit
      segments. (Other attention understands that form only without a cache: keep the model's use_cache off in
      training.)
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, attn_implementation: str = "sdpa") -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: must be at least 1")
        if attn_implementation not in _ATTENTION:
            raise ValueError(f'attn_implementation="{attn_implementation}": known are {", ".join(_ATTENTION)}')
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of
        self.attention = attn_implementation

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        assert examples, "an empty batch"
        packed = "segment_ids" in examples[0]
        if packed and self.attention == "flash_attention_2":
            return self._one_row(examples)
        batch = {name: self._pad(name, [example[name] for example in examples]) for name in examples[0]}
        if packed:
            mask_B1SS = block_causal_mask(batch.pop("segment_ids"))
            batch["attention_mask"] = mask_B1SS if self.attention == "sdpa" else additive_mask(mask_B1SS)
        else:
            lengths_B = torch.tensor([len(example["input_ids"]) for example in examples])
            size = batch["input_ids"].shape[1]
            batch["attention_mask"] = (torch.arange(size)[None, :] < lengths_B[:, None]).long()
        return batch

    def _pad(self, name: str, rows: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
        size = _round_up(max(len(row) for row in rows), self.multiple)
        padded_BS = np.full((len(rows), size), fill, np.int64)
        for row_S, values in zip(padded_BS, rows, strict=True):
            row_S[: len(values)] = values
        return torch.from_numpy(padded_BS)

    def _one_row(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        joined = {
            name: np.concatenate([example[name] for example in examples])
            for name in examples[0]
            if name != "segment_ids"
        }
        # Padding has position 0 throughout: each of its tokens is a segment by itself.
        return {name: self._pad(name, [values]) for name, values in joined.items()}


def block_causal_mask(segment_ids_BS: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool. True where the row's token may attend to the column's: same segment, and not later.

    Padding is a segment too and attends to itself, because a row without any True would be NaN after the softmax.
    """
    same_BSS = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    return same_BSS.tril()[:, None]


def additive_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask to be added to attention scores: 0 where ``mask`` is True, the lowest float32 where it is False."""
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


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
