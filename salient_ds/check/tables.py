"""Do the model's tables hold what the run looks up: token ids in the embedding, positions in a table? No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from salient_ds.check.model_files import ModelFiles, TensorInfo
from salient_ds.check.report import Report
from salient_ds.check.token_ids import TokenIds, token_ids, unused
from salient_ds.config.run import RunConfig
from salient_ds.models.limits import Limits

_USUAL = ("embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings")
"""Names of embeddings of tokens, for models that cannot be built before training."""


def check_tables(run: RunConfig, files: ModelFiles, limits: Limits, report: Report) -> None:
    """Add what does not fit to the report's problems.

    Args:
        limits: of the model that config.json describes; empty if that is not known.
    """
    stored = embedding_on_disk(files.tensors, limits.embedding)
    if stored is not None and limits.rows and stored.shape != (limits.rows, limits.width):
        report.problems.append(
            f"{stored.name} in {stored.file} is {stored.shape[0]} x {stored.shape[1]}, and config.json makes it "
            f"{limits.rows} x {limits.width} (vocab_size={_vocabulary(files)}): correct config.json, or fetch the "
            "files again, so that both are of one version"
        )
    rows = stored.shape[0] if stored is not None else limits.rows
    folder = Path(run.model.tokenizer).expanduser() if run.model.tokenizer else files.directory
    if rows and folder is not None and folder.is_dir():
        _check_tokens(run, folder, rows, stored.name if stored is not None else limits.embedding, report)
    position_problem = limits.position_problem(run.data.max_length)
    if run.data.task is not None:
        report.problems += run.data.task.length_problems(run.data.max_length, limits.longest or None)
    longest = files.config.get("max_position_embeddings")
    if position_problem is not None:
        report.problems.append(position_problem)
    elif not limits.positions and isinstance(longest, int) and run.data.max_length > longest:
        report.notes.append(
            f"data.max_length={run.data.max_length} is above the {longest} positions the model was made for"
        )


def embedding_on_disk(tensors: Mapping[str, TensorInfo], module: str) -> TensorInfo | None:
    """The stored embedding of the model's module ``module`` (empty: of a model that is not known).

    Names on disk may have other prefixes than in the model, so the last part decides if it is unique.
    """
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    for leaf in (module.rpartition(".")[2],) if module else _USUAL:
        found = [info for name, info in tensors.items() if f".{name}".endswith(f".{leaf}.weight")]
        if len(found) == 1 and len(found[0].shape) == 2:
            return found[0]
    return None


def _check_tokens(run: RunConfig, folder: Path, rows: int, embedding: str, report: Report) -> None:
    ids = token_ids(folder)
    if ids is None or ids.count <= rows:
        return
    needless = unused(ids, _chat_template(folder) if run.data.template == "tokenizer" else None)
    above = set(range(rows, ids.count))
    if above <= needless:
        report.notes.append(
            f"{_some(ids, above)} of the tokenizer in {folder} have no row in {embedding} ({rows} rows): data that "
            "holds them is refused when training starts"
        )
        return
    report.problems.append(
        f"the tokenizer in {folder} has {ids.count} tokens, {embedding} of {run.model.path} has {rows} rows: "
        f"{_some(ids, above - needless)} would have none; use the tokenizer that belongs to the model, or resize its "
        "embedding"
    )


def _some(ids: TokenIds, numbers: set[int]) -> str:
    first = min(numbers)
    name = f" ({ids.added[first]})" if first in ids.added else ""
    return f"token ids {first}{name} to {max(numbers)}" if len(numbers) > 1 else f"token id {first}{name}"


def _chat_template(folder: Path) -> str:
    """All text in which a chat template could be: too much rather than too little."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("chat_template.*")]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        texts.append(str(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]))
    return "\n".join(texts)


def _vocabulary(files: ModelFiles) -> object:
    for part in (files.config, *(value for value in files.config.values() if isinstance(value, dict))):
        if "vocab_size" in part:
            return part["vocab_size"]
    return "not stated"
