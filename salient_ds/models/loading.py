"""Loads the base model and the tokenizer of a run. Under ZeRO-3 the model is partitioned while it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salient_ds.config.run import ModelConfig, RunConfig
from salient_ds.config.train import TrainConfig
from salient_ds.models.families import family_problems
from salient_ds.models.heads import draw_head, head_settings, label_problem, refuse_mismatched, split_fresh
from salient_ds.models.meta_model import AUTO_CLASSES, attention_of, attention_problem
from salient_ds.models.packing import packing_problems

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Training precision by its name in the configuration."""

PEFT_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "question-answering": "QUESTION_ANS",
}
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


@dataclass(frozen=True)
class BaseModel:
    """A base model in training precision, without adapters."""

    model: nn.Module
    """On CPU, or partitioned under ZeRO-3."""
    fresh: tuple[str, ...] = ()
    """Parameters of the head that the checkpoint lacks. They begin at random values."""

    @property
    def note(self) -> str | None:
        """One line for the user about the fresh head."""
        if not self.fresh:
            return None
        return f"fresh head, not in the checkpoint: {', '.join(self.fresh)}"


def load_model(
    model: ModelConfig, train: TrainConfig, ds_config: dict[str, Any], labels: Sequence[str] = ()
) -> nn.Module:
    """As :func:`load_base`, the model alone."""
    return load_base(model, train, ds_config, labels).model


def load_base(
    model: ModelConfig, train: TrainConfig, ds_config: dict[str, Any], labels: Sequence[str] = ()
) -> BaseModel:
    """The base model with the head for the run's task. What the checkpoint lacks of it gets its initial values here.

    Args:
        labels: names of the classes, in the order of their numbers; empty: as the checkpoint has them.

    Raises:
        ValueError: the checkpoint does not hold every weight of the model, or a head of another size.
    """
    import transformers

    dtype = DTYPES[train.precision]
    common: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": dtype,
    }
    auto = getattr(transformers, AUTO_CLASSES[model.task])
    settings = head_settings(model, labels)
    missing: list[str] = []
    stored = dict(getattr(_read_config(model), "id2label", None) or {}) if labels else {}
    refuse_attention(model)
    with partitioned_loading(ds_config), no_load_report(model.task != "causal-lm"):
        if model.random_weights:
            config = transformers.AutoConfig.from_pretrained(model.path, revision=model.revision, **settings)
            loaded: nn.Module = auto.from_config(config, **common)
            missing = [name for name, _ in loaded.named_parameters() if split_fresh(loaded, [name])[0]]
        else:
            loaded, info = auto.from_pretrained(
                model.path, revision=model.revision, output_loading_info=True, ignore_mismatched_sizes=True,
                **common, **settings,
            )  # fmt: skip
            refuse_mismatched(model, info["mismatched_keys"])
            missing = sorted(info["missing_keys"])
    fresh, lost = split_fresh(loaded, missing)
    if lost:
        raise ValueError(
            f"{model.path} lacks {len(lost)} weights of the model, for example {lost[:3]}: "
            "download it again, or choose the task that it was saved for"
        )
    problem = label_problem(stored, labels) if stored and not fresh else None
    if problem is not None:
        raise ValueError(problem)
    draw_head(loaded, fresh, train.seed)
    loaded.config.use_cache = False  # type: ignore[union-attr]
    if train.activation_checkpointing != "none":
        recompute_layers(loaded, train.activation_checkpointing == "selective")
    return BaseModel(loaded, tuple(fresh))


def recompute_layers(model: Any, selective: bool = False) -> None:
    """Recompute every decoder layer in the backward pass, or with ``selective`` only what is cheap."""
    # Reentrant checkpointing under ZeRO-3 with a frozen base keeps every gathered weight until backward ends.
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = keep_products
    model.gradient_checkpointing_enable(options)


@contextlib.contextmanager
def no_load_report(quiet: bool) -> Iterator[None]:
    """Keep transformers from printing a table of the weights that a fresh head lacks: one line of ours names them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def attention_for(model: ModelConfig) -> str:
    """The attention implementation for a model that no run file chooses one for: "sdpa", or "eager" without that."""
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[model.task])
    kind = type(_read_config(model))
    return "sdpa" if kind not in auto._model_mapping or "sdpa" in attention_of(auto._model_mapping[kind]) else "eager"


def refuse_attention(model: ModelConfig) -> None:
    """Check that the model's class has the attention implementation that the run asks for.

    Raises:
        ValueError: it has not (DeBERTa has eager only).
    """
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[model.task])
    kind = type(_read_config(model))
    if kind in auto._model_mapping:
        problem = attention_problem(model.attn_implementation, attention_of(auto._model_mapping[kind]))
        if problem is not None:
            raise ValueError(problem)


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


def refuse_unfit(run: RunConfig) -> None:
    """Check that the model fits the task, and may train on packed examples if the run packs. No weights are read.

    ``salient-ds check`` says the same earlier, unless config.json was not on the machine yet.

    Raises:
        ValueError: as :func:`~salient_ds.models.families.family_problems` and
            :func:`~salient_ds.models.packing.packing_problems` say.
    """
    config = _read_config(run.model).to_dict()
    problems = family_problems(run.model.task, config, run.model.path)
    if run.data.packing:
        problems += packing_problems(run.model, config, run.data.max_length)
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
