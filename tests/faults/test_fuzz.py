"""Absurd inputs of every kind: an error of one sentence, or none, and never a traceback.

``pytest -m faults tests/faults/test_fuzz.py`` tries 20,000. The default suite tries some of those that need no
run (tests/unit/check/test_fuzzed_files.py).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import fuzz
from tests.launcher import runs


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tiny_alpaca: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("fuzzed")
    status, output = runs.alone(runs.write_run(folder, tiny_llama, tiny_alpaca))
    assert status == 0, output
    return folder / "run"


def tried(count: int, folder: Path, model: Path, data: Path, run: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Try ``count`` inputs over all kinds in turn. Returns how many of each, and what was wrong."""
    draw, wrong, counts = random.Random(seed), [], Counter[str]()
    all_kinds = fuzz.kinds(folder, model, data, run)
    for number in range(count):
        kind = all_kinds[number % len(all_kinds)]
        place = folder / kind.file
        before = place.read_bytes() if place.exists() else None
        content = kind.variant(draw)
        problem = fuzz.try_one(kind, folder, content)
        counts[kind.name] += 1
        if problem is not None:
            wrong.append(f"{kind.name}: {problem} for {content[:300]!r}")
        if before is not None:
            place.write_bytes(before)
            kind.seal(place)
    return counts, wrong


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_twenty_thousand(run: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("SALIENT_FUZZ", "20000"))
    counts, wrong = tried(count, tmp_path, tiny_llama, tiny_alpaca, run, seed=int(os.environ.get("SALIENT_SEED", "1")))
    print(dict(counts))
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong[:40])
