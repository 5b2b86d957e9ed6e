"""Wires shortcuts into the layers of a transformers model, without changing its files.

Shape legend: D = hidden size, h_BTD = layer input, z_BTD = input of the feed-forward part, u_BTD = that of the layer
before, N = B T.

Each layer object gets a subclass of its own class. The subclass's ``forward`` writes out the layer's equation,
shortcuts included. Activation checkpointing keeps working, because transformers wraps it around a layer's ``forward``.
z leaves a layer as a second result, and enters the next layer as a second argument. Hooks, which run outside the
checkpointed region, take it off and put it in. So a layer reads nothing from outside when it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from salient_ds.heterolora.shortcut import KINDS, NormAfterShortcut, Shortcut

Layer = Any
"""A layer of transformers. It is ``Any`` because the type checker does not know its parts."""


class Carrier:
    """Holds u between two layers. There is one per model, and it is copied with the model."""

    def __init__(self) -> None:
        self.u_BTD: Tensor | None = None


def _through(layer: Layer, kind: str, x_BTD: Tensor) -> Tensor:
    """R(x); x itself if the layer has no such shortcut."""
    module = getattr(layer, kind, None)
    return x_BTD if module is None else module(x_BTD)


def _join(layer: Layer, kind: str, x_BTD: Tensor, source_BTD: Tensor, norm: nn.Module) -> Tensor:
    """x + S(source). Under "reuse" the sum is normalised again, whether or not the shortcut exists."""
    module = getattr(layer, kind, None)
    joined_BTD = x_BTD if module is None else x_BTD + module(source_BTD)
    return norm(joined_BTD) if layer.norm_after_shortcut == "reuse" else joined_BTD


def _results(layer: Layer, output_BTD: Tensor, u_BTD: Tensor) -> Any:
    return (output_BTD, u_BTD) if layer.hands_on else output_BTD


def pre_norm_forward(layer: Layer, h_BTD: Tensor, u_BTD: Tensor | None = None, **kwargs: Any) -> Any:
    """LLaMA, Mistral, Qwen2, Qwen3, Gemma: z = R1(h) + SA(N1 h) [+ S_ffn(u)]; h' = R2(z) + MLP(N2 z) + S_sa(h)."""
    attention_BTD = layer.self_attn(hidden_states=layer.input_layernorm(h_BTD), **kwargs)[0]
    z_BTD = _through(layer, "residual_1", h_BTD) + attention_BTD
    if u_BTD is not None:
        z_BTD = _join(layer, "shortcut_ffn", z_BTD, u_BTD, layer.post_attention_layernorm)
    ffn_BTD = layer.mlp(layer.post_attention_layernorm(z_BTD))
    output_BTD = _through(layer, "residual_2", z_BTD) + ffn_BTD
    output_BTD = _join(layer, "shortcut_sa", output_BTD, h_BTD, layer.input_layernorm)
    return _results(layer, output_BTD, z_BTD)


def opt_forward(
    layer: Layer, h_BTD: Tensor, u_BTD: Tensor | None = None, use_cache: bool | None = False, **kwargs: Any
) -> Any:
    """OPT, both forms. Post-LN: z = LN1(R1(h) + SA(h)) [+ S_ffn(u)]; h' = LN2(R2(z) + FFN(z)) + S_sa(h).

    Pre-LN: z = R1(h) + SA(LN1 h) [+ S_ffn(u)]; h' = R2(z) + FFN(LN2 z) + S_sa(h).
    """
    norm_1, norm_2, first = layer.self_attn_layer_norm, layer.final_layer_norm, layer.do_layer_norm_before
    attention_BTD = layer.self_attn(hidden_states=norm_1(h_BTD) if first else h_BTD, **kwargs)[0]
    attention_BTD = nn.functional.dropout(attention_BTD, p=layer.dropout, training=layer.training)
    z_BTD = _through(layer, "residual_1", h_BTD) + attention_BTD
    z_BTD = z_BTD if first else norm_1(z_BTD)
    if u_BTD is not None:
        z_BTD = _join(layer, "shortcut_ffn", z_BTD, u_BTD, norm_1)
    z_ND = z_BTD.reshape(-1, z_BTD.size(-1))  # as transformers does: the products' rounding depends on the shape
    ffn_ND = layer.fc2(layer.activation_fn(layer.fc1(norm_2(z_ND) if first else z_ND)))
    ffn_ND = nn.functional.dropout(ffn_ND, p=layer.dropout, training=layer.training)
    output_BTD = (_through(layer, "residual_2", z_ND) + ffn_ND).view(z_BTD.shape)
    output_BTD = output_BTD if first else norm_2(output_BTD)
    output_BTD = _join(layer, "shortcut_sa", output_BTD, h_BTD, norm_2)
    return _results(layer, output_BTD, z_BTD)


def roberta_forward(
    layer: Layer,
    h_BTD: Tensor,
    u_BTD: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    **kwargs: Any,
) -> Any:
    """RoBERTa: z = LN1(R1(h) + SA(h)) [+ S_ffn(u)]; h' = LN2(R2(z) + FFN(z)) + S_sa(h), as OPT's post-LN form.

    The reference defines no shortcuts for RoBERTa. The two arguments about an encoder belong to cross-attention, which
    :func:`wire_shortcuts` refuses.
    """
    out_1, out_2 = layer.attention.output, layer.output
    attention_BTD = layer.attention.self(h_BTD, attention_mask=attention_mask, **kwargs)[0]
    z_BTD = out_1(attention_BTD, _through(layer, "residual_1", h_BTD))
    if u_BTD is not None:
        z_BTD = _join(layer, "shortcut_ffn", z_BTD, u_BTD, out_1.LayerNorm)
    output_BTD = out_2(layer.intermediate(z_BTD), _through(layer, "residual_2", z_BTD))
    output_BTD = _join(layer, "shortcut_sa", output_BTD, h_BTD, out_2.LayerNorm)
    return _results(layer, output_BTD, z_BTD)


FORWARDS: dict[str, Callable[..., Any]] = {
    "OPTDecoderLayer": opt_forward,
    "RobertaLayer": roberta_forward,
    "LlamaDecoderLayer": pre_norm_forward,
    "MistralDecoderLayer": pre_norm_forward,
    "Qwen2DecoderLayer": pre_norm_forward,
    "Qwen3DecoderLayer": pre_norm_forward,
    "GemmaDecoderLayer": pre_norm_forward,
}
"""The forward function of a wired layer, by the layer's class name."""
_WIRED: dict[type, type] = {}


def _kind_of_layer(module: nn.Module) -> str:
    """The layer's class name in transformers, also if the layer is wired; empty for classes from elsewhere."""
    kind, wired = type(module), type(module) in _WIRED.values()
    return kind.__name__.removeprefix("Shortcut") if wired or kind.__module__.startswith("transformers.") else ""


def shortcut_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers that can have shortcuts, by path, in model order.

    Raises:
        ValueError: there are none, or the config turns on what the layer equations do not cover (LayerDrop,
            cross-attention, chunked feed-forward).
    """
    layers = {n: m for n, m in model.named_modules() if _kind_of_layer(m) in FORWARDS}
    if not layers:
        raise ValueError(
            f"adapter.shortcuts: {type(model).__name__} has no layer that shortcuts are defined for "
            f"({', '.join(FORWARDS)}): use one of these models, or search without shortcuts"
        )
    config: Any = getattr(model, "config", None)
    dropped = getattr(config, "layerdrop", 0.0) or 0.0
    if dropped > 0:
        raise ValueError(
            f"adapter.shortcuts: the model skips layers at random (layerdrop={dropped:g}), so that a shortcut has no "
            "fixed source: set layerdrop to 0 in its config.json"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError("adapter.shortcuts: layers with cross attention have no place defined for shortcuts")
    if getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError("adapter.shortcuts: set chunk_size_feed_forward to 0 in the model's config.json")
    return layers


def shortcut_names(model: nn.Module) -> list[str]:
    """Paths of all shortcuts that the model can have: layer by layer, each in the order of ``KINDS``.

    The first layer has no ``shortcut_ffn``, because no layer comes before it. Raises like :func:`shortcut_layers`.
    """
    paths = list(shortcut_layers(model))
    return [f"{p}.{kind}" for i, p in enumerate(paths) for kind in KINDS if i or kind != "shortcut_ffn"]


def wire_shortcuts(model: nn.Module, shortcuts: dict[str, Shortcut], norm_after_shortcut: NormAfterShortcut) -> None:
    """Put the shortcuts (by path) into the model's layers, in place. Call this before DeepSpeed adds its hooks.

    Every layer is wired, with or without a shortcut. Under "reuse" the additional norms then run in all layers, so a
    missing shortcut and one that is switched off are the same function. With "none" the model's output does not change
    as long as all B are zero or all masks are off.

    Raises:
        ValueError: as :func:`shortcut_layers`.
    """
    layers = shortcut_layers(model)
    assert not any(isinstance(layer, tuple(_WIRED.values())) for layer in layers.values()), "wired already"
    carrier, paths = Carrier(), list(layers)
    # u is handed on only to a layer that takes it: with checkpointing it would be kept until backward
    receives = [
        i > 0 and (norm_after_shortcut == "reuse" or f"{p}.shortcut_ffn" in shortcuts) for i, p in enumerate(paths)
    ]
    for index, (path, layer) in enumerate(layers.items()):
        for kind in KINDS:
            if f"{path}.{kind}" in shortcuts:
                setattr(layer, kind, shortcuts[f"{path}.{kind}"])
        layer.__class__ = _wired_class(type(layer))
        layer.norm_after_shortcut = norm_after_shortcut
        layer.carrier = carrier
        layer.receives = receives[index]
        layer.hands_on = index + 1 < len(paths) and receives[index + 1]
        # prepended, so that other hooks (transformers' recording of hidden states, DeepSpeed's) see a plain layer
        layer.register_forward_pre_hook(_put_in, prepend=True)
        layer.register_forward_hook(_take_off, prepend=True)


def _wired_class(original: type) -> type:
    """The subclass whose ``forward`` has the shortcuts; there is one per layer class."""
    if original not in _WIRED:
        forward = FORWARDS[original.__name__]
        # transformers wraps checkpointing around the ``forward`` of every class derived from its layers
        body = {"forward": lambda self, *args, **kwargs: forward(self, *args, **kwargs), "__module__": __name__}
        _WIRED[original] = type(f"Shortcut{original.__name__}", (original,), body)
    return _WIRED[original]


def _put_in(layer: Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
    u_BTD, layer.carrier.u_BTD = layer.carrier.u_BTD, None
    assert (u_BTD is not None) or not layer.receives, "a layer ran without the one before it"
    return (args[0], u_BTD if layer.receives else None, *args[1:])


def _take_off(layer: Layer, args: tuple[Any, ...], output: Any) -> Any:
    if not layer.hands_on:
        return output
    output_BTD, layer.carrier.u_BTD = output
    return output_BTD
