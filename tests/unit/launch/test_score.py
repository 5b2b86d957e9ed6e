"""Accuracy by the first answer token, batched, with adapters loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sarcasm
import score
import tiny
import torch
from transformers import AutoTokenizer

from salient_ds.data.formats import read_rows
from salient_ds.data.record import template_record
from salient_ds.data.templates import get_template
from salient_ds.data.tokenize import tokenize_conversation


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = tiny.rows(24, seed=5)
    rows[0]["input"] = "cat"  # prompts of different lengths
    return sarcasm.write_rows(rows, tmp_path_factory.mktemp("rows") / "held_out.jsonl")


@pytest.fixture(scope="module")
def questions(tiny_demo_model: Path, held_out: Path) -> score.Questions:
    return score.load_questions(held_out, get_template("llama-2"), AutoTokenizer.from_pretrained(tiny_demo_model))


def one_by_one(model: torch.nn.Module, questions: score.Questions) -> list[int]:
    """The same choice without batches, padding or position ids."""
    chosen = []
    for prompt in questions.prompts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        chosen.append(int(logits[list(questions.answer_tokens)].argmax()))
    return chosen


def write_peft_adapter(model_path: Path, target: Path, template: str = "llama-2") -> Path:
    """A LoRA adapter strong enough to change answers, with the record that an export carries."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(score.load_model(model_path), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(target)
    record = template_record(get_template(template), AutoTokenizer.from_pretrained(model_path))
    (target / "salient_ds.json").write_text(json.dumps({"template": record.to_dict()}))
    return target


def test_prompts_end_where_training_begins_to_predict(
    tiny_demo_model: Path, held_out: Path, questions: score.Questions
) -> None:
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_demo_model), get_template("llama-2")
    for row, prompt, right in zip(read_rows(held_out), questions.prompts, questions.right, strict=True):
        example = tokenize_conversation(row, template, tokenizer)
        first = int((example["labels"] != -100).argmax())
        assert list(prompt) == example["input_ids"][:first].tolist()
        assert questions.answer_tokens[right] == example["labels"][first]
    assert questions.answers == ("no", "yes")
    assert len({len(prompt) for prompt in questions.prompts}) > 1


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_and_padding_do_not_change_the_choice(
    tiny_demo_model: Path, questions: score.Questions, batch_size: int
) -> None:
    model = score.load_model(tiny_demo_model)
    result = score.answer_questions(model, questions, batch_size)
    assert list(result.chosen) == one_by_one(model, questions)
    assert result.accuracy == sum(a == b for a, b in zip(result.chosen, questions.right, strict=True)) / 24


def test_the_adapter_is_the_one_that_peft_loads(tiny_demo_model: Path, held_out: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = write_peft_adapter(tiny_demo_model, tmp_path / "adapter")
    questions, plain = score.measure(tiny_demo_model, held_out, "llama-2")
    _, adapted = score.measure(tiny_demo_model, held_out, "llama-2", adapter)
    expected = one_by_one(PeftModel.from_pretrained(score.load_model(tiny_demo_model), adapter).eval(), questions)
    assert list(adapted.chosen) == expected
    assert adapted.chosen != plain.chosen, "the adapter changes nothing: the comparison could not fail"


def test_another_template_than_in_training_is_refused(tiny_demo_model: Path, held_out: Path, tmp_path: Path) -> None:
    adapter = write_peft_adapter(tiny_demo_model, tmp_path / "adapter", template="alpaca")
    with pytest.raises(ValueError, match='trained with template "alpaca", asked for "llama-2"'):
        score.measure(tiny_demo_model, held_out, "llama-2", adapter)


def test_a_perfect_and_a_hopeless_model(questions: score.Questions) -> None:
    class Oracle(torch.nn.Module):
        """Favours the token of the right answer of the row, or of the wrong one."""

        def __init__(self, right: bool) -> None:
            super().__init__()
            self.right = right

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> object:
            logits = torch.zeros(len(input_ids), 1, 512)
            for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                index = questions.prompts.index(tuple(ids[mask.bool()].tolist()))
                answer = questions.right[index] if self.right else 1 - questions.right[index]
                logits[row, 0, questions.answer_tokens[answer]] = 1.0
            return type("Output", (), {"logits": logits})

    assert score.answer_questions(Oracle(True), questions).accuracy == 1.0
    assert score.answer_questions(Oracle(False), questions).accuracy == 0.0


def test_answers_that_cannot_be_told_apart_are_refused(tiny_demo_model: Path, tmp_path: Path) -> None:
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_demo_model), get_template("llama-2")
    rows = tiny.rows(4, seed=1)
    same = sarcasm.write_rows([row | {"output": "yes"} for row in rows], tmp_path / "same.jsonl")
    with pytest.raises(ValueError, match="one answer only"):
        score.load_questions(same, template, tokenizer)
    alike = [row | {"output": ("yes yes", "yes no")[i % 2]} for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match="do not begin with different tokens"):
        score.load_questions(sarcasm.write_rows(alike, tmp_path / "alike.jsonl"), template, tokenizer)
