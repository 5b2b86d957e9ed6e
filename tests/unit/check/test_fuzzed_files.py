"""A few hundred absurd files of users: a sentence, or none, and never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults import fuzz


@pytest.mark.parametrize("seed", range(2))
def test_absurd_files_of_users(seed: int, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    draw, wrong = random.Random(seed), []
    for kind in fuzz.users_kinds(tmp_path, tiny_llama, tiny_alpaca):
        for _ in range(6):
            content = kind.variant(draw)
            problem = fuzz.try_one(kind, tmp_path, content)
            if problem is not None:
                wrong.append(f"{kind.name}: {problem} for {content[:300]!r}")
        kind.write_sound(tmp_path)
    assert not wrong, "\n".join(wrong)
