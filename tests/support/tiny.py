"""A LLaMA checkpoint and an instruction set small enough for every test, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    "red", "blue", "green", "stone", "river", "cloud", "bread", "sugar", "light", "winter", "summer", "horse",
    "table", "music", "garden", "paper",
]  # fmt: skip


def write_alpaca(path: Path, rows: int, seed: int = 0) -> Path:
    """Instructions with a learnable answer: the words of the input in reverse order."""
    draw = random.Random(seed)
    data = []
    for _ in range(rows):
        words = draw.sample(WORDS, draw.randint(2, 4))
        answer = " ".join(reversed(words))
        data.append({"instruction": "Reverse the words.", "input": " ".join(words), "output": answer})
    path.write_text(json.dumps(data))
    return path


def train_sentencepiece(folder: Path, vocab: int = 160) -> None:
    """A sentencepiece model plus the tokenizer_config.json without which transformers 5 guesses wrong."""
    import sentencepiece

    text = folder / "corpus.txt"
    rows = json.loads(write_alpaca(folder / "corpus.json", 200).read_text())
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. ### Instruction: ### Input: ### Response:"
    )
    text.write_text("\n".join([prompt] * 3 + [f"{r['instruction']} {r['input']} {r['output']}" for r in rows]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocab, model_type="bpe",
        byte_fallback=False, character_coverage=1.0, minloglevel=2, hard_vocab_limit=False,
        user_defined_symbols=["\n"], normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for extra in ("corpus.txt", "corpus.json", "tokenizer.vocab"):
        (folder / extra).unlink()


def make_llama(folder: Path, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A random LLaMA with its sentencepiece tokenizer in Hugging Face format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=192, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
