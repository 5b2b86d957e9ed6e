"""A bare PyTorch training loop with the few methods of a DeepSpeed engine that the arms use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ParameterGroups = list[dict[str, Any]]
BuildOptimizer = Callable[[ParameterGroups], torch.optim.Optimizer]


class FP16_UnfusedOptimizer:
    """One fp32 master per low-precision parameter.

    It has the name and the two attributes of DeepSpeed's optimizer wrapper for ZeRO stage 0. salient_ds finds the
    masters by these, so that its methods observe and mask here exactly as in a DeepSpeed engine.
    """

    def __init__(self, groups: ParameterGroups) -> None:
        self.fp16_groups: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self.fp32_groups = [[nn.Parameter(p.detach().float()) for p in group] for group in self.fp16_groups]
        self.masters = [master for group in self.fp32_groups for master in group]
        self.copies = [copy for group in self.fp16_groups for copy in group]

    def take_gradients(self, bound: float) -> Tensor | None:
        """Move the copies' gradients to the masters in fp32, clipped to the norm ``bound`` (0: no clipping).

        Returns:
            The norm before clipping (device tensor), or None without clipping.
        """
        pairs = [(m, c) for m, c in zip(self.masters, self.copies, strict=True) if c.grad is not None]
        grads = [copy.grad for _, copy in pairs if copy.grad is not None]
        norm, factor_1 = None, self.masters[0].new_ones(1)
        if bound > 0:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
            factor_1 = (bound / (norm + 1e-6)).clamp_max(1.0).view(1)
        scale = _compiled_scale() if factor_1.is_cuda else _scale
        for (master, copy), grad in zip(pairs, grads, strict=True):
            master.grad = scale(grad, factor_1)
            copy.grad = None
        return norm

    @torch.no_grad()
    def write_copies(self) -> None:
        torch._foreach_copy_([copy.data for copy in self.copies], [master.data for master in self.masters])


def _scale(grad: Tensor, factor_1: Tensor) -> Tensor:
    return grad.float() * factor_1


@functools.cache
def _compiled_scale() -> Callable[[Tensor, Tensor], Tensor]:
    """Compiled to one pass over memory: PyTorch's own bf16 x fp32 product reaches half of a GPU's memory bandwidth."""
    return torch.compile(_scale, dynamic=True)


class _NoHook:
    def remove(self) -> None:
        """Do nothing: there is no hook."""


class PlainEngine:
    """Model and AdamW on one process without DeepSpeed. It shows what a step costs without the engine.

    Args:
        module: the model.
        groups: trainable parameters as optimizer parameter groups.
        build_optimizer: makes AdamW from such groups.
        clip: bound of the gradient norm, 0 = none.
        autocast: run the forward pass in bf16 although trainable parameters are fp32 (PEFT's default).
    """

    def __init__(
        self, module: nn.Module, groups: ParameterGroups, build_optimizer: BuildOptimizer, clip: float, autocast: bool
    ) -> None:
        self.module = module
        self.clip = clip
        self.autocast = autocast
        self.masters: FP16_UnfusedOptimizer | None = None
        if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
            self.masters = FP16_UnfusedOptimizer(groups)
            groups = [{**g, "params": m} for g, m in zip(groups, self.masters.fp32_groups, strict=True)]
        self.stepped: list[Tensor] = [p for group in groups for p in group["params"]]
        self.basic_optimizer = build_optimizer(groups)
        self.optimizer: Any = self.masters or self.basic_optimizer
        self._norm: Tensor | None = None
        # Attributes of DeepSpeed's engine that a compaction uses when it replaces one engine by another
        self.lr_scheduler = self.monitor = None
        self.global_steps = self.global_samples = self.skipped_steps = self.micro_steps = 0
        self.module_forward_pre_hook = self.module_forward_post_hook = _NoHook()

    def destroy(self) -> None:
        """Drop masters and moments."""
        self.basic_optimizer.state.clear()
        self.stepped = []
        self.masters = None

    def __call__(self, **inputs: Tensor) -> Any:
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(**inputs)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """Clip, update the parameters and drop the gradients."""
        self.update()
        self.basic_optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Do all parts of a step except dropping the gradients."""
        if self.masters is not None:
            self._norm = self.masters.take_gradients(self.clip)
        elif self.clip > 0:
            self._norm = torch.nn.utils.clip_grad_norm_(self.stepped, self.clip)
        self.basic_optimizer.step()
        if self.masters is not None:
            self.masters.write_copies()

    def gradient_accumulation_steps(self) -> int:
        return 1

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> Tensor | None:
        return self._norm
