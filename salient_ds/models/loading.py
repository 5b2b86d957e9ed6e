"""Loads the base model and the tokenizer of a run. Under ZeRO-3 the model is partitioned while it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from salient_ds.config.run import ModelConfig, RunConfig, TrainConfig
from salient_ds.models.meta_model import AUTO_CLASSES
from salient_ds.models.packing import packing_problems

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Training precision by its name in the configuration."""

PEFT_TASK_TYPES = {"causal-lm": "CAUSAL_LM"}
"""The task_type that PEFT and vLLM read from an exported adapter."""


def load_tokenizer(model: ModelConfig) -> Any:
    """The run's tokenizer. If it has no padding token, EOS becomes one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer or model.path,
        revision=model.revision if model.tokenizer is None else None,
        trust_remote_code=model.trust_remote_code,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def partitioned_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Context in which ``from_pretrained`` partitions weights as it reads them, if the configuration is ZeRO stage 3.

    transformers partitions while an HfDeepSpeedConfig object is alive. The object must be gone afterwards, or a later
    stage-2 run in the same process would be partitioned too.
    """
    if ds_config.get("zero_optimization", {}).get("stage", 0) != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def load_model(model: ModelConfig, train: TrainConfig, ds_config: dict[str, Any]) -> nn.Module:
    """The base model in training precision, without adapters; on CPU, or partitioned under ZeRO-3.

    Raises:
        ValueError: the checkpoint does not hold every weight of the model.
    """
    import transformers

    dtype = DTYPES[train.precision]
    common: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": dtype,
    }
    auto = getattr(transformers, AUTO_CLASSES[model.task])
    with partitioned_loading(ds_config):
        if model.random_weights:
            config = transformers.AutoConfig.from_pretrained(model.path, revision=model.revision)
            loaded: nn.Module = auto.from_config(config, **common)
        else:
            loaded, info = auto.from_pretrained(model.path, revision=model.revision, output_loading_info=True, **common)
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise ValueError(
                    f"{model.path} lacks {len(missing)} weights of the model, for example {missing[:3]}: "
                    "download it again, or choose the task that it was saved for"
                )
    loaded.config.use_cache = False  # type: ignore[union-attr]
    if train.activation_checkpointing != "none":
        # Reentrant checkpointing under ZeRO-3 with a frozen base keeps every gathered weight until backward ends.
        options: dict[str, Any] = {"use_reentrant": False}
        if train.activation_checkpointing == "selective":
            options["context_fn"] = keep_products
        loaded.gradient_checkpointing_enable(options)  # type: ignore[operator]
    return loaded


def keep_products() -> Any:
    """Contexts for selective activation checkpointing.

    Results of matrix products and attention are kept; everything else is recomputed.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = [
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]  # fmt: skip
    return create_selective_checkpoint_contexts(kept)


def hidden_size(model: ModelConfig) -> int | None:
    """Hidden size of the model, read from config.json; None if that does not state it. "auto" buffer sizes follow
    from it."""
    width = getattr(_read_config(model), "hidden_size", None)
    return width if isinstance(width, int) else None


def refuse_packing(run: RunConfig) -> None:
    """Check that the model may train on packed examples, if the run packs. Its weights are not read.

    ``salient-ds check`` says the same earlier, unless config.json was not on the machine yet.

    Raises:
        ValueError: as :func:`~salient_ds.models.packing.packing_problems` says.
    """
    if run.data.packing:
        problems = packing_problems(run.model, _read_config(run.model).to_dict(), run.data.max_length)
        if problems:
            raise ValueError("; ".join(problems))


def _read_config(model: ModelConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What must be equal for one run to read another's checkpoint: architecture and sizes, but not the path."""
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    keys = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "d_model",
        "num_layers",
    )
    return {key: config[key] for key in keys if key in config}
