"""Output layer and loss at target positions only (option ``speed.target_head``).

An answer is 10 to 30 % of the tokens of a conversation. The usual forward pass multiplies every hidden state by the
output layer, and then ignores the logits of all other positions. Here the hidden states of the targets are gathered
first. Where the output layer is frozen and whole, logits exist for a chunk of targets at a time: loss and gradient of a
chunk are computed before the next.

Shape legend: B = sequences, S = tokens, h = hidden size, V = vocabulary, n = targets, c = targets of one chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPES = ("gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
"""Decoders whose logits are those of ``lm_head`` on the last hidden state, with transformers' own causal loss."""
CHUNK = 1024
"""Targets whose logits exist at once: 131 MB in bf16 and 262 MB in fp32 for a vocabulary of 64,000."""
IGNORED = -100
INDEX = "target_index"
"""Name of the optional input: positions whose next token is a target, in the flattened (B, S), int64 (n,)."""


def use_target_head(model: nn.Module) -> bool:
    """Let ``model`` compute logits at target positions only, while it trains on labels. It then returns no logits.

    Evaluation, generation and calls without labels are as before.

    Returns:
        Whether it does so now. A model whose head is not known stays as it is.
    """
    if not has_plain_head(model):
        return False
    whole = model.forward

    @functools.wraps(whole)  # generation reads the arguments' names
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _forward(model, whole, *args, **kwargs)

    model.forward = forward
    model.target_head = True  # type: ignore[assignment]
    return True


def uses_target_head(model: nn.Module) -> bool:
    """Whether :func:`use_target_head` has changed ``model``."""
    return bool(getattr(model, "target_head", False))


def has_plain_head(model: nn.Module) -> bool:
    """Whether logits are ``lm_head(last hidden state)`` and nothing else, in model code that we know."""
    config: Any = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in MODEL_TYPES
        and type(model).__module__.startswith("transformers.")
        and type(model).__name__.endswith("ForCausalLM")
        and hasattr(model, "model")
        and isinstance(getattr(model, "lm_head", None), nn.Module)
        and getattr(config, "final_logit_softcapping", None) is None
        and getattr(model, "loss_type", None) in ("ForCausalLM", None)
    )


def target_index(labels_BS: Tensor) -> Tensor:
    """Positions whose next token is a target, in the flattened labels (n,) int64. On the CPU this waits for nothing."""
    next_BS = F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)
    return (next_BS != IGNORED).view(-1).nonzero().view(-1)


def _forward(model: Any, whole: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    index_n = kwargs.pop(INDEX, None)
    if labels is None or not model.training or args or not kwargs.keys() <= _KNOWN:
        return whole(*args, labels=labels, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden_BSh = model.model(**kwargs).last_hidden_state
    if index_n is None:
        index_n = target_index(labels)
    hidden_nh = hidden_BSh.reshape(-1, hidden_BSh.shape[-1]).index_select(0, index_n)
    target_n = labels.reshape(-1).index_select(0, index_n + 1)
    return CausalLMOutputWithPast(loss=target_loss(model.lm_head, hidden_nh, target_n))


_KNOWN = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "cu_seq_lens_q"}


def target_loss(head: nn.Module, hidden_nh: Tensor, target_n: Tensor) -> Tensor:
    """Mean cross-entropy (fp32) of the head's logits; NaN without targets, as torch's own."""
    if _frozen(head) and len(target_n):
        loss: Tensor = _ChunkedLoss.apply(hidden_nh, head.weight, target_n)
        return loss
    return F.cross_entropy(head(hidden_nh).float(), target_n)


def _frozen(head: nn.Module) -> bool:
    """Whether the head is one whole frozen weight: neither trained, adapted, hooked nor partitioned by ZeRO-3."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not hasattr(head.weight, "ds_id")
        and not head._forward_pre_hooks
        and not head._forward_hooks
    )


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy. The gradient of the hidden states is computed along with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_nh: Tensor, weight_Vh: Tensor, target_n: Tensor) -> Tensor:
        count = len(target_n)
        wanted = ctx.needs_input_grad[0]
        grad_nh = torch.empty_like(hidden_nh) if wanted else None
        losses = []
        for start in range(0, count, CHUNK):
            span = slice(start, start + CHUNK)
            logits_cV = (hidden_nh[span] @ weight_Vh.t()).float()
            log_cV = torch.log_softmax(logits_cV, 1)
            del logits_cV
            losses.append(F.nll_loss(log_cV, target_n[span], reduction="none"))
            if grad_nh is not None:
                # not divided by n yet: in fp16 the quotient would vanish
                slope_cV = log_cV.exp_()
                slope_cV.scatter_add_(1, target_n[span].unsqueeze(1), slope_cV.new_full((1, 1), -1.0).expand(
                    len(slope_cV), 1))  # fmt: skip
                torch.mm(slope_cV.to(weight_Vh.dtype), weight_Vh, out=grad_nh[span])
        if grad_nh is not None:
            ctx.save_for_backward(grad_nh)
        ctx.count = count
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad_nh,) = ctx.saved_tensors
        return (grad_nh * (grads[0] / ctx.count)).to(grad_nh.dtype), None, None
