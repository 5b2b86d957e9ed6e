"""Masks for packed rows, for the models that do not make them from position_ids themselves.

gpt_oss, for example, calls transformers' mask functions without position_ids, and one example would read another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from salient_ds.models.packing import group_of


def keep_examples_apart(model: nn.Module) -> None:
    """Make ``model`` attend within examples where position_ids restart and there is no mask.

    Does nothing for models that do so themselves. The masks are transformers' own: one, or one for each type of layer.
    Batches with a mask (evaluation) and flash attention, which reads position_ids, are left as they are.

    Args:
        model: a causal language model for which :func:`~salient_ds.models.packing.packing_problems` found nothing.
    """
    group = group_of(model.config.model_type)  # type: ignore[union-attr]
    assert group is not None, "a model that does not pack"
    if not group.own_masks:
        model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers.masking_utils import create_masks_for_generate

    positions_BS = kwargs.get("position_ids")
    if positions_BS is None or kwargs.get("attention_mask") is not None:
        return args, kwargs
    like_BS0 = torch.empty((*positions_BS.shape, 0), dtype=model.dtype, device=positions_BS.device)  # sizes and dtype
    masks = create_masks_for_generate(model.config, like_BS0, None, None, position_ids=positions_BS)
    return args, kwargs | {"attention_mask": masks}
