"""Which token ids a tokenizer's files can produce. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass
class TokenIds:
    """The ids of a tokenizer, as far as its files show them."""

    text: int = 0
    """Ids from 0 up to here, this one not included, stand for pieces of text."""
    added: dict[int, str] = field(default_factory=dict)
    """Tokens that were added to them, by id."""
    rare: set[int] = field(default_factory=set)
    """Ids of ``added`` that text holds only where somebody writes the special token itself."""

    @property
    def count(self) -> int:
        """One more than the largest id."""
        return max([self.text, *(number + 1 for number in self.added)])


def token_ids(folder: Path) -> TokenIds | None:
    """Read the ids off ``tokenizer.json``, a sentencepiece model or a vocabulary. None if nothing readable is there.

    Tokens that have a role (end of text, padding, ...) but no id get one when the tokenizer is loaded; they count.
    """
    whole = _load(folder / "tokenizer.json")
    known: set[str] = set()
    if isinstance(whole.get("model"), dict):
        pieces = whole["model"].get("vocab", {})
        found = TokenIds(text=_count(pieces))
        known = set(pieces) if isinstance(pieces, dict) else {piece[0] for piece in pieces}
        _add(found, ((entry["id"], entry) for entry in whole.get("added_tokens", [])))
    else:
        read = _sentencepiece(folder) or _vocabulary(folder)
        if read is None:
            return None
        known, found = read, TokenIds(text=len(read))
    settings = [_load(folder / name) for name in _SETTINGS]
    _add(found, ((number, token) for part in settings for number, token in _decoder(part)))
    _add(found, ((number, {"content": token}) for token, number in _load(folder / "added_tokens.json").items()))
    known |= set(found.added.values())
    roles = [_content(part.get(role)) for part in settings for role in _NAMED]
    for token in dict.fromkeys(token for token in roles if token and token not in known):
        found.added[found.count] = token
    found.rare -= {number for number, token in found.added.items() if token in roles}
    return found


def unused(ids: TokenIds, template: str | None) -> set[int]:
    """Special tokens without a role that ``template`` (text of a chat template; None: there is none) does not write."""
    return {number for number in ids.rare if template is None or ids.added[number] not in template}


def _add(found: TokenIds, entries: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
    for number, entry in entries:
        found.added[number] = str(entry["content"])
        if entry.get("special"):
            found.rare.add(number)


def _decoder(settings: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    entries = settings.get("added_tokens_decoder")
    return [(int(number), entry) for number, entry in entries.items()] if isinstance(entries, dict) else []


def _content(token: Any) -> str | None:
    """A token as text; it may be written as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _count(pieces: Any) -> int:
    return max(pieces.values(), default=-1) + 1 if isinstance(pieces, dict) else len(pieces)


def _sentencepiece(folder: Path) -> set[str] | None:
    path = next((folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()), None)
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):  # another format under the same name
        return None
    return {pieces.IdToPiece(number) for number in range(pieces.GetPieceSize())}


def _vocabulary(folder: Path) -> set[str] | None:
    words = _load(folder / "vocab.json")
    if words:
        return set(words)
    try:
        return set((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
