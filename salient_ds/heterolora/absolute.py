"""SYNFLOW's network: the model with every parameter replaced by its absolute value. No parameter is changed.

Under ZeRO-3 a layer's parameters are whole only while the layer runs. So the model can neither be copied nor be changed
in place. Instead, each operation that reads a parameter is given |parameter| in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LINEAR: Callable[..., Tensor] = torch._C._nn.linear
"""torch's own linear. Under ZeRO-3, DeepSpeed replaces F.linear by a function that a TorchFunctionMode does not see."""
_READERS = {
    _LINEAR, F.embedding, F.layer_norm, F.rms_norm, torch.matmul, torch.mm, torch.addmm, torch.mul, torch.add,
    Tensor.mul, Tensor.add, Tensor.matmul, Tensor.__mul__, Tensor.__rmul__, Tensor.__add__, Tensor.__radd__,
    Tensor.__matmul__, Tensor.mul_, Tensor.add_,
}  # fmt: skip
"""Operations that model code applies to parameters. All others, DeepSpeed's hooks included, see the real values."""


class AbsoluteParameters(TorchFunctionMode):
    """While this mode is active, arithmetic with parameters uses their absolute values.

    Source: Tanaka et al. 2020, in the variant of HeteroLoRA's released code: the loss uses labels, and biases and
    norm weights are made absolute too. Differs from the reference, which overwrites the weights.

    The gradient with respect to a parameter is that of the absolute network times the parameter's sign. So the score
    sum |theta dR/dtheta| is the same with either.
    """

    def __enter__(self) -> AbsoluteParameters:
        self._linear = F.linear
        F.linear = _LINEAR
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.linear = self._linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _LINEAR and not args[1].requires_grad:
            return _FrozenLinear.apply(args[0], *_weight_and_bias(*args[1:], **(kwargs or {})))
        if func in _READERS:
            args = tuple(_absolute(a) for a in args)
            kwargs = {name: _absolute(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Like ``torch.autograd.grad``, for use inside :class:`AbsoluteParameters`.

    ``torch.autograd.grad`` leaves the mode while it runs. Layers recomputed by activation checkpointing would then see
    the real parameters.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    found: tuple[Tensor, ...] = engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, tuple(parameters), False, accumulate_grad=False
    )
    return found


def _absolute(value: Any) -> Any:
    """|value| in fp32 for a parameter or a view of one (packed factors); anything else unchanged."""
    if isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)):
        return value.abs().float()
    return value


def _weight_and_bias(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return weight, bias


class _FrozenLinear(torch.autograd.Function):
    """|W| x + |b|. It saves W itself for the backward pass, so that there is no second copy of the base model."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.dtype = x_BI.dtype
        return _LINEAR(x_BI.float(), _absolute(weight_OI), _absolute(bias_O))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return (grads[0] @ weight_OI.abs().float()).to(ctx.dtype), None, None
