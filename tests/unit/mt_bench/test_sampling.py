"""The sampler against the distribution it draws from, and prompts against the text of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from salient_eval.mt_bench.answering import (
    TEMPERATURES,
    Prompter,
    end_text,
    fixed_batches,
    parse_temperatures,
    turn_seed,
)
from salient_eval.mt_bench.questions import CATEGORIES, Question, load_question_set
from salient_eval.mt_bench.sampling import RowStops, SeededSampler, cut_answer

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.templates import get_template
from salient_ds.data.tokenize import tokenize_conversation

CPU = torch.device("cpu")


def chosen(scores: torch.Tensor) -> list[int]:
    assert ((scores == 0).sum(1) == 1).all() and (scores.isinf().sum(1) == scores.shape[1] - 1).all()
    return scores.argmax(1).tolist()


def test_draws_follow_the_softmax_at_the_rows_temperature() -> None:
    logits_V, rows, steps, degree = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0]), 500, 40, 0.7
    sampler = SeededSampler(
        [turn_seed(0, row, 1) for row in range(rows)], [degree] * rows, 0, max_new=steps, end=0, device=CPU
    )
    counts, draws = torch.zeros(5), rows * steps
    for step in range(steps):
        counts += torch.bincount(
            torch.tensor(chosen(sampler(torch.zeros(rows, step), logits_V.expand(rows, 5)))), minlength=5
        )
    expected_V = (logits_V / degree).softmax(0)
    spread_V = (expected_V * (1 - expected_V) / draws).sqrt()
    assert counts[3] == 0, "a token without probability is never drawn"
    assert ((counts / draws - expected_V).abs() <= 4 * spread_V).all(), counts / draws - expected_V


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds, degrees = [turn_seed(0, number, 1) for number in range(6)], [0.7, 0.0, 1.0, 0.1, 0.7, 2.0]

    def draw(rows: list[int]) -> list[list[int]]:
        sampler = SeededSampler([seeds[r] for r in rows], [degrees[r] for r in rows], 0, max_new=9, end=0, device=CPU)
        steps = [chosen(sampler(torch.zeros(len(rows), step), logits_BV[rows])) for step in range(9)]
        return [list(row) for row in zip(*steps, strict=True)]

    together = draw([0, 1, 2, 3, 4, 5])
    assert draw([4, 1]) == [together[4], together[1]] and draw([2]) == [together[2]]
    assert together[1] == [int(logits_BV[1].argmax())] * 9, "temperature 0 is greedy"
    assert len({tuple(row) for row in together}) == 6 and len(set(together[5])) > 3


def test_the_largest_uniform_number_draws_the_last_token_and_the_smallest_the_first() -> None:
    sampler = SeededSampler([1, 1], [1.0, 1.0], 0, max_new=1, end=0, device=CPU)
    sampler.uniform_BT = torch.tensor([[1.0 - 2.0**-53], [0.0]], dtype=torch.float64)
    assert chosen(sampler(torch.zeros(2, 0), torch.zeros(2, 32003))) == [32002, 0]
    with_gaps_V = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert chosen(sampler(torch.zeros(2, 0), with_gaps_V.expand(2, 4))) == [2, 1]


@pytest.mark.parametrize("degree", [0.0, 0.7])
def test_a_row_with_broken_logits_ends_and_says_when(degree: float) -> None:
    sampler = SeededSampler([1, 2], [degree] * 2, 3, max_new=5, end=4, device=CPU)
    scores_BV = torch.zeros(2, 6)
    sampler(torch.zeros(2, 3), scores_BV)
    scores_BV[1, 2] = torch.nan
    assert chosen(sampler(torch.zeros(2, 4), scores_BV))[1] == 4
    sampler(torch.zeros(2, 5), scores_BV)
    assert sampler.broken_at_B.tolist() == [-1, 1]


def test_seeds_differ_by_seed_question_turn_and_choice() -> None:
    seeds = {turn_seed(s, q, t, c) for s in range(3) for q in range(81, 161) for t in (1, 2) for c in (0, 1)}
    assert len(seeds) == 3 * 80 * 2 * 2 and all(0 <= seed < 2**63 for seed in seeds)


class Letters:
    """Token n is the n-th letter; 26 is the end token."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(97 + number) for number in ids if number < 26)

    def batch_decode(self, rows: torch.Tensor, **options: Any) -> list[str]:
        return [self.decode(row) for row in rows.tolist()]


def test_an_answer_is_cut_at_its_first_end_whatever_follows() -> None:
    cases: list[tuple[list[int], list[str], int, tuple[str, int, bool]]] = [
        ([0, 1, 26, 3, 26], [], 5, ("ab", 3, True)),
        ([26, 1], [], 2, ("", 1, True)),
        ([0, 1, 2, 3], [], 4, ("abcd", 4, False)),
        ([0, 1, 2, 26], [], 3, ("abc", 3, False)),
        ([0, 1, 2, 3], ["d", "bc"], 4, ("a", 4, True)),
        ([0, 1, 26, 2], ["c"], 4, ("ab", 3, True)),
    ]
    for tokens, stops, limit, expected in cases:
        assert cut_answer(tokens, Letters(), [26], stops, limit) == expected, tokens


def test_rows_stop_at_end_token_stop_text_and_their_own_limit() -> None:
    stops = RowStops(Letters(), [26], ["bc"], [9, 9, 2, 9], 1, CPU)
    ids_BL = torch.tensor([[1, 0, 26, 0], [1, 1, 2, 3], [1, 0, 0, 0], [2, 3, 4, 5]])
    seen = [stops(ids_BL[:, :length], torch.empty(0)).tolist() for length in (2, 3, 4)]
    assert seen == [[False] * 4, [True, True, True, False], [True, True, True, False]]


def test_temperatures_of_mt_bench_and_others() -> None:
    assert parse_temperatures("mt_bench") == TEMPERATURES and set(TEMPERATURES) == set(CATEGORIES)
    assert parse_temperatures("0.3") == dict.fromkeys(CATEGORIES, 0.3)
    assert parse_temperatures("math=0.5,stem=1") == TEMPERATURES | {"math": 0.5, "stem": 1.0}
    for wrong, part in (("maths=1", "none of"), ("warm", "a number"), ("-1", "from 0"), ("nan", "from 0")):
        with pytest.raises(ValueError, match=part):
            parse_temperatures(wrong)


def test_batches_hold_every_question_once_and_neighbours_in_length() -> None:
    questions = load_question_set("own").questions
    lengths = {q.question_id: len(q.turns[0]) for q in questions}
    batches = fixed_batches(questions, lengths, 5)
    assert [len(batch) for batch in batches] == [5, 5, 5, 1]
    flat = [q for batch in batches for q in batch]
    assert sorted(flat, key=lambda q: q.question_id) == list(questions)
    assert [lengths[q.question_id] for q in flat] == sorted(lengths.values())
    with pytest.raises(ValueError, match="at least 1"):
        fixed_batches(questions, lengths, 0)


@pytest.mark.parametrize(("name", "end"), [("alpaca", "</s>"), ("vicuna_v1.1", "</s>"), ("llama-2", "</s>")])
def test_a_prompt_is_the_beginning_of_the_training_text(tiny_llama: Path, name: str, end: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    template = get_template(name)
    assert end_text(template, tokenizer) == end
    prompter = Prompter(template, tokenizer, (end,))
    question = Question(question_id=1, category="math", turns=("Reverse the words.", "red blue"))
    first, second = prompter.tokens(question, ()), prompter.tokens(question, ("green",))
    turns = (Turn(USER, "Reverse the words."), Turn(ASSISTANT, "green"), Turn(USER, "red blue"), Turn(ASSISTANT, "sun"))
    trained = tokenize_conversation(Conversation(None, turns), template, tokenizer)["input_ids"].tolist()
    assert tuple(trained[: len(first)]) == first and tuple(trained[: len(second)]) == second
    assert first[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in first[1:]
