"""Layouts of adapted matrices from their ranks alone."""

from __future__ import annotations

from collections.abc import Sequence

from salient_ds.ranks import RankLayout


def layout_of(ranks: Sequence[int], wide: int = 8, tall: int = 8) -> RankLayout:
    """Matrices of one size, called "0", "1", ...; ``wide`` inputs and ``tall`` outputs."""
    count = len(ranks)
    return RankLayout(tuple(map(str, range(count))), tuple(ranks), (wide,) * count, (tall,) * count)
