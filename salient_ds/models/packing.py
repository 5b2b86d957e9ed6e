"""Which architectures may train on packed examples (``data.packing``), and why the others may not. No torch.

A packed row holds several examples, and position_ids restart at each of them. Where transformers notices that, it keeps
the examples apart, with the window or chunk of every layer (``masking_utils.py``). Some models do not ask it to,
some cannot: recurrent layers and convolutions carry state along the row. Nothing warns of either, so an architecture
packs only if it is in :data:`GROUPS`. ``tests/unit/models/test_packing_models.py`` compares each one there with
unpacked examples. ``README.md`` beside this file shows the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from salient_ds.config.run import ModelConfig

REMEDY = "set data.packing=false"
_ALL = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class Group:
    """Architectures that pack, tested in the same way."""

    layers: Literal["full", "window", "chunk"]
    """What their tests cover besides full attention: sliding windows, chunks, or neither."""
    attention: tuple[str, ...]
    """Values of ``model.attn_implementation`` for which packed and unpacked examples were equal."""
    names: tuple[str, ...]
    """Their ``model_type``, sorted."""
    own_masks: bool = True
    """Whether the model makes its masks from position_ids. If not, ``packed_masks.py`` gives it some."""


def _group(layers: Any, attention: tuple[str, ...], names: str, own_masks: bool = True) -> Group:
    return Group(layers, attention, tuple(sorted(names.split())), own_masks)


GROUPS = (
    _group(
        "full",
        _ALL,
        "apertus arcee aria_text axk1 bitnet cohere deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone "
        "flex_olmo gemma glm glm4 glm4_moe glm4_moe_lite gpt_neox granite granitemoe granitemoeshared helium "
        "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe llama longcat_flash "
        "minicpm3 minimax_m2 nanochat nemotron olmo olmo2 olmoe phi sarvam_mla sarvam_moe seed_oss solar_open "
        "stablelm youtu",
    ),
    _group("full", ("sdpa", "eager"), "codegen gpt_bigcode gptj persimmon"),
    _group("full", ("eager",), "gpt_neox_japanese"),
    _group(
        "window",
        _ALL,
        "beam cohere2 cohere2_moe cwm dots1 exaone4 exaone_moe gemma3 gemma3_text gemma3n_text gemma4_text kolibri1 "
        "laguna mellum ministral ministral3 mistral mixtral modernbert-decoder olmo3 phi3 qwen2 qwen3 qwen3_moe "
        "smollm3 starcoder2",
    ),
    _group("window", ("sdpa", "eager"), "doge phimoe qwen2_moe"),
    _group("window", ("eager", "flash_attention_2"), "gemma2 vaultgemma"),
    _group("window", ("eager",), "flint gpt_neo granite_swa granitemoe_swa mimo_v2_flash"),
    _group("chunk", ("sdpa", "eager"), "llama4_text"),
    _group("full", _ALL, "biogpt opt", own_masks=False),
    _group("full", ("sdpa", "eager"), "granitemoehybrid", own_masks=False),
    _group("full", ("eager",), "mpt xglm", own_masks=False),
    _group("window", _ALL, "afmoe", own_masks=False),
    _group("window", ("eager",), "gpt_oss", own_masks=False),
)
"""Everything that packs."""

REFUSED = {
    "has recurrent layers, which carry state from one example into the next": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba jamba kimi_linear lara_mini mamba mamba2 minimax nemotron_h "
        "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text "
        "recurrent_gemma rwkv xlstm zamba zamba2"
    ),
    "has convolutions, which reach from one example into the next": (
        "inkling2_loop_text inkling2_text inkling_text lfm2 lfm2_moe lfm3 zaya"
    ),
    "chooses or merges the keys that tokens attend to over the whole row": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4"
    ),
    "takes no position_ids, so it cannot know where an example begins": (
        "bart bigbird_pegasus blenderbot blenderbot-small bloom marian mbart mvp pegasus plbart trocr"
    ),
    "keeps examples apart from transformers 5.24 on only, and 5.23 may be installed": "falcon",
    "is an encoder, in which tokens attend to later ones too": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
    ),
}
"""Reason -> architectures for which it is known why they do not pack. All that are in neither table are not tested."""

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_MOVING_ROPE = ("dynamic", "longrope", "su")
"""Types of rotary embedding whose frequencies depend on the longest example of a batch."""


def group_of(model_type: object) -> Group | None:
    """The group of an architecture that packs; None: it does not."""
    return next((group for group in GROUPS if model_type in group.names), None)


def packing_problems(model: ModelConfig, config: Mapping[str, Any], max_length: int) -> list[str]:
    """Why this model cannot train on packed examples, one sentence per reason. Empty if it can.

    Args:
        config: contents of config.json. Empty if they are not known yet: then training asks again.
        max_length: ``data.max_length``.
    """
    if not config:
        return []
    kind = config.get("model_type")
    if model.trust_remote_code and config.get("auto_map"):
        return [
            f"data.packing=true: the code that comes with {model.path} (model.trust_remote_code=true) was not tested "
            f"with packed examples: {REMEDY}"
        ]
    group = group_of(kind)
    if group is None:
        known = (reason for reason, names in REFUSED.items() if kind in names.split())
        why = next(known, "was not tested with packed examples (salient_ds/models/README.md lists those that were)")
        return [f"data.packing=true: model_type={kind!r} {why}: {REMEDY}"]
    problems = list(_setting_problems(config, max_length))
    if model.attn_implementation not in group.attention:
        problems.append(
            f"data.packing=true: model_type={kind!r} was not tested equal with model.attn_implementation="
            f"{model.attn_implementation}: choose {' or '.join(group.attention)}, or {REMEDY}"
        )
    return problems


def _setting_problems(config: Mapping[str, Any], max_length: int) -> Iterator[str]:
    """Settings in config.json under which an architecture is not the one that was tested."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    two_way = text.get("use_bidirectional_attention")
    if text.get("is_causal") is False or (two_way and two_way != "vision"):
        yield f"data.packing=true: the model attends to later tokens too, as config.json says: {REMEDY}"
    layers = text.get("layer_types") or text.get("layers_block_type") or ()
    other = sorted({str(layer) for layer in layers} - _LAYER_TYPES)
    if other:
        yield f"data.packing=true: layers of type {', '.join(other)} (config.json) do not keep examples apart: {REMEDY}"
    if text.get("output_router_logits"):
        yield (
            "data.packing=true: output_router_logits=true in config.json adds a loss that counts padding and depends "
            f"on which tokens are together: set it to false there, or {REMEDY}"
        )
    longest, why = _longest(text)
    if max_length > longest:
        yield (
            f"data.packing=true: data.max_length={max_length} is above {longest}, from where on {why}: set "
            f"data.max_length to {longest} or less, or {REMEDY}"
        )


def _longest(text: Mapping[str, Any]) -> tuple[float, str]:
    """Up to how many tokens a row may have, and what happens above that."""
    if text.get("model_type") == "llama4_text" and text.get("attn_temperature_tuning", True):
        return int(text.get("floor_scale", 8192)) - 1, "attention is scaled by the position in the row"
    for rope in _ropes(text):
        if rope.get("rope_type", rope.get("type")) in _MOVING_ROPE:
            original = "original_max_position_embeddings"
            size = rope.get(original) or text.get(original) or text.get("max_position_embeddings")
            if size:
                return int(size), "rotary frequencies depend on the longest example of a batch"
    return float("inf"), ""


def _ropes(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Settings of the rotary embedding: of the model, or of each of its layer types."""
    for key in ("rope_parameters", "rope_scaling"):
        settings = text.get(key)
        if isinstance(settings, dict):
            yield settings
            yield from (part for part in settings.values() if isinstance(part, dict))
