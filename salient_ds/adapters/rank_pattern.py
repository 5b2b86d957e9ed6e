"""Ranks of single matrices: ``adapter.rank_pattern``, and the files it may come from. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salient_ds.adapters.targets import is_suffix
from salient_ds.strict import did_you_mean, extreme

OTHERS = "*"
"""Key for all matrices that no other key names. Without it they get ``adapter.rank``."""
PEFT_CONFIG, SEARCHED, RECORD = "adapter_config.json", "rank_pattern.json", "salient_ds.json"
_PLACES = (PEFT_CONFIG, f"adapter/{PEFT_CONFIG}", SEARCHED)
"""What is looked for in a folder: that of an adapter, of a run, or of a search."""


class RankFileError(ValueError):
    """``adapter.rank_pattern`` names a file that gives no ranks."""


def ranks_of(names: Sequence[str], rank: int, pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank of every matrix in ``names`` (module paths).

    A key names the paths that equal it or end with "." + key. Of several keys the longest counts. Example:
    ``{"q_proj": 8, "layers.0.self_attn.q_proj": 2, "*": 0}``.

    Raises:
        ValueError: a key names no matrix, or every rank is 0.
    """
    keys = sorted((key for key in pattern if key != OTHERS), key=len, reverse=True)
    lost = [key for key in keys if not any(is_suffix(name, key) for name in names)]
    if lost:
        ends = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2, 99)}
        hint = did_you_mean(lost[0], ends) or f"adapted matrices are, for example, {', '.join(names[:3])}"
        raise ValueError(
            f"adapter.rank_pattern: {', '.join(map(repr, lost[:3]))}{' ...' if len(lost) > 3 else ''} names no adapted "
            f"matrix ({hint}); mend the key, or add the layer to adapter.target_modules"
        )
    others = pattern.get(OTHERS, rank)
    found = {name: next((pattern[key] for key in keys if is_suffix(name, key)), others) for name in names}
    if names and not any(found.values()):
        raise ValueError("adapter.rank_pattern gives every matrix the rank 0: give at least one a rank above 0")
    return found


def with_ranks_of_file(run: dict[str, Any], base: Path | None) -> dict[str, Any]:
    """A run file's sections. If ``adapter.rank_pattern`` is a path, it is replaced by the ranks that are found there.

    Args:
        base: where a relative path is looked for, if it is not in the working directory.

    Raises:
        RankFileError: see :func:`read_ranks`.
    """
    adapter = run.get("adapter")
    given = adapter.get("rank_pattern") if isinstance(adapter, Mapping) else None
    if not isinstance(given, str) or not isinstance(adapter, Mapping):
        return run
    path = Path(given)
    if not path.exists() and base is not None:
        path = base / path
    return run | {"adapter": {**adapter, "rank_pattern": read_ranks(path)}}


def read_ranks(path: Path) -> dict[str, int]:
    """Read ``adapter.rank_pattern`` from what another run left: every matrix that the file does not name gets rank 0.

    An adapter's salient_ds.json counts before its adapter_config.json, which states padded ranks if the adapter is
    padded.

    Args:
        path: PEFT's adapter_config.json, rank_pattern.json of a search, a JSON mapping of names to ranks, or a folder
            that holds one of these: an adapter, a run directory.

    Raises:
        RankFileError: no such file is there, or it does not say which matrices have which rank.
    """
    if path.is_dir():
        found = [path / place for place in _PLACES if (path / place).is_file()]
        if not found:
            raise RankFileError(
                f"adapter.rank_pattern={str(path)!r} holds none of {', '.join(_PLACES)}: give the folder of an adapter "
                "or of a finished run, or a file"
            )
        path = found[0]
    if path.name == PEFT_CONFIG and (path.parent / RECORD).is_file():
        path = path.parent / RECORD
    data = _mapping(path)
    if path.name == RECORD and "ranks" in data:
        data = data["ranks"]
        if not isinstance(data, dict):
            raise RankFileError(f"adapter.rank_pattern={str(path)!r}: its ranks are {data!r}, which is no mapping")
    ranks = _of_peft(data, path) if "rank_pattern" in data else data
    wrong = [key for key, value in ranks.items() if isinstance(value, bool) or not isinstance(value, int) or value < 0]
    if wrong:
        raise RankFileError(
            f"adapter.rank_pattern={str(path)!r}: the rank of {wrong[0]!r} is {ranks[wrong[0]]!r}, not a whole number "
            "of 0 or more"
        )
    return {OTHERS: 0} | ranks


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RankFileError(f"adapter.rank_pattern={str(path)!r} cannot be read: {error}") from error
    except RecursionError as error:
        raise RankFileError(f"adapter.rank_pattern={str(path)!r} cannot be read: it is nested too deeply") from error
    problem = extreme(data)
    if problem is not None or not isinstance(data, dict):
        why = f": {problem}" if problem else ""
        raise RankFileError(f"adapter.rank_pattern={str(path)!r} holds no mapping of names to ranks{why}")
    return data


def _of_peft(data: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The ranks that PEFT's configuration (or a search's rank_pattern.json) describes."""
    given = data["rank_pattern"] or {}
    if not isinstance(given, dict):
        raise RankFileError(f"adapter.rank_pattern={str(path)!r}: its rank_pattern is {given!r}, which is no mapping")
    pattern = {_plain(key): value for key, value in given.items()}
    targets, rank = data.get("target_modules"), data.get("r")
    if rank is None:
        return pattern
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise RankFileError(
            f"adapter.rank_pattern={str(path)!r}: its target_modules is {targets!r}, which does not list the matrices: "
            "write the ranks into the run file"
        )
    unnamed = {name: rank for name in targets if name not in pattern}
    return unnamed | pattern


def _plain(key: str) -> str:
    """A module path out of PEFT's regular expression for it."""
    return re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
