"""Baseline: LoRA of the Unsloth library in a bare PyTorch loop, with its own kernels and its own checkpointing.

Unsloth is not among this project's requirements. Install it where the baseline is to run (``pip install unsloth``).
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import run_config
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


@dataclass
class UnslothArm:
    """An Unsloth model and fused AdamW: fp32 adapters and bf16 autocast, as Unsloth's trainer runs them."""

    engine: PlainEngine
    watch: Stopwatch

    @classmethod
    def build(cls, spec: ArmSpec, device: torch.device) -> UnslothArm:
        from unsloth import FastLanguageModel

        run = run_config(spec, "unused", {"name": "lora"})
        length = max(MINIMUM_LENGTH, spec.settings.seq)
        with tempfile.TemporaryDirectory() as folder:
            write_model_folder(Path(folder), spec.settings.config)
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

    def step(self, tokens_BS: Tensor) -> Tensor:
        """Run one optimizer step and return its loss (device tensor)."""
        with self.watch.part("forward"):
            loss: Tensor = self.engine(input_ids=tokens_BS, labels=tokens_BS).loss
        with self.watch.part("backward"):
            self.engine.backward(loss)
        with self.watch.part("step"):
            self.engine.step()
        return loss.detach()

    def loss(self, tokens_BS: Tensor) -> float:
        return float(self.step(tokens_BS))

    def facts(self) -> dict[str, Any]:
        return {"compacted": False}

    def run_schedule(self, tokens_BS: Tensor, log: Any = None) -> dict[str, Any]:
        """Return nothing: LoRA has no events."""
        return {}


class random_base:  # noqa: N801 - used as a context manager
    """While this is entered, Unsloth builds its base model with random weights instead of reading a checkpoint."""

    def __init__(self, folder: str, device: torch.device, seed: int) -> None:
        self.folder, self.device, self.seed = folder, device, seed

    def __enter__(self) -> None:
        import unsloth.models.llama as llama

        self.module, self.real = llama, llama.AutoModelForCausalLM
        outer, real = self, self.real

        class WithRandomWeights(real):  # type: ignore[misc,valid-type]
            @classmethod
            def from_pretrained(
                cls, name: str, *args: Any, config: Any = None, attn_implementation: str | None = None, **more: Any
            ) -> Any:
                from transformers import AutoConfig

                config = config or AutoConfig.from_pretrained(outer.folder)
                torch.manual_seed(outer.seed)
                with outer.device:
                    model = real.from_config(
                        config, attn_implementation=attn_implementation or "sdpa", dtype=torch.bfloat16
                    )
                model.config._name_or_path = outer.folder
                return model

        llama.AutoModelForCausalLM = WithRandomWeights

    def __exit__(self, *error: object) -> None:
        self.module.AutoModelForCausalLM = self.real


def write_model_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and a tokenizer that only counts words: Unsloth loads one with every model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "pad_token_id": 0}))
    names = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, int(config["vocab_size"])))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096,
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        })
    )  # fmt: skip
