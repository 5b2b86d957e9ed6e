"""Parameters that DeepSpeed partitioned while a model was loaded under ZeRO-3."""

from __future__ import annotations

from torch import Tensor, nn


def take_whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter that DeepSpeed may have partitioned; the parameter is empty afterwards.

    Collective: all processes, in the same order.
    """
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    parameter.all_gather(param_list=[parameter])  # type: ignore[attr-defined]
    whole = parameter.detach()
    assert whole.numel() == parameter.ds_numel, "taken over twice"  # type: ignore[attr-defined]
    parameter.ds_tensor.data = whole.new_empty(0)  # type: ignore[attr-defined]
    parameter.data = whole.new_empty(0)
    return whole


def mark_not_available(parameter: nn.Parameter) -> None:
    """Let an engine over the model take the parameter for a partitioned one, which it does not broadcast."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
