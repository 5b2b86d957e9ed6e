"""The floating-point operations that a training step of a model needs, counted from shapes.

A multiplication and an addition count as two. Counted are, per token on this process (padding included):

    frozen matrices    4 per weight: 2 forward, 2 for the gradient of the input
    trained matrices   6 per weight: 2 more for the gradient of the weight. Adapters count with their live rows
    attention          12 x heads x head dimension per pair of tokens of which one sees the other, in every layer:
                       scores and weighted sums, forward and twice that backward

Layers before the first one with anything trainable are only run forward: 2 and 4. Experts count with the share that a
token is sent to. A head that computes logits at targets only (``speed.target_head``) counts those. Not counted is what
the model does not need, such as recomputation, and what is no matrix product, such as norms and the optimizer.

The first adapted layer counts as if its input needed a gradient (a small part of one layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from salient_ds.adapters.full import is_inside
from salient_ds.adapters.packed_model import layer_of
from salient_ds.adapters.ranked_linear import RankedLinear
from salient_ds.adapters.survey import survey
from salient_ds.models.target_head import uses_target_head
from salient_ds.zero.internals.layouts import full_shape

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations call the number of experts, and how many of them a token is sent to."""


class NotCounted(ValueError):
    """The operations of this model cannot be counted. The message is a clause that says why."""


@dataclass(frozen=True)
class AttentionKind:
    """Layers with the same attention."""

    window: int | None
    """How many tokens a token sees at most, itself included; None: no limit."""
    flops: int
    """Per pair of tokens, of all these layers."""


@dataclass(frozen=True)
class ModelFlops:
    """What a step costs. Adapters: per row and token, and what they cost without any row."""

    per_token: int
    """Everything that every token passes, adapters left out."""
    per_target: int
    """A head that computes logits at targets only; else 0."""
    adapters_fixed: int
    """Factors that all rows of a matrix share (LoRA^2), per token."""
    per_row_M: tuple[int, ...]
    """Per token and live row of every adapted matrix."""
    attention: tuple[AttentionKind, ...]
    causal: bool
    """Whether tokens see only those before them."""

    def adapters(self, live_M: Sequence[int]) -> int:
        """FLOPs of the adapters per token. ``live_M``: live rows of every matrix."""
        return self.adapters_fixed + sum(rows * cost for rows, cost in zip(live_M, self.per_row_M, strict=True))

    def step(self, lengths: Sequence[int], targets: int, adapters: int) -> int:
        """FLOPs of one step on this process.

        Args:
            lengths: tokens of every sequence of which attention sees nothing else.
            targets: tokens with a loss.
            adapters: from :meth:`adapters`.
        """
        tokens = sum(lengths)
        pairs = sum(kind.flops * sum(self.pairs(length, kind.window) for length in lengths) for kind in self.attention)
        return tokens * (self.per_token + adapters) + targets * self.per_target + pairs

    def pairs(self, length: int, window: int | None) -> int:
        """Pairs of tokens of a sequence of which one sees the other, itself included."""
        seen = length if window is None else min(window, length)
        if not self.causal:
            return length * seen
        return seen * (seen + 1) // 2 + (length - seen) * seen


def count_flops(model: nn.Module, adapters: Mapping[str, RankedLinear]) -> ModelFlops:
    """Count the operations of an adapted model, whether or not ZeRO-3 partitions it.

    Args:
        adapters: by module path, in model order.

    Raises:
        NotCounted: the model has an encoder and a decoder, or experts of which it does not say how many are used.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise NotCounted("encoder and decoder see different tokens")
    text = config.get_text_config()
    head = _output_layer(model) if uses_target_head(model) else None
    first = _first_trained(model)
    share = _used_share(text)
    towers = survey(model).towers
    per_token = per_target = 0.0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(is_inside(path, tower) for tower in towers):
            continue
        expert = "Expert" in type(module).__name__ or "experts" in path.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            shape = full_shape(parameter)
            if len(shape) < 2 or not (expert or name == "weight"):
                continue  # biases and norms; the factors of an adapter have other names
            cost: float = math.prod(shape) * (6 if parameter.requires_grad else 4 if _place(path) >= first else 2)
            if expert:
                if share is None:
                    raise NotCounted("config.json does not say how many of its experts a token is sent to")
                cost *= share
            if module is head:
                per_target += cost
            else:
                per_token += cost
    rows, fixed = [], 0
    for adapter in adapters.values():
        shapes = [(shape, axis) for shape, axis in adapter.factor_shapes().values() if len(shape) > 1]
        rows.append(sum(6 * math.prod(s) // s[axis] for s, axis in shapes if axis is not None and s[axis]))
        fixed += sum(6 * math.prod(s) for s, axis in shapes if axis is None)
    return ModelFlops(
        per_token=round(per_token),
        per_target=round(per_target),
        adapters_fixed=fixed,
        per_row_M=tuple(rows),
        attention=_attention(text, first),
        causal=_is_causal(model),
    )


def _is_causal(model: Any) -> bool:
    """Whether tokens see only those before them: attention says so, else models that write text do."""
    said = {found for module in model.modules() if isinstance(found := getattr(module, "is_causal", None), bool)}
    return True in said or (not said and bool(model.can_generate()))


def _output_layer(model: Any) -> nn.Module | None:
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def _place(path: str) -> float:
    """Number of the layer that a module is in; after all layers (the head) infinity."""
    layer = layer_of(path)
    return int(layer.rpartition(".")[2]) if layer else math.inf


def _first_trained(model: nn.Module) -> float:
    """Number of the first layer with something trainable; -1 if that is the embedding, infinity if it is the head."""
    places: list[float] = [math.inf]
    for path, module in model.named_modules():
        if isinstance(module, RankedLinear):
            places.append(_place(path))
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            places.append(-1 if isinstance(module, nn.Embedding) else _place(path))
    return min(places)


def _used_share(text: Any) -> float | None:
    """Share of the experts that a token is sent to; None if it is not known."""
    number = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    chosen = next((n for name in _CHOSEN if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    return None if number is None or chosen is None else min(chosen / number, 1.0)


def _attention(text: Any, first: float) -> tuple[AttentionKind, ...]:
    """What attention costs per pair of tokens, by window. Empty for models without attention."""
    heads, layers = getattr(text, "num_attention_heads", None), getattr(text, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return ()
    scores, sums = _head_dims(text, heads)
    window = getattr(text, "sliding_window", None)
    kinds = list(getattr(text, "layer_types", None) or [])
    if len(kinds) != layers:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    found: dict[int | None, int] = {}
    for index, kind in enumerate(kinds):
        if "attention" not in kind or "linear" in kind:
            continue
        seen = window if kind == "sliding_attention" and isinstance(window, int) else None
        found[seen] = found.get(seen, 0) + 2 * heads * (scores + sums) * (3 if index >= first else 1)
    return tuple(AttentionKind(seen, flops) for seen, flops in found.items())


def _head_dims(text: Any, heads: int) -> tuple[int, int]:
    """Dimensions of a head in queries and keys, and in values. They differ in multi-head latent attention."""
    nope, rope = (getattr(text, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    value = getattr(text, "v_head_dim", None)
    if isinstance(nope, int) and isinstance(rope, int) and isinstance(value, int):
        return nope + rope, value
    size = getattr(text, "head_dim", None)
    size = size if isinstance(size, int) and size > 0 else int(text.hidden_size) // heads
    return size, size
