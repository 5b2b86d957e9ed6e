"""Tiny checkpoints of encoders, encoder-decoders and decoders without a task's head, and batches for every task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_architectures import tiny_config

TARGETS: dict[str, list[str]] = {
    "bert": ["query", "value", "intermediate.dense"],
    "roberta": ["query", "value", "intermediate.dense"],
    "deberta-v2": ["query_proj", "value_proj", "intermediate.dense"],
    "bart": ["q_proj", "v_proj", "fc1"],
    "t5": ["q", "v", "wi"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "fc1"],
}
"""model_type -> layers to adapt; in encoder-decoders that includes cross attention."""
GLOBAL_BATCH = 4


def make_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """A checkpoint of a tiny ``kind`` without any head but that of a language model, if it is one."""
    import transformers

    torch.manual_seed(seed)
    config = tiny_config(kind)
    for name in (key for key in config.to_dict() if "dropout" in key and isinstance(getattr(config, key), float)):
        setattr(config, name, 0.0)  # so that any number of processes computes the same
    if kind == "deberta-v2":
        config.update({"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm",
                       "share_att_key": True, "position_buckets": 8})  # fmt: skip
    if kind == "t5":
        config.decoder_start_token_id = 0
    auto: Any = transformers.AutoModel
    if kind in ("bart", "t5"):
        auto = transformers.AutoModelForSeq2SeqLM
    elif kind in ("llama", "opt"):
        auto = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    return folder


def example(task: str, step: int, row: int) -> dict[str, torch.Tensor]:
    """One row of one global batch, with a batch axis; rows differ in length and in their number of targets."""
    draw = torch.Generator().manual_seed(1000 * step + row)
    length = 6 + 2 * row
    tokens = torch.randint(7, 90, (1, length), generator=draw)
    tokens[:, -1] = 2  # BART classifies the state at the end-of-sequence token
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "sequence-classification":
        inputs["labels"] = tokens[:, 1] % 3
    elif task == "regression":
        inputs["labels"] = tokens[:, 1].float() / 90
    elif task == "question-answering":
        inputs |= {"start_positions": torch.tensor([1 + row % 2]), "end_positions": torch.tensor([3 + row % 2])}
    elif task == "causal-lm":
        inputs["labels"] = tokens.clone()
    else:
        inputs["labels"] = tokens.flip(1)[:, : 3 + row]
    return inputs


def targets(task: str, inputs: dict[str, torch.Tensor]) -> int:
    """Number of targets that the mean loss of these rows is over."""
    if task == "causal-lm":
        return int(inputs["labels"][:, 1:].numel())
    return int(inputs["labels"].numel()) if task == "seq2seq-lm" else len(inputs["input_ids"])


WORDS = [
    "red", "blue", "green", "stone", "river", "cloud", "bread", "sugar", "light", "winter", "summer", "horse", "table",
    "music", "garden", "paper",
]  # fmt: skip


def add_tokenizer(folder: Path) -> Path:
    """A fast word tokenizer with the special tokens of RoBERTa, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **names, cls_token="<s>", sep_token="</s>")
    fast.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Rows that fit a task of every kind: sentence, label, number, question, answers and summary."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.sample(WORDS, draw.randint(4, 9))
        answer = words[number % len(words)]
        rows.append({
            "id": f"row-{number}", "sentence": " ".join(words), "label": "yes" if words[0] < "m" else "no",
            "number": len(words) / 4, "question": f"{answer} stone", "context": " ".join(words),
            "answers": {"text": [answer], "answer_start": [" ".join(words).index(answer)]},
            "summary": f"{words[0]} {words[-1]}",
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
