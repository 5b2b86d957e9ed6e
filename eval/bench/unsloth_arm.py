"""Baseline: LoRA of the Unsloth library in a bare PyTorch loop, with its own kernels and its own checkpointing.

Unsloth is not among this project's requirements. Install it where the baseline is to run (``pip install unsloth``).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .models import model_directory, run_config
from .peer_arm import PeerArm
from .plain_engine import PlainEngine
from .plan import ArmSpec
from .timing import Stopwatch

MINIMUM_LENGTH = 2048
"""Unsloth prepares its rotary tables for at least this many tokens."""


def import_first() -> None:
    """Import Unsloth. Call this before transformers is imported, since Unsloth replaces parts of it.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
    import unsloth  # noqa: F401


class UnslothArm(PeerArm):
    """An Unsloth model and fused AdamW: fp32 adapters and bf16 autocast, as Unsloth's trainer runs them."""

    @classmethod
    def build(cls, spec: ArmSpec, device: torch.device) -> UnslothArm:
        from unsloth import FastLanguageModel

        run = run_config(spec, "unused", {"name": "lora"})
        length = max(MINIMUM_LENGTH, spec.settings.seq)
        config = {**spec.settings.config, "dtype": "bfloat16", "pad_token_id": 0}
        with model_directory(config) as folder:
            write_tokenizer(Path(folder), int(config["vocab_size"]))
            with random_base(folder, device, spec.settings.seed):
                model, _ = FastLanguageModel.from_pretrained(
                    folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=False
                )
            model = FastLanguageModel.get_peft_model(
                model, r=spec.rank, lora_alpha=spec.rank, lora_dropout=0, bias="none",
                target_modules=list(run.adapter.target_modules), max_seq_length=length,
                use_gradient_checkpointing="unsloth" if spec.checkpointing == "all" else False,
            )  # fmt: skip
        FastLanguageModel.for_training(model)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]

        def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(groups, lr=run.train.lr, weight_decay=0.0, fused=device.type == "cuda")

        engine = PlainEngine(model, [{"params": trained}], adamw, spec.settings.clip, autocast=True)
        return cls(engine, Stopwatch(device))


@contextlib.contextmanager
def random_base(folder: str, device: torch.device, seed: int) -> Iterator[None]:
    """While this is entered, Unsloth builds its base model with random weights instead of reading a checkpoint."""
    import unsloth.models.llama as llama

    real = llama.AutoModelForCausalLM

    class WithRandomWeights(real):  # type: ignore[misc,valid-type]
        @classmethod
        def from_pretrained(
            cls, name: str, *args: Any, config: Any = None, attn_implementation: str | None = None, **more: Any
        ) -> Any:
            from transformers import AutoConfig

            config = config or AutoConfig.from_pretrained(folder)
            torch.manual_seed(seed)
            with device:
                model = real.from_config(
                    config, attn_implementation=attn_implementation or "sdpa", dtype=torch.bfloat16
                )
            model.config._name_or_path = folder
            return model

    llama.AutoModelForCausalLM = WithRandomWeights
    try:
        yield
    finally:
        llama.AutoModelForCausalLM = real


def write_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer that only counts words: Unsloth loads one with every model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, words))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096,
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        })
    )  # fmt: skip
