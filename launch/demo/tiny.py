"""Create a LLaMA with 0.46 million random parameters, a sentencepiece tokenizer and a task to learn.

The task: is there an animal in a list of four words?  An adapter alone is enough to learn it on a random frozen model.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

INSTRUCTION = "Is there an animal in the list?"
ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "fox", "bear", "wolf", "mouse", "duck", "goose", "frog"]
OTHERS = ["stone", "river", "bread", "table", "chair", "window", "paper", "garden", "winter", "summer", "music",
          "sugar", "light", "cloud", "green", "blue", "yellow", "bridge", "castle", "pencil"]  # fmt: skip
WORDS_PER_LIST = 4
VOCABULARY = 512
"""Number of tokenizer pieces (256 of them are single bytes, as in LLaMA's) and of embedding rows."""


def rows(number: int, seed: int) -> list[dict[str, str]]:
    """Make ``number`` different Alpaca rows, alternating yes and no. The same arguments give the same rows."""
    draw = random.Random(seed)
    found: dict[tuple[str, ...], str] = {}
    while len(found) < number:
        answer = ("yes", "no")[len(found) % 2]
        words = draw.sample(OTHERS, WORDS_PER_LIST)
        if answer == "yes":
            words[draw.randrange(WORDS_PER_LIST)] = draw.choice(ANIMALS)
        found.setdefault(tuple(words), answer)
    return [{"instruction": INSTRUCTION, "input": " ".join(words), "output": found[words]} for words in found]


def make_model(target: Path, prompt: str, seed: int = 0) -> Path:
    """Write a 2-layer LLaMA with random weights and its tokenizer to ``target``. An existing model is kept.

    Args:
        prompt: text of a whole example; the tokenizer is trained on it so that it knows the template's words.
    """
    if (target / "model.safetensors").is_file():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _make_tokenizer(partial, prompt)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def _make_tokenizer(folder: Path, prompt: str) -> None:
    """Train a sentencepiece model and write tokenizer_config.json; without it transformers adds no BOS token."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    words = [*ANIMALS, *OTHERS, "yes", "no"]
    corpus.write_text("\n".join([*prompt.splitlines() * 20, *(f"{a} {b}" for a in words for b in words)]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 256,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
