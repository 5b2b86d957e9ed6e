"""Cases are built once per session; tests do not change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.export.builders import Case


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory):
    """``case_of(kind, dtype)``, cached."""
    made: dict[tuple[str, torch.dtype], Case] = {}

    def get(kind: str, dtype: torch.dtype = torch.float32) -> Case:
        if (kind, dtype) not in made:
            made[kind, dtype] = Case(kind, tmp_path_factory.mktemp(kind), dtype)
        return made[kind, dtype]

    return get


@pytest.fixture
def llama(case_of) -> Case:
    return case_of("llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A target that does not exist yet."""
    return tmp_path / "exports" / "adapter"
