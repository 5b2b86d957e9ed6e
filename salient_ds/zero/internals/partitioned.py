"""Access to parameters that DeepSpeed partitioned while a model was loaded under ZeRO-3."""

from __future__ import annotations

from torch import Tensor, nn


def take_whole(parameter: nn.Parameter) -> Tensor:
    """Return the whole tensor of a parameter. If DeepSpeed had partitioned it, the parameter is empty afterwards.

    Collective: all processes call it, for their parameters in the same order.
    """
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    parameter.all_gather(param_list=[parameter])  # type: ignore[attr-defined]
    whole = parameter.detach()
    assert whole.numel() == parameter.ds_numel, "taken over twice"  # type: ignore[attr-defined]
    parameter.ds_tensor.data = whole.new_empty(0)  # type: ignore[attr-defined]
    parameter.data = whole.new_empty(0)
    return whole


def own_partition(parameter: nn.Parameter) -> Tensor | None:
    """What this process keeps of a parameter that DeepSpeed has partitioned; None if it has not."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_id") else None  # type: ignore[attr-defined]


def put_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Write ``value`` (the same on every process) into a parameter, which DeepSpeed may have partitioned.

    Collective: all processes call it, for their parameters in the same order.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    parameter.all_gather(param_list=[parameter])  # type: ignore[attr-defined]
    parameter.data.copy_(value)
    parameter.partition(param_list=[parameter], has_been_updated=True)  # type: ignore[attr-defined]


def mark_not_available(parameter: nn.Parameter) -> None:
    """Mark the parameter as partitioned, so that an engine over the model does not broadcast it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
