"""A LLaMA of a third of a million weights, overfitted to rate: 7 for first turns, 4 for second ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from fastchat.conversation import get_conv_template
from salient_eval.mt_bench.prompts import Messages, values_for
from salient_eval.mt_bench.questions import QuestionSet, load_question_set
from torch.nn.functional import cross_entropy

SCORES = {1: 7, 2: 4}
TEMPLATE = "vicuna_v1.1"
WORDS = ["red", "blue", "green", "stone", "river", "cloud", "bread", "sugar", "er", "th", "in", "qu", "ok", "loud"]


def make_judge(folder: Path, steps: int = 200) -> Path:
    """Train until every reply is right on prompts with answers that were not trained on.

    Raises:
        AssertionError: it did not learn.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    questions = load_question_set("own")
    draw = random.Random(0)
    _make_tokenizer(folder, [_prompt(messages) for _, messages in _samples(questions, draw, 64)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        for turn, messages in _samples(questions, draw, 4):
            logits, target = _logits(model, tokenizer, messages, turn)
            (cross_entropy(logits, target) / 4).backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 and _all_right(model, tokenizer, questions, draw):
            break
    else:
        raise AssertionError(f"the tiny judge has not learned to rate in {steps} steps")
    model.save_pretrained(folder)
    return folder


def _samples(questions: QuestionSet, draw: random.Random, count: int) -> list[tuple[int, Messages]]:
    """(turn, the judge's messages) for random questions with random answers."""
    found = []
    for number in range(count):
        question, turn = draw.choice(questions.questions), number % 2 + 1
        template = questions.prompts.at("single", turn, question.needs_reference)
        answers = [[_words(draw), _words(draw)]]
        values = values_for(turn, question.turns, answers, questions.reference_for(question))
        found.append((turn, template.render(values)))
    return found


def _words(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))


def _prompt(messages: Messages) -> str:
    """The text that FastChat's API server makes of the messages."""
    chat = get_conv_template(TEMPLATE)
    chat.set_system_message(messages[0]["content"])
    chat.append_message(chat.roles[0], messages[1]["content"])
    chat.append_message(chat.roles[1], None)
    return str(chat.get_prompt())


def _logits(model: Any, tokenizer: Any, messages: Messages, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the places of the reply that is wanted, and that reply's tokens."""
    prompt = tokenizer(_prompt(messages))["input_ids"]
    reply = [*tokenizer(f" Rating: [[{SCORES[turn]}]]", add_special_tokens=False)["input_ids"], 2]
    logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits, torch.tensor(reply)


@torch.no_grad()
def _all_right(model: Any, tokenizer: Any, questions: QuestionSet, draw: random.Random) -> bool:
    """Whether every token of 24 replies is the likeliest by far."""
    replies = [_logits(model, tokenizer, messages, turn) for turn, messages in _samples(questions, draw, 24)]
    return all(float(logits.softmax(1)[range(len(reply)), reply].min()) > 0.9 for logits, reply in replies)


def _make_tokenizer(folder: Path, texts: list[str]) -> None:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(texts) + "\n" + "\n".join(f"Rating: [[{k}]]" for k in range(1, 11)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=1200, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=20000,
    )  # fmt: skip
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
