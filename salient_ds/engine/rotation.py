"""Rotates all adapters into their singular bases during training: masters, copies and moments, on any sharding.

Shape legend: N = rows that exist now, R = rows of one matrix, r = live rows of one matrix, O/I = out/in features.

Matrix after matrix, the two factors and their moments are summed over processes (every element has one owner). One
process rotates them (:mod:`salient_ds.salience.rotation`) and sends the result to all. The matrices are divided over
the processes. Because everyone gets the same numbers, copies agree on processes with different hardware.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from salient_ds.engine.shards import Owned, ShardMap
from salient_ds.ranks import Spectrum
from salient_ds.salience.rotation import Factors, rotate
from salient_ds.zero.collectives import world

Pair = tuple[Owned, Owned]
"""The factors A and B of one matrix."""
GROUP = 2**25
"""Elements, moments included, that are gathered on each process at once (128 MiB); a larger matrix goes alone."""
SMALL = 2**20
"""Matrices with fewer elements are rotated on the CPU: on a GPU, a decomposition of a small one takes longer than the
copies to the host and back."""


@torch.no_grad()
def rotate_adapters(shards: ShardMap, mask_N: Tensor, device: torch.device) -> Spectrum:
    """Rotate the live rows of every adapter. The adapters' products do not change.

    Collective: all processes call it with the same mask, between two steps. Afterwards the rows of a matrix are in the
    order of falling singular values.

    Args:
        mask_N: live rows (bool, CPU).

    Returns:
        What was found about each row; equal on every process.
    """
    masks = mask_N.split(list(shards.rank_layout.ranks))
    kinds = ("master", *shards.moment_names())
    global_rank, world_size = world()
    found_2N = torch.zeros(2, len(mask_N), dtype=torch.float64)
    for group in _groups(_pairs(shards), len(kinds), world_size):
        sizes = [len(kinds) * sum(owned.numel for owned in pair) for _, pair in group]
        flats = torch.cat([_gather(shards, pair, kinds, device) for _, pair in group]).split(sizes)
        # all processes rotate at the same time, each its own matrices
        mine = [(pair, flat) for (index, pair), flat in zip(group, flats, strict=True)
                if index % world_size == global_rank]  # fmt: skip
        for module, live_r, found_2r in _rotate_all(mine, kinds, masks):
            found_2N[:, shards.rank_layout.offsets[module] + live_r] = found_2r
        for (index, pair), flat in zip(group, flats, strict=True):
            if world_size > 1:
                dist.broadcast(flat, src=index % world_size)
            _write(shards, pair, kinds, flat)
    if world_size > 1:
        gathered_2N = found_2N.to(device)
        dist.all_reduce(gathered_2N)
        found_2N = gathered_2N.cpu()
    return Spectrum(*found_2N)


def _rotate_all(
    mine: list[tuple[Pair, Tensor]], kinds: tuple[str, ...], masks: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rotate matrices in place. Gives number, live rows, and what was found about them (2, r), of each matrix.

    Small ones go to the host and back together, in one copy each way.
    """
    small = [(pair, flat) for pair, flat in mine if len(flat) < SMALL * len(kinds)]
    if small:
        sizes = [len(flat) for _, flat in small]
        host = torch.cat([flat for _, flat in small]).cpu()
        for (pair, _), flat in zip(small, host.split(sizes), strict=True):
            live_r = masks[pair[0].module].nonzero().view(-1)
            yield pair[0].module, live_r, _rotate_one(flat, pair, kinds, live_r)
        for (_, flat), rotated in zip(small, host.to(small[0][1].device).split(sizes), strict=True):
            flat.copy_(rotated)
    for pair, flat in mine:
        if len(flat) >= SMALL * len(kinds):
            live_r = masks[pair[0].module].nonzero().view(-1)
            yield pair[0].module, live_r, _rotate_one(flat, pair, kinds, live_r.to(flat.device)).cpu()


def _groups(pairs: list[Pair], kinds: int, world_size: int) -> Iterator[list[tuple[int, Pair]]]:
    """Consecutive matrices with their numbers, as many as may be gathered at once."""
    group: list[tuple[int, Pair]] = []
    filled = 0
    for index, pair in enumerate(pairs):
        size = kinds * sum(owned.numel for owned in pair)
        if group and filled + size > GROUP * world_size:
            yield group
            group, filled = [], 0
        group.append((index, pair))
        filled += size
    if group:
        yield group


def _pairs(shards: ShardMap) -> list[Pair]:
    """The two factors of every adapter, in the order of the layout."""
    found: dict[int, dict[str, Owned]] = {}
    for owned in shards.owned.values():
        found.setdefault(owned.module, {})[owned.factor] = owned
    for factors in found.values():
        assert set(factors) == {"A", "B"}, "only adapters B A can be rotated"
    return [(found[module]["A"], found[module]["B"]) for module in sorted(found)]


def _pieces(pair: Pair, kinds: tuple[str, ...]) -> Iterator[tuple[Owned, str, int, int]]:
    """(factor, kind, first element, last element + 1) of everything that one matrix's flat tensor holds."""
    offset = 0
    for owned in pair:
        for kind in kinds:
            yield owned, kind, offset, offset + owned.numel
            offset += owned.numel


def _gather(shards: ShardMap, pair: Pair, kinds: tuple[str, ...], device: torch.device) -> Tensor:
    """Both factors of a matrix with their moments, whole and flat, fp32."""
    flat = torch.zeros(len(kinds) * sum(owned.numel for owned in pair), dtype=torch.float32, device=device)
    for owned, kind, first, _ in _pieces(pair, kinds):
        for fragment in shards.by_name.get(owned.name, []):
            source = shards.master(fragment) if kind == "master" else shards.moments(fragment)[kind]
            flat[first + fragment.lo : first + fragment.lo + fragment.numel] = source.to(device)
    if world().world_size > 1 and not shards.replicated:
        dist.all_reduce(flat)
    return flat


def _rotate_one(flat: Tensor, pair: Pair, kinds: tuple[str, ...], live_r: Tensor) -> Tensor:
    """Rotate the live rows of one matrix in place. Returns their singular values and curvatures, (2, r) float64."""
    if len(live_r) == 0:
        return torch.zeros(2, 0, dtype=torch.float64, device=flat.device)
    views = {
        (owned.factor, kind): flat[first:last].view(owned.address.shape)
        for owned, kind, first, last in _pieces(pair, kinds)
    }
    chosen = {key: view.index_select(0 if key[0] == "A" else 1, live_r) for key, view in views.items()}
    moments = {factor: {kind: chosen[factor, kind] for kind in kinds[1:]} for factor in "AB"}
    rotated = rotate(Factors(chosen["A", "master"], chosen["B", "master"], moments["A"], moments["B"]))
    new = rotated.factors
    for factor, master, others in (("A", new.A_rI, new.moments_A), ("B", new.B_Or, new.moments_B)):
        for kind in kinds:
            value = master if kind == "master" else others[kind]
            views[factor, kind].index_copy_(0 if factor == "A" else 1, live_r, value)
    return torch.stack([rotated.sigma_r, rotated.curvature_r])


def _write(shards: ShardMap, pair: Pair, kinds: tuple[str, ...], flat: Tensor) -> None:
    """Write this process's elements of one matrix into masters, moments and copies."""
    for owned, kind, first, last in _pieces(pair, kinds):
        whole = flat[first:last]
        assert len(whole) == math.prod(owned.address.shape)
        for fragment in shards.by_name.get(owned.name, []):
            target = shards.master(fragment) if kind == "master" else shards.moments(fragment)[kind]
            target.copy_(whole[fragment.lo : fragment.lo + fragment.numel])
        if kind == "master":
            for copy, lo in shards.copies(owned):
                copy.copy_(whole[lo : lo + copy.numel()])
