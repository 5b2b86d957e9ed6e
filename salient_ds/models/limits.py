"""What a model has room for: token ids and positions. No torch before a model is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PADDED_TO = 8
"""Batches are padded to a multiple of this (``data/collate.py``)."""
_POSITIONS = re.compile(r"(^|_)(wpe|positions?|pos_embed\w*)(_|$)")
"""Names of tables that positions are looked up in."""
_FIXED = {"ctrl": "n_positions", "mpt": "max_seq_len"}
"""Model types whose table is neither an embedding nor a buffer -> the entry of their configuration with its size."""
_LOOKS_AHEAD = ("prophetnet",)
"""Model types that look up one position more than there are tokens."""


@dataclass(frozen=True)
class Limits:
    """The sizes of a model's tables."""

    embedding: str = ""
    """Path of the embedding of tokens; empty if unknown."""
    rows: int = 0
    """Its number of rows: token ids from here on fail. 0 if unknown."""
    width: int = 0
    positions: str = ""
    """Path of the table of positions; empty if the model has none."""
    longest: int = 0
    """Positions that the table has rows for."""

    def position_problem(self, max_length: int) -> str | None:
        """One sentence if sequences of up to ``max_length`` tokens would look up positions that the table lacks."""
        if not self.positions or -(-max_length // PADDED_TO) * PADDED_TO <= self.longest:
            return None
        room = self.longest // PADDED_TO * PADDED_TO
        padded = "" if max_length > self.longest else f" (batches are padded to a multiple of {PADDED_TO})"
        return (
            f"data.max_length={max_length} is above what the model has positions for{padded}: they are looked up in a "
            f"table of {self.longest} ({self.positions}), so set data.max_length to {room} or less"
        )

    def token_problem(self, largest: int, what: str) -> str | None:
        """One sentence if the token id ``largest`` of ``what`` has no row in the embedding."""
        if not self.rows or largest < self.rows:
            return None
        return (
            f"{what} holds token id {largest}, and {self.embedding} of the model has {self.rows} rows: use the "
            "tokenizer that belongs to the model, or resize the model's embedding"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values, for ``Limits(**values)``."""
        return asdict(self)


def limits(model: nn.Module, towers: Iterable[str] = ()) -> Limits:
    """Read the sizes off a transformers model, which may be without weights (on the meta device).

    Args:
        towers: paths of the parts for images and sound, whose tables do not count.
    """
    from torch import nn

    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    words, tables, found = _words(model), {}, {}
    for path, module in model.named_modules():
        if any(f"{path}.".startswith(f"{tower}.") for tower in towers) or not isinstance(module, nn.Embedding):
            continue
        if module is words:
            found = {"embedding": path, "rows": module.num_embeddings, "width": module.embedding_dim}
        elif _POSITIONS.search(path.rpartition(".")[2]):
            tables[path] = module.num_embeddings - _offset(module) - (kind in _LOOKS_AHEAD)
    for path, buffer in model.named_buffers():
        if buffer.dim() == 2 and _POSITIONS.search(path.rpartition(".")[2]) and "position_ids" not in path:
            tables[path] = buffer.shape[0]
    if kind in _FIXED:
        tables[f"{kind}'s {_FIXED[kind]}"] = getattr(config, _FIXED[kind])
    name = min(tables, key=lambda path: tables[path], default="")
    return Limits(**found, positions=name, longest=tables.get(name, 0))


def _words(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _offset(table: Any) -> int:
    """Rows before that of position 0: OPT and BART add an offset, RoBERTa begins after the padding token."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1
