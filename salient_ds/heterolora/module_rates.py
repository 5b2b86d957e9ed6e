"""Optimizer steps per module: a module that is off does not move, and each module has its own step count.

Everything here works on the local shards only.

Shape legend: n = elements of one part (any piece of a flattened factor that one process owns), M = modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salient_ds.ranks import JoiningView, Part, neighbours

if TYPE_CHECKING:
    from salient_ds.ranks import AdamSettings, AdamView

Span = tuple[Part, ...]
"""Neighbouring parts of modules that are treated alike."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Kept:
    """One view's state before the optimizer step. The pieces of a list are slices of one copy."""

    off: list[Span]
    off_states: list[dict[str, Tensor]]
    """Live slices of every span that is off: "value", and the moments that existed."""
    off_pieces: list[Tensor]
    late: list[Span]
    """Spans whose own step count is behind the optimizer's."""
    late_states: list[dict[str, Tensor]]
    late_pieces: list[Tensor]


def own_pace(
    old: list[Tensor], first: list[Tensor], second: list[Tensor], adam: list[AdamSettings], steps: list[int]
) -> list[Tensor]:
    """New parameter values (n,) of Adam's step number t (1-based), from the moments m and v after that step.

    All lists have one entry per part. The formula is that of Loshchilov and Hutter 2019:
    p (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    """
    spread = torch._foreach_sqrt(second)
    torch._foreach_div_(spread, [(1 - a.betas[1] ** t) ** 0.5 for a, t in zip(adam, steps, strict=True)])
    torch._foreach_add_(spread, [a.eps for a in adam])
    new = torch._foreach_mul(old, [1 - a.lr * a.weight_decay if a.decoupled else 1.0 for a in adam])
    torch._foreach_addcdiv_(
        new, first, spread, [-a.lr / (1 - a.betas[0] ** t) for a, t in zip(adam, steps, strict=True)]
    )
    return list(new)


class ModuleRates:
    """Freezes modules that are off, and corrects Adam's bias for modules that have been off.

    The optimizer's flat buffer has one step count t for all modules. While a module is off, its weights and both
    moments are restored after every step. So its Adam state stays that of its own last step. A module that has taken
    fewer steps than t gets another update, computed from the new moments with its own count. A module that was never
    off is not touched: its update is the optimizer's, bit for bit.

    The result equals one optimizer group per module (the released code skips parameters without a gradient), except for
    clipping: the gradient norm is taken over all processes' gradients at once, and modules that are off add zero.

    Between :meth:`keep` and :meth:`settle` a copy of the affected shards is kept: 12 bytes per element of a module that
    is off, 4 per element of one that counts its own steps.
    """

    def __init__(self, num_modules: int) -> None:
        self.on_M = [True] * num_modules
        self.steps_M = [0] * num_modules
        """Steps that each module has taken itself."""
        self.reset_M = [False] * num_modules
        """Modules whose B, moments and step count are set to 0 before the next step."""
        self._kept: dict[str, _Kept] = {}
        self._planned: dict[str, tuple[tuple[int, ...], list[Span], list[Span]]] = {}

    def switch(self, on_M: Sequence[bool], reset: bool) -> None:
        """Set which modules are on from the next step. With ``reset``, those switched off now will restart at B = 0."""
        if reset:
            self.reset_M = [was and not now for was, now in zip(self.on_M, on_M, strict=True)]
            self.steps_M = [0 if gone else n for gone, n in zip(self.reset_M, self.steps_M, strict=True)]
        self.on_M = list(on_M)

    @torch.no_grad()
    def keep(self, view: AdamView, step: int) -> None:
        """Save what :meth:`settle` needs. Call this before the optimizer's step number ``step``."""
        if any(self.reset_M):
            gone = [part for part in view.parts if self.reset_M[part.module]]
            for part, state in zip(gone, _states(view, [(part,) for part in gone]), strict=True):
                _reset(state, part)
        off, late = self._spans(view, step)
        off_states, late_states = _states(view, off), _states(view, late)
        off_pieces = _copied([tensor for state in off_states for tensor in state.values()])
        late_pieces = _copied([state["value"] for state in late_states])
        self._kept[view.key] = _Kept(off, off_states, off_pieces, late, late_states, late_pieces)

    def _spans(self, view: AdamView, step: int) -> tuple[list[Span], list[Span]]:
        """What is off, and what is late; neighbours that are treated alike are together. Made anew after a switch."""
        # how many steps each module is behind; -1: it is off
        behind_M = tuple(step - 1 - n if on else -1 for n, on in zip(self.steps_M, self.on_M, strict=True))
        known = self._planned.get(view.key)
        if known is None or known[0] != behind_M:
            alike: dict[int, list[Part]] = {}
            for part in view.parts:
                alike.setdefault(behind_M[part.module], []).append(part)
            spans = {behind: neighbours(view, parts) for behind, parts in alike.items()}
            late = [span for behind, found in spans.items() if behind > 0 for span in found]
            known = self._planned[view.key] = (behind_M, spans.get(-1, []), late)
        return known[1], known[2]

    @torch.no_grad()
    def settle(self, view: AdamView) -> None:
        """Restore modules that are off, and redo the update of late ones. Call this after the optimizer's step."""
        kept = self._kept.pop(view.key)
        if kept.late:
            states = _with_moments(view, kept.late, kept.late_states)
            steps = [self.steps_M[span[0].module] + 1 for span in kept.late]
            first, second = ([state[name] for state in states] for name in MOMENTS)
            new = own_pace(kept.late_pieces, first, second, [view.settings(span[0]) for span in kept.late], steps)
            torch._foreach_copy_([state["value"] for state in states], new)
        if kept.off:
            torch._foreach_copy_([tensor for state in kept.off_states for tensor in state.values()], kept.off_pieces)
            now = _with_moments(view, kept.off, kept.off_states)
            # the run's first step creates the moments: they must start at zero
            fresh = [
                tensor
                for state, before in zip(now, kept.off_states, strict=True)
                for name, tensor in state.items()
                if name not in before
            ]
            if fresh:
                torch._foreach_zero_(fresh)

    def end_step(self) -> None:
        """Count the step for all modules that are on."""
        self.steps_M = [n + on for n, on in zip(self.steps_M, self.on_M, strict=True)]
        self.reset_M = [False] * len(self.on_M)


def _reset(state: dict[str, Tensor], part: Part) -> None:
    for name, tensor in state.items():
        if name != "value" or part.factor == "B":
            tensor.zero_()


def _states(view: AdamView, spans: Sequence[Span]) -> list[dict[str, Tensor]]:
    """Live slices of every span: "value", and the moments that exist."""
    # asked once: isinstance of a protocol costs 40 us, as much as all the rest for a span
    if isinstance(view, JoiningView):
        found = [(view.span_value(span), view.span_moments(span)) for span in spans]
    else:
        found = [(view.value(span[0]), view.moments(span[0])) for span in spans]
    return [{"value": value} | {name: moments[name] for name in MOMENTS if name in moments} for value, moments in found]


def _with_moments(view: AdamView, spans: Sequence[Span], states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """``states`` of the spans; looked up again if their moments were not there yet."""
    return states if all(MOMENTS[0] in state for state in states) else _states(view, spans)


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of the tensors, as slices of one buffer: one or two kernels instead of one per tensor."""
    return list(torch.cat(tensors).split([t.numel() for t in tensors])) if tensors else []
