"""The rows that a run of instruction data is trained on and judged by: of one data set, or of several with weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from salient_ds.config.data import DataConfig
from salient_ds.config.data_sets import TrainSet
from salient_ds.data.dataset import InstructionDataset, split_eval
from salient_ds.data.mixture import Mixture
from salient_ds.data.sampler import frozen_permutation
from salient_ds.data.shares import Share, held_out_counts, share_of
from salient_ds.data.template_base import Template
from salient_ds.run.tokenised import read_part

Rows = InstructionDataset | Mixture


@dataclass
class TrainingRows:
    """What :func:`read_training_rows` returns."""

    train: Rows
    held_out: Rows | None = None
    shares: tuple[Share, ...] = ()
    """What an epoch takes of each set; empty if it takes every row once."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log: what was read, left out, cut and held out, for each set."""


def read_training_rows(data: DataConfig, seed: int, tokenizer: Any, template: Template) -> TrainingRows:
    """Read and tokenise ``data.train`` and ``data.eval``, hold rows out, and weigh the sets.

    Args:
        seed: decides which rows are held out.

    Raises:
        DataError: a file is missing or holds bad rows.
        ValueError: no answer is left of a file, or ``data.eval_size`` does not fit the rows.
    """
    sets, parts, notes = data.sets, [], []
    for one in sets:
        name = "train" if len(sets) == 1 else f"train {one.path}"
        part, found = read_part(name, one.path, data, tokenizer, template, data.packing, one.format)
        parts.append(part)
        notes += found
    held_out: Rows | None = None
    if data.eval is not None:
        held_out, found = read_part("eval", data.eval, data, tokenizer, template, False)
        notes += found
        trained = [(part, 0) for part in parts]
    elif data.eval_size:
        pairs = _split(parts, data.eval_size, seed)
        trained = [(left, len(taken)) for left, taken in pairs]
        held_out = pairs[0][1] if len(pairs) == 1 else Mixture([taken for _, taken in pairs])
    else:
        trained = [(part, 0) for part in parts]
    shares = tuple(share_of(len(part), one.weight) for one, (part, _) in zip(sets, trained, strict=True))
    if len(sets) == 1 and shares[0].per_epoch == shares[0].rows:
        notes += _one_set(*trained[0]) if held_out is not None and data.eval is None else []
        return TrainingRows(trained[0][0], held_out, (), notes)
    notes += [_one_of_several(one, *of, share) for one, of, share in zip(sets, trained, shares, strict=True)]
    notes.append(f"train: an epoch takes {sum(share.per_epoch for share in shares):,} rows of {len(sets)} data sets")
    return TrainingRows(Mixture([part for part, _ in trained], shares), held_out, shares, notes)


def _split(
    parts: list[InstructionDataset], size: float, seed: int
) -> list[tuple[InstructionDataset, InstructionDataset]]:
    """Each set as (rows to train on, rows held out). Sets of equal length hold out rows of the same numbers."""
    if len(parts) == 1:
        return [split_eval(parts[0], size, seed)]
    found = []
    for part, count in zip(parts, held_out_counts([len(part) for part in parts], size), strict=True):
        taken = np.zeros(len(part), bool)
        taken[frozen_permutation(len(part), seed)[:count]] = True
        found.append((part.select(np.flatnonzero(~taken)), part.select(np.flatnonzero(taken))))
    return found


def _one_set(part: InstructionDataset, held_out: int) -> list[str]:
    return [f"train: {_counted(part)}; {held_out:,} held out besides"]


def _one_of_several(one: TrainSet, part: InstructionDataset, held_out: int, share: Share) -> str:
    besides = f"; {held_out:,} held out besides" if held_out else ""
    times = f" with weight {one.weight:g}, which is {share.per_epoch:,} per epoch" if one.weight != 1 else ""
    return f"train {one.path}: {_counted(part)}{times}{besides}"


def _counted(part: InstructionDataset) -> str:
    unit = "sequences" if "segment_ids" in part.columns else "rows"
    tokens, targets = int(part.lengths.sum()), int(part.num_targets.sum())
    return f"{len(part):,} {unit} to train on, {tokens:,} tokens, {targets:,} targets"
