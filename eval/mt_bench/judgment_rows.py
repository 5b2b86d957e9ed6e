"""Rows of the judgment files: FastChat's keys in its order, then ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .client import Endpoint
from .matches import Answers, Match
from .parsers import strict_rating, strict_winner
from .questions import QuestionSet
from .store import Row
from .verdicts import Reply, Verdict

Game = tuple[tuple[str, ...], Verdict, Reply | None, float, str]


@dataclass(frozen=True)
class RowContext:
    """Data that all rows of one run share."""

    answers: Answers
    questions: QuestionSet
    endpoint: Endpoint
    parser: str
    user_prompt: Callable[[Match, tuple[str, ...]], str]
    """Returns the last message sent for one game; empty if the match is not judged."""


def single_row(context: RowContext, match: Match, games: list[Game]) -> Row:
    """Make the row of one graded answer. Without a score, ``score`` is -1, as in FastChat, and ``status`` says why."""
    ((order, verdict, reply, tstamp, key),) = games
    strict = None
    if reply is not None and reply.text is not None:
        rating = strict_rating(reply.text, context.answers[order[0]][match.question.question_id].turns)
        strict = rating if isinstance(rating, float) else None
    return {
        "question_id": match.question.question_id,
        "model": order[0],
        "judge": [context.endpoint.model, match.template.name],
        "user_prompt": _user_prompt(context, match, order),
        "judgment": _text(reply),
        "score": verdict.value if verdict.value is not None else -1,
        "turn": match.turn,
        "tstamp": tstamp,
        "status": verdict.status,
        "reason": verdict.reason,
        "score_strict": strict,
        "score_fastchat": verdict.fastchat,
        **_shared(context, match),
        "key": key,
        "meta": _meta(reply),
    }


def pair_row(context: RowContext, match: Match, games: list[Game]) -> Row:
    """Make the row of one comparison in both orders. A game without a verdict is "error", as in FastChat."""
    first, second = games
    statuses = [game[1].status for game in games]
    worst = max(statuses, key=("graded", "unparsed", "failed").index)
    return {
        "question_id": match.question.question_id,
        "model_1": match.models[0],
        "model_2": match.models[1],
        "g1_winner": winner_name(first[1].value, swapped=False),
        "g2_winner": winner_name(second[1].value, swapped=True),
        "judge": [context.endpoint.model, match.template.name],
        "g1_user_prompt": _user_prompt(context, match, first[0]),
        "g1_judgment": _text(first[2]),
        "g2_user_prompt": _user_prompt(context, match, second[0]),
        "g2_judgment": _text(second[2]),
        "turn": match.turn,
        "tstamp": max(first[3], second[3]),
        "status": worst,
        "reason": next((game[1].reason for game in games if game[1].status == worst), ""),
        "g1_strict": winner_name(_strict(context, match, first), swapped=False),
        "g2_strict": winner_name(_strict(context, match, second), swapped=True),
        "g1_fastchat": winner_name(first[1].fastchat, swapped=False),
        "g2_fastchat": winner_name(second[1].fastchat, swapped=True),
        **_shared(context, match),
        "keys": [first[4], second[4]],
        "meta": [_meta(first[2]), _meta(second[2])],
    }


def winner_name(value: Any, swapped: bool) -> str:
    """Translate A, B or tie (in the order shown) to FastChat's model_1, model_2 or tie. None becomes "error"."""
    if value is None:
        return "error"
    if value == "tie":
        return "tie"
    return "model_1" if (value == "A") != swapped else "model_2"


def _strict(context: RowContext, match: Match, game: Game) -> Any:
    order, reply = game[0], game[2]
    if reply is None or reply.text is None:
        return None
    texts = [text for model in order for text in context.answers[model][match.question.question_id].turns]
    return strict_winner(reply.text, texts)[0]


def _user_prompt(context: RowContext, match: Match, order: tuple[str, ...]) -> str:
    return context.user_prompt(match, order)


def _text(reply: Reply | None) -> str:
    return (reply.text or "") if reply else ""


def _meta(reply: Reply | None) -> Row:
    return {name: value for name, value in reply.to_dict().items() if name != "text"} if reply else {}


def _shared(context: RowContext, match: Match) -> Row:
    """Return the origin of the numbers. Every row repeats it, so that parts of a file still say it."""
    questions = context.questions
    return {
        "category": match.question.category,
        "repeat": match.repeat,
        "parser": context.parser,
        "bench": questions.bench,
        "references": questions.reference_name,
        "sha256": {name: value[:16] for name, value in questions.sha256.items()},
        "endpoint": {"base_url": context.endpoint.base_url, **context.endpoint.parameters()},
    }
