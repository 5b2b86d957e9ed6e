"""Held-out accuracy on questions with a few possible answers, with or without an adapter loaded by PEFT.

At the position where the template lets the model start its answer, the first tokens of all possible answers are
compared. The answer whose first token is likeliest counts as chosen.  Shapes: N = questions, T = tokens of the longest
one in a batch.

    python launch/demo/score.py MODEL HELD_OUT.jsonl --template NAME [--adapter DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.data.conversation import IGNORED, Conversation, Turn
from salient_ds.data.formats import read_rows
from salient_ds.data.record import TemplateRecord, check_record
from salient_ds.data.templates import Template, get_template
from salient_ds.data.tokenize import tokenize_conversation
from salient_ds.export.meta import RECORD_FILE


@dataclass(frozen=True)
class Questions:
    """Tokenised prompts with their right answers, ready for :func:`answer_questions`."""

    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt up to the start of the answer, template included."""
    answers: tuple[str, ...]
    """The possible answers."""
    answer_tokens: tuple[int, ...]
    """First token of each possible answer."""
    right: tuple[int, ...]
    """Index into ``answers``, per question."""


@dataclass(frozen=True)
class Score:
    """The answers of one model, and how many are right."""

    chosen: tuple[int, ...]
    """Index into ``Questions.answers``, per question."""
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.chosen)


def load_questions(path: Path, template: Template, tokenizer: Any) -> Questions:
    """Read held-out rows. The possible answers are those that occur in the rows.

    Raises:
        ValueError: two answers begin with the same token under this template, or there is only one answer.
    """
    rows = read_rows(path)
    answers = tuple(sorted({row.answers[-1] for row in rows}))
    if len(answers) < 2:
        raise ValueError(f"{path} holds one answer only ({answers[0]!r}): there is nothing to tell apart")
    prompts, tokens = [], set()
    for row in rows:
        split = [_split(_with_answer(row, answer), template, tokenizer) for answer in answers]
        assert len({prompt for prompt, _ in split}) == 1, "the prompt depends on the answer"
        prompts.append(split[0][0])
        tokens.add(tuple(token for _, token in split))
    (first,) = tokens if len(tokens) == 1 else ((),)
    if len(set(first)) < len(answers):
        raise ValueError(
            f"the answers {', '.join(map(repr, answers))} do not begin with different tokens under template "
            f"{template.name!r}: choose other words"
        )
    right = tuple(answers.index(row.answers[-1]) for row in rows)
    texts = tuple(row.input or row.turns[-2].text for row in rows)
    return Questions(texts, tuple(prompts), answers, first, right)


def _with_answer(row: Conversation, answer: str) -> Conversation:
    return replace(row, turns=(*row.turns[:-1], Turn(row.turns[-1].role, answer)))


def _split(row: Conversation, template: Template, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Return (prompt tokens, first answer token). The cut is where training has its first label."""
    example = tokenize_conversation(row, template, tokenizer)
    start = int((example["labels"] != IGNORED).argmax())
    ids = [int(token) for token in example["input_ids"]]
    return tuple(ids[:start]), ids[start]


@torch.no_grad()
def answer_questions(model: Any, questions: Questions, batch_size: int = 16) -> Score:
    """Let ``model`` choose among the possible answers. Runs on the CPU, in left-padded batches of similar length."""
    model.eval()
    order = sorted(range(len(questions.prompts)), key=lambda i: len(questions.prompts[i]))
    chosen = [0] * len(order)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids_NT, mask_NT = _pad_left([questions.prompts[i] for i in indices])
        positions_NT = (mask_NT.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids_NT, attention_mask=mask_NT, position_ids=positions_NT, logits_to_keep=1, use_cache=False
        )
        best_N = out.logits[:, -1, list(questions.answer_tokens)].argmax(-1)
        for index, best in zip(indices, best_N.tolist(), strict=True):
            chosen[index] = best
    correct = sum(a == b for a, b in zip(chosen, questions.right, strict=True))
    return Score(tuple(chosen), correct)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), each (N, T) int64. The last column holds the last token of every prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids_NT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for row, prompt in enumerate(prompts):
        ids_NT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_NT[row, longest - len(prompt) :] = 1
    return ids_NT, mask_NT


def load_model(path: Path, adapter: Path | None = None) -> Any:
    """Load the base model in fp32, and the adapter with PEFT if one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter)


def measure(model: Path, held_out: Path, template_name: str, adapter: Path | None = None) -> tuple[Questions, Score]:
    """Measure the accuracy of a model directory on held-out rows.

    Raises:
        ValueError: the adapter was trained with another template than ``template_name``.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = get_template(template_name)
    if adapter is not None:
        record = json.loads((adapter / RECORD_FILE).read_text(encoding="utf-8"))
        check_record(TemplateRecord.from_dict(record["template"]), template, tokenizer)
    questions = load_questions(held_out, template, tokenizer)
    return questions, answer_questions(load_model(model, adapter), questions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy of a model, with or without an adapter.")
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("held_out", type=Path, help="Alpaca rows (JSONL)")
    parser.add_argument("--template", required=True, help="prompt template, as in the run file")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter directory")
    args = parser.parse_args()
    _, score = measure(args.model, args.held_out, args.template, args.adapter)
    print(f"{score.correct} of {len(score.chosen)} right: {score.accuracy:.1%}")


if __name__ == "__main__":
    main()
