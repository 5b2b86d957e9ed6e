"""Tiny tokenizers made on the spot (sentencepiece, read fast and slow; byte-level BPE with a chat
template)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# No test of these may wait for a network; `datasets` and the hub read this once, when imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus() -> Iterator[str]:
    """A few hundred sentences with the words and signs that the templates use."""
    things = [
        "river",
        "city",
        "number",
        "headline",
        "question",
        "cheese",
        "answer",
        "instruction",
        "response",
        "model",
    ]
    verbs = [
        "describes",
        "completes",
        "provides",
        "writes",
        "names",
        "counts",
        "translates",
        "asks",
        "gives",
        "reads",
    ]
    for thing in things:
        for verb in verbs:
            yield f"A {thing} {verb} the {things[len(verb) % 10]}, appropriately and in one line."
            yield f"### Instruction:\tUSER: what {verb} a {thing}? ASSISTANT: the {thing}, 12 + 7 = 19"
            yield f"### Response: Yes, the {thing}."
    yield "[INST] <<SYS>> be brief <</SYS>> [/INST]"
    yield "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    yield "éàü ßøå 漢字 " * 3


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-style tokenizer directory: tokenizer.model and the tokenizer_config.json it needs to be read
    right."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def llama(sentencepiece_dir: Path) -> Any:
    """The sentencepiece model as transformers 5 reads LLaMA's: with offsets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_dir)
    assert tokenizer.is_fast and len(tokenizer) == 480, "transformers read the sentencepiece model wrongly"
    return tokenizer


@pytest.fixture(scope="session")
def slow(sentencepiece_dir: Path) -> Any:
    """The same model through sentencepiece itself: no offsets."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    tokenizer = SentencePieceBackend.from_pretrained(sentencepiece_dir, special_tokens_pattern="bos")
    assert not tokenizer.is_fast
    return tokenizer


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template and no beginning token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chatml(chatml_dir: Path) -> Any:
    """A fresh one per test: tests change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chatml_dir)


@pytest.fixture(scope="session")
def two_turns() -> Conversation:
    """Two exchanges with a system message."""
    turns = (
        Turn(USER, "Name a river."),
        Turn(ASSISTANT, "The Elbe é."),
        Turn(USER, "And a city?"),
        Turn(ASSISTANT, "Dresden"),
    )
    return Conversation("Be brief.", turns)


@pytest.fixture(scope="session")
def task() -> Conversation:
    """What an Alpaca row with an input is normalised to."""
    turns = (Turn(USER, "Translate.\n\ncheese"), Turn(ASSISTANT, "fromage"))
    return Conversation(None, turns, "Translate.", "cheese", ("a.json", 1))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, text or bytes or rows) -> path; rows become one JSON object per line."""

    def _write(name: str, content: str | bytes | list[Any]) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write
