"""Our own inputs for FastChat's functions: replies of a judge, answers, verdicts and votes, all made up.

The questions, references and judge prompts are those of ``eval/mt_bench/own_questions``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

MODELS = ("model-a", "model-b", "model-c")
JUDGE = "gpt-4"
"""FastChat asks only judges whose name is in its lists."""
QUESTIONS = range(9001, 9017)
TURNS = (1, 2)
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

RATING_REPLIES = (
    # a plain verdict: whole, half, without a label, in bold, with another alphabet before it
    "Both facts are right and the tone fits. Rating: [[6]]",
    "Mostly right, one slip in the sum. Rating: [[6.5]]",
    "[[4]]",
    "Verdict **Rating: [[9]]** as asked.",
    "\u8a55\u4fa1\uff1a[[3]]",
    # out of the scale
    "There is nothing here that I could grade. Rating: [[0]]",
    "More than perfect! Rating: [[12]]",
    "In percent: [[85]]",
    "It harms the reader. Rating: [[-2]]",
    # one bracket only, or brackets that do not match
    "Short but true. Rating: [4]",
    "Short but true. Rating: [4.5]",
    "Closed too early. Rating: [[2]",
    "Opened too late. Rating: [2]]",
    "Typeset: \\[[7]\\]",
    # no bracket
    "Good work, I would say Rating: 8",
    "",
    "$ERROR$",
    # a scale inside and outside of the brackets
    "Rating: [[7/10]]",
    "Rating: [[7]]/10 because of the last step",
    # what is no number for the pattern
    "Rating: [[ 6 ]]",
    "Rating: [[6 ]]",
    "[[\n5\n]]",
    "Rating: [[your number]]",
    "Rating: [[nine]]",
    "Rating: [[.75]]",
    "Rating: [[7,5]]",
    "Rating: [[3.4.5]]",
    "Rating: [[6-7]]",
    "Rating: [[2e1]]",
    # numbers that Python reads in its own way, or not at all
    "Rating: [[9.]]",
    "Rating: [[03]]",
    "Rating: [[\uff15]]",
    # several verdicts
    'You asked for "Rating: [[n]]", say "Rating: [[1]]". Here is mine. Rating: [[8]]',
    "Turn one earns [[2]], all in all [[7]]",
    "It lies between [[5]] and [[6]]",
    "Rating: [[3]]\n\nOn a second reading: Rating: [[8]]",
    # a single bracket before the verdict, and instead of it
    "It leaves out source [2]. Rating: [[5]]",
    "It leaves out source [2]. Rating: **5**",
    "items[1] is never set. Rating: [[4]]",
    "items[1] is never set, so Rating: 4",
)

PAIR_REPLIES = {
    "A": "The first one answers what was asked. Verdict: [[A]]",
    "B": "The second one keeps to the length. Verdict: [[B]]",
    "tie": "Neither is better. Verdict: [[C]]",
    "error": "I cannot choose between them.",
    "late A": "At first [[B]], but the sum is wrong there. Verdict: [[A]]",
    "one bracket": "The first one. Verdict: [A]",
}
GAMES = ("model_1", "model_2", "tie", "error")


def answer_turns(model: str, number: int) -> list[str]:
    """An answer with all that a template could trip over."""
    first = f"{model} on task {number}: {{question}} is {{0}}, 100 %s sure \\1 \u2014 \u00e9\u4e2d\u2028[[9]] [[A]]"
    return [first, f"{model} goes on with {number}.\n\n```python\nprint({{'n': {number}}})\n```"]


def answer_row(model: str, number: int, run: str = "") -> dict[str, Any]:
    choices = [{"index": 0, "turns": answer_turns(model, number)}]
    return {"question_id": number, "answer_id": f"{model}-{number}{run}", "model_id": model, "choices": choices,
            "tstamp": 1.75e9}  # fmt: skip


def answers_unsorted() -> list[dict[str, Any]]:
    """Answers as threads finish them, two questions answered again."""
    rows = [answer_row("model-a", number) for number in (9012, 9003, 9016, 9001, 9007)]
    return [*rows, answer_row("model-a", 9003, "-again"), answer_row("model-a", 9012, "-again")]


def single_replies() -> dict[tuple[str, int, int], str]:
    """A judge's reply by model, question and turn. Of model-c three replies hold no verdict."""
    chance, unreadable = random.Random(36), {(9004, 1), (9011, 1), (9013, 2)}
    level = {"model-a": 4.0, "model-b": 5.5, "model-c": 6.5}
    replies = {}
    for number in QUESTIONS:
        ease = chance.gauss(0.0, 1.5)
        for model in MODELS:
            for turn in TURNS:
                score = min(10.0, max(1.0, round(2 * (level[model] + ease - 0.6 * turn + chance.gauss(0.0, 1.0))) / 2))
                said = "no number, I was not convinced" if model == "model-c" and (number, turn) in unreadable else None
                replies[model, number, turn] = f"Made up for {model}. Rating: {said or f'[[{score:g}]]'}"
    return replies


LACKING = {("model-b", number, 2) for number in QUESTIONS if number not in (9004, 9005, 9011, 9016)}
"""Second turns that the file "partial" lacks: an unfinished run of the judge. Those that it has are good ones."""


def pair_games() -> Iterator[tuple[int, str, str, int, str, str]]:
    """Question, the two models as stored, turn, and who wins either game as stored (see GAMES)."""
    chance = random.Random(2023)
    weights = {("model-a", "model-b"): (3, 5, 4), ("model-a", "model-c"): (2, 6, 4), ("model-b", "model-c"): (4, 5, 4)}
    for number in QUESTIONS:
        for (one, two), odds in weights.items():
            for turn in TURNS:
                games = chance.choices(GAMES, (*odds, 1), k=2)
                if chance.random() < 0.5:
                    games[1] = games[0]  # a judge that is sure
                if chance.random() < 0.3:
                    flip = {"model_1": "model_2", "model_2": "model_1"}
                    yield number, two, one, turn, *(flip.get(g, g) for g in games)
                else:
                    yield number, one, two, turn, *games


def votes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Votes of a judge and of two or three people, pairs in either order; people lean to what the judge says."""
    chance, judge, people = random.Random(42), [], []
    outcomes = ("model_a", "model_b", "tie", "tie (inconsistent)")
    for number in QUESTIONS:
        for pair in (("model-a", "model-b"), ("model-a", "model-c"), ("model-b", "model-c")):
            for turn in TURNS:
                said = chance.choices(outcomes, (4, 4, 2, 1))[0]
                if chance.random() < 0.9:  # a tenth of the comparisons nobody asked the judge about
                    judge.append(_vote(chance, number, pair, turn, said, [JUDGE, f"pair-turn{turn}"]))
                for person in range(chance.choice((1, 2, 3))):
                    heard = said if chance.random() < 0.55 else chance.choice(outcomes)
                    people.append(_vote(chance, number, pair, turn, heard, f"expert_{person}"))
    return judge, people


def _vote(
    chance: random.Random, number: int, pair: tuple[str, str], turn: int, winner: str, judge: str | list[str]
) -> dict[str, Any]:
    """One vote, in half of the cases with the models the other way round."""
    one, two = pair
    if chance.random() < 0.5:
        one, two, winner = two, one, {"model_a": "model_b", "model_b": "model_a"}.get(winner, winner)
    return {"question_id": number, "model_a": one, "model_b": two, "winner": winner, "judge": judge, "turn": turn}
