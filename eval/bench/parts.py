"""Time single parts of a step, as they were and as they are: statistics, output layer, attention of packed rows.

    python eval/bench/parts.py --out parts.json                        # LLaMA-7B's sizes, one GPU
    python eval/bench/parts.py --device cpu --scale 64                 # small sizes, to see that it runs

Each line is a median over repeats, with the spread and the peak memory beyond what was there before.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from salient_ds.models.target_head import target_loss
from salient_ds.models.varlen_attention import _kernel, borders, one_by_one
from salient_ds.salience import sensitivity

from .timing import GIB, peak_gib, reset_peak, wait

TARGETS = 0.2
"""Share of tokens that are targets."""


def timed(name: str, run: Callable[[], object], device: torch.device, repeats: int = 9) -> dict[str, Any]:
    """One row: median milliseconds, spread, and peak GiB beyond the tensors that exist before."""
    run()
    wait(device)
    before = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    reset_peak(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    middle = median(seconds)
    return {"part": name, "ms": 1000 * middle, "spread": (max(seconds) - min(seconds)) / middle,
            "extra_gib": peak_gib(device) - before}  # fmt: skip


def statistics_parts(device: torch.device, elements: int) -> list[dict[str, Any]]:
    """AdaLoRA's update: eight operations, or one kernel. Also how far the two differ after several steps."""
    draw = torch.Generator(device).manual_seed(0)
    states = [sensitivity.init([torch.zeros(elements, device=device)]) for _ in range(2)]
    value, grad = (torch.randn(elements, device=device, generator=draw) for _ in range(2))
    rows = []
    for state, fused in zip(states, (False, True), strict=True):

        def update(state: sensitivity.Smoothed = state, fused: bool = fused) -> None:
            sensitivity.update(state, [value], [grad], 0.85, 0.85, fused=fused)

        rows.append(timed(f"statistics of {elements / 1e6:.0f} M, fused={fused}", update, device))
    pairs = zip(
        states[0].sensitivity + states[0].uncertainty, states[1].sensitivity + states[1].uncertainty, strict=True
    )
    differing = [(float((a - b).abs().max()), float((a != b).float().mean())) for a, b in pairs]
    rows[-1] |= {"largest_difference": max(d for d, _ in differing), "share_differing": max(s for _, s in differing)}
    return rows


def head_parts(
    device: torch.device, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Output layer and loss, forward and backward: all positions, or targets only."""
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    label = torch.randint(vocabulary, (tokens,), device=device)
    label[torch.rand(tokens, device=device) > TARGETS] = -100
    index = (label != -100).nonzero().view(-1)

    def everywhere() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(head(states).float(), label)
        return loss, torch.autograd.grad(loss, states)[0]

    def at_targets() -> tuple[Tensor, Tensor]:
        loss = target_loss(head, states.index_select(0, index), label.index_select(0, index))
        return loss, torch.autograd.grad(loss, states)[0]

    rows = [timed(f"head of {tokens} tokens, all", everywhere, device), timed("head, targets only", at_targets, device)]
    (loss, grad), (other, mine) = everywhere(), at_targets()
    rows[-1] |= {"loss_difference": float((loss - other).abs() / loss),
                 "gradient_difference": float((grad.float() - mine.float()).norm() / grad.float().norm())}  # fmt: skip
    return rows


def attention_parts(
    device: torch.device, size: int, heads: int, width: int, dtype: torch.dtype, segments: int = 8
) -> list[dict[str, Any]]:
    """Attention of one packed row, forward and backward: a dense mask, or segments."""
    shape = (1, heads, size, width)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    positions = torch.arange(size, device=device).remainder(size // segments)[None]
    border, one = borders(positions), positions.eq(0).cumsum(1)
    mask = (one[:, :, None] == one[:, None, :]).tril()[:, None]
    weights = torch.randn(shape, device=device, dtype=dtype)
    kernel = _kernel() if device.type == "cuda" else one_by_one

    def dense() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (out, *torch.autograd.grad(out, (q, k, v), weights))

    def by_segments() -> tuple[Tensor, ...]:
        flat_q, flat_k, flat_v = (t.transpose(1, 2).reshape(size, heads, width) for t in (q, k, v))
        out = kernel(flat_q, flat_k, flat_v, border, size, width**-0.5).view(1, size, heads, width).transpose(1, 2)
        return (out, *torch.autograd.grad(out, (q, k, v), weights))

    rows = [timed(f"attention of 1 x {size}, mask", dense, device), timed("attention, segments", by_segments, device)]
    pairs = zip(dense(), by_segments(), strict=True)
    rows[-1]["largest_relative_difference"] = max(
        float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs
    )
    return rows


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    scale: Annotated[int, typer.Option(min=1, help="Divide the sizes by this.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time the parts and print a line for each."""
    where, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    rows = statistics_parts(where, 300_000_000 // scale**2)
    for tokens in (2048, 4096, 16384):
        rows += head_parts(where, tokens // scale, 4096 // scale, 32000 // scale, dtype)
    rows += attention_parts(where, 4096 // scale, max(1, 32 // scale), 128, dtype)
    for row in rows:
        facts = "".join(f"  {key} {value:.3g}" for key, value in row.items() if key not in ("part", "ms"))
        print(f"{row['ms']:9.3f} ms  {row['part']}{facts}", flush=True)
    if out is not None:
        out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
