"""Optimizer steps for single modules: stand still while off, and count one's own steps. Shards in, shards out.

Shape legend: n = elements of one part (any piece of a flattened factor that one process owns), M = modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from salient_ds.ranks import AdamSettings, AdamView, Part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Kept:
    """What one view looked like before the optimizer, in pieces of one copy."""

    off: list[tuple[Part, str]]
    """Part and "value" or the name of a moment."""
    off_pieces: list[Tensor]
    late: list[Part]
    """Parts that take a step of their own number."""
    late_pieces: list[Tensor]


def own_pace(
    old: list[Tensor], first: list[Tensor], second: list[Tensor], adam: list[AdamSettings], steps: list[int]
) -> list[Tensor]:
    """The values (n,) that Adam's step number t (1-based) leads to, from the moments after it; one of each per part.

    p (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), Loshchilov and Hutter 2019.
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
    """Undoes what the optimizer did to modules that are off, and corrects Adam's bias for those that have been.

    A flat buffer has one step count t for all modules. While a module is off its weights and both moments are put back
    after every step, so that Adam's state is the one of its last own step; when it has taken fewer steps than t, its
    update is worked out again from the new moments with its own count. A module that was never off is left alone, bit
    for bit. Equal to one optimizer group per module (the released code skips parameters without a gradient), except
    that the global norm for clipping is taken over all processes' gradients at once, those of modules that are off
    being zero.

    Between the two calls of a step a copy of the affected shards is kept: 12 bytes per element that is off, 4 per
    element that counts its own steps.
    """

    def __init__(self, num_modules: int) -> None:
        self.on_M = [True] * num_modules
        self.steps_M = [0] * num_modules
        """Own steps of every module."""
        self.reset_M = [False] * num_modules
        """Modules whose B, moments and count become 0 before the next step."""
        self._kept: dict[str, _Kept] = {}

    def switch(self, on_M: Sequence[bool], reset: bool) -> None:
        """From the next step on; ``reset``: what goes off now starts from B = 0 if it ever comes back."""
        if reset:
            self.reset_M = [was and not now for was, now in zip(self.on_M, on_M, strict=True)]
            self.steps_M = [0 if gone else n for gone, n in zip(self.reset_M, self.steps_M, strict=True)]
        self.on_M = list(on_M)

    @torch.no_grad()
    def keep(self, view: AdamView, step: int) -> None:
        """Before the optimizer's step number ``step``."""
        off: dict[tuple[Part, str], Tensor] = {}
        late: dict[Part, Tensor] = {}
        for part in view.parts:
            if self.reset_M[part.module]:
                self._reset(view, part)
            if not self.on_M[part.module]:
                off |= {(part, name): tensor for name, tensor in _state(view, part).items()}
            elif self.steps_M[part.module] + 1 != step:
                late[part] = view.value(part)
        self._kept[view.key] = _Kept(list(off), _copied(list(off.values())), list(late), _copied(list(late.values())))

    @torch.no_grad()
    def settle(self, view: AdamView) -> None:
        """After it."""
        kept = self._kept.pop(view.key)
        if kept.late:
            states = [_state(view, part) for part in kept.late]
            steps = [self.steps_M[part.module] + 1 for part in kept.late]
            first, second = ([state[name] for state in states] for name in MOMENTS)
            new = own_pace(kept.late_pieces, first, second, [view.settings(part) for part in kept.late], steps)
            torch._foreach_copy_([state["value"] for state in states], new)
        if kept.off:
            now = {part: _state(view, part) for part, _ in kept.off}
            torch._foreach_copy_([now[part][name] for part, name in kept.off], kept.off_pieces)
            known = set(kept.off)  # moments that came with this step, the run's first, begin at zero
            fresh = [t for part, state in now.items() for name, t in state.items() if (part, name) not in known]
            if fresh:
                torch._foreach_zero_(fresh)

    def end_step(self) -> None:
        """Count the step for all modules that took it."""
        self.steps_M = [n + on for n, on in zip(self.steps_M, self.on_M, strict=True)]
        self.reset_M = [False] * len(self.on_M)

    @staticmethod
    def _reset(view: AdamView, part: Part) -> None:
        for name, tensor in _state(view, part).items():
            if name != "value" or part.factor == "B":
                tensor.zero_()


def _state(view: AdamView, part: Part) -> dict[str, Tensor]:
    """Live slices: "value", and the moments there are."""
    moments = view.moments(part)
    return {"value": view.value(part)} | {name: moments[name] for name in MOMENTS if name in moments}


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """One copy of all, cut into pieces: a kernel or two instead of one for each."""
    return list(torch.cat(tensors).split([t.numel() for t in tensors])) if tensors else []
