"""Looks for the tokenizer's files before processes start. No torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path

from salient_ds.check.model_files import ModelFiles, looks_like_a_path
from salient_ds.config.run import RunConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def inspect_tokenizer(run: RunConfig, files: ModelFiles, problems: list[str]) -> None:
    """Add a problem if the run's tokenizer directory holds no tokenizer, or lacks the chat template it needs."""
    named = run.model.tokenizer
    folder = Path(named).expanduser() if named else files.directory
    if named and looks_like_a_path(named) and not Path(named).expanduser().is_dir():
        problems.append(f"model.tokenizer={named!r} is no directory: give one, or a hub name like org/name")
        return
    may_be_elsewhere = run.model.trust_remote_code or (not named and files.directory_is_cache)
    if folder is None or not folder.is_dir() or may_be_elsewhere:
        return
    if not has_tokenizer(folder):
        remedy = "complete it, or set model.tokenizer"
        problems.append(f"{folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): {remedy}")
    elif run.data.template == "tokenizer" and not has_chat_template(folder):
        problems.append(
            f'data.template="tokenizer", but the tokenizer in {folder} has no chat template: '
            "choose a named template, for example alpaca or vicuna_v1.1"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a tokenizer's vocabulary."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` brings a chat template."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
