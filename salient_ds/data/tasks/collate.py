"""Turns items of a task into a batch of tensors that a model takes as it is: ``model(**collator(items))``.

Shapes: B items, S tokens after padding, T target tokens after padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from salient_ds.data.conversation import IGNORED


class TaskCollator:
    """Pads to a multiple of ``pad_to_multiple_of`` tokens. Padding is neither attended to nor trained on.

    Returns int64 tensors (B, S): input_ids, attention_mask (1 = token) and token_type_ids, as far as the items have
    them; labels as (B,) int64 for classes, (B,) float32 for numbers, (B, T) int64 for target texts, which are always
    padded on the right with -100; start_positions and end_positions as (B,) int64.
    """

    def __init__(
        self, pad_token_id: int, padding_side: Literal["left", "right"] = "right", pad_to_multiple_of: int = 8
    ) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: must be at least 1")
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side="{padding_side}": must be "left" or "right"')
        self.pad_token_id = pad_token_id
        self.side = padding_side
        self.multiple = pad_to_multiple_of

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        assert items, "an empty batch"
        return {name: self._column(name, [item[name] for item in items]) for name in items[0]}

    def _column(self, name: str, values: list[Any]) -> torch.Tensor:
        if isinstance(values[0], list):
            if name == "labels":
                return self._padded(values, IGNORED, "right")
            return self._padded(values, self.pad_token_id if name == "input_ids" else 0, self.side)
        return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)

    def _padded(self, rows: list[list[int]], fill: int, side: str) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        size = -(-longest // self.multiple) * self.multiple
        padded_BS = torch.full((len(rows), size), fill, dtype=torch.int64)
        for row_S, values in zip(padded_BS, rows, strict=True):
            if side == "right":
                row_S[: len(values)] = torch.tensor(values, dtype=torch.int64)
            elif values:
                row_S[-len(values) :] = torch.tensor(values, dtype=torch.int64)
        return padded_BS
