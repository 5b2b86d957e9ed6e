"""Named lists of layers for ``adapter.target_modules``: those that the papers adapt, by family of models. No torch.

A preset means all linear layers of a transformer block: the query, key, value and output of attention (cross attention
too) and the feed-forward network. Source: AdaLoRA section 4, SalientLoRA section 4 (q, k, v, o, f1, f2).
"""

from __future__ import annotations

from salient_ds.strict import did_you_mean

PREFIX = "preset:"

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_T5 = ["q", "k", "v", "o"]

PRESETS: dict[str, list[str]] = {
    "bart": _OPT,
    "bert": _BERT,
    "deberta": ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"],
    "flan-t5": [*_T5, "wi_0", "wi_1", "wo"],
    "gemma": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen": _LLAMA,
    "roberta": _BERT,
    "t5": [*_T5, "wi", "wo"],
}
"""Name -> ends of module paths. "flan-t5" is for T5 v1.1 as well, whose feed-forward network is gated."""


def preset_names(target_modules: str) -> list[str]:
    """The layers of "preset:NAME".

    Raises:
        ValueError: there is no such preset.
    """
    name = target_modules.removeprefix(PREFIX)
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS, before="; ")
        raise ValueError(f"adapter.target_modules={target_modules!r}: presets are {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
