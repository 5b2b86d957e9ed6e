"""Which kind of model fits which task, known from config.json. No torch.

transformers loads almost any architecture under almost any auto class, and says nothing where that makes no sense: an
encoder as a causal model attends to the tokens that it is to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ENCODERS = (
    "albert bert bert-generation big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie "
    "esm eurobert funnel ibert layoutlm longformer mega megatron-bert mobilebert modernbert mpnet nezha nomic_bert "
    "nystromformer qdqbert rembert roberta roberta-prelayernorm roc_bert roformer squeezebert xlm-roberta "
    "xlm-roberta-xl xmod yoso"
)
_ENCODER_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus "
    "pegasus_x plbart prophetnet switch_transformers t5 t5gemma udop umt5 xlm-prophetnet"
)
ENCODERS = frozenset(_ENCODERS.split())
"""Architectures in which every token attends to all others, unless ``is_decoder`` is set in config.json."""
ENCODER_DECODERS = frozenset(_ENCODER_DECODERS.split())
"""Architectures with an encoder and a decoder, unless ``is_encoder_decoder`` is false in config.json."""


def family_problems(task: str, config: Mapping[str, Any], path: str) -> list[str]:
    """Why a model does not fit ``model.task``: at most one sentence.

    Args:
        config: contents of config.json. Empty if they are not known yet: then training asks again.
        path: ``model.path``, for the message.
    """
    kind = config.get("model_type")
    two_parts = config.get("is_encoder_decoder", kind in ENCODER_DECODERS)
    fits = "sequence-classification, regression or question-answering"
    if task == "causal-lm" and kind in ENCODERS and not config.get("is_decoder"):
        return [
            f"model.path={path!r} is an encoder (model_type={kind!r}): as a causal language model its tokens would "
            f"attend to those that they are to predict; set model.task to {fits}, or choose a decoder"
        ]
    if task == "causal-lm" and two_parts and kind in ENCODER_DECODERS:
        return [
            f"model.path={path!r} is an encoder-decoder (model_type={kind!r}), of which model.task=causal-lm would "
            "load the decoder alone: set model.task=seq2seq-lm"
        ]
    if task == "seq2seq-lm" and kind is not None and not two_parts:
        return [
            f"model.path={path!r} (model_type={kind!r}) has no encoder and decoder, which model.task=seq2seq-lm needs: "
            "choose a model such as BART or T5, or another model.task"
        ]
    return []


def precision_problem(config: Mapping[str, Any], precision: str, sharded_base: bool) -> str | None:
    """One sentence if ZeRO-3 cannot shard the base in this precision.

    T5 keeps a part of every layer in fp32 when it is loaded in fp16, and a layer is sharded in one type only.
    """
    if not sharded_base or precision != "fp16" or config.get("model_type") not in ("t5", "mt5", "umt5", "longt5"):
        return None
    return (
        f"train.precision=fp16: {config['model_type']} keeps parts of its layers in fp32 then, which a sharded base "
        "(ZeRO-3) cannot be: use bf16, set speed.zero3=partitioned, or use ZeRO stage 2"
    )
