"""Parse a verdict from a judge's reply, with a strict parser and with FastChat's parser for comparison.

Source: the output formats ``[[rating]]`` and ``[[A]]`` of Zheng et al. 2023 (MT-Bench), appendix A.
Differs from the reference: FastChat takes the first ``[[n]]`` (else the first ``[n]``), checks no range, and prefers A
over B over C regardless of their positions. So a quoted instruction, an index ``arr[0]`` or a rating planted in the
judged answer can become the score. The strict parser takes the last verdict that the judge gives itself, or none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable

from .marks import Mark, find_marks, rating_in, winner_in
from .reply import Outcome, outcome_of
from .verdicts import Failed, Graded, Reply, Unparsed, Value, Verdict, Winner

LOWEST, HIGHEST = 1.0, 10.0

# Possessive repetitions: the same matches as FastChat's, in linear time.
_FIRST_DOUBLE = re.compile(r"\[\[(\d++\.?+\d*+)\]\]")
_FIRST_SINGLE = re.compile(r"\[(\d++\.?+\d*+)\]")
_WINNER_NAMES: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


def fastchat_rating(text: str) -> float | int:
    """Read a rating as FastChat does. Returns -1 if there is none.

    Raises:
        SyntaxError: for ``[[08]]`` and for non-ASCII digits, as in FastChat.
    """
    match = _FIRST_DOUBLE.search(text) or _FIRST_SINGLE.search(text)
    return ast.literal_eval(match.groups()[0]) if match else -1


def fastchat_winner(text: str) -> Winner | None:
    """Read a comparison as FastChat does: A anywhere takes precedence over B, B over C. None is FastChat's "error"."""
    for letter, winner in _WINNER_NAMES.items():
        if f"[[{letter}]]" in text:
            return winner
    return None


def strict_rating(text: str, answers: Iterable[str] = ()) -> float | str:
    """Return the judge's last own rating (a float in 1..10), or a string that says why there is none.

    ``answers`` are the judged texts. If the reply holds several different ratings, one that also occurs in a judged
    text is not accepted, because it may be an echo of a planted verdict.
    """
    chosen = _choose(text, answers, rating_in)
    if chosen.startswith("!"):
        return chosen[1:]
    value = float(chosen)
    if not LOWEST <= value <= HIGHEST:
        return f"out of range: {value:g} is not in {LOWEST:g}..{HIGHEST:g}"
    return value


def strict_winner(text: str, answers: Iterable[str] = ()) -> tuple[Winner | None, str]:
    """Return the judge's last own choice (A, B or tie) and "", or None and the reason why there is none."""
    chosen = _choose(text, answers, winner_in)
    if chosen.startswith("!"):
        return None, chosen[1:]
    return _WINNER_NAMES[chosen], ""


def _choose(text: str, answers: Iterable[str], read: Callable[[str, bool], str | None]) -> str:
    """Return the text of the chosen verdict, or "!" followed by the reason why there is none."""
    marks = find_marks(text, read)
    planted = {mark.value for answer in answers for mark in find_marks(answer, read)}
    own = [mark for mark in marks if not mark.quoted]
    if not own:
        if len({mark.value for mark in marks}) != 1:
            return "!several quoted verdicts and none of its own" if marks else "!no verdict found"
        own = marks
    chosen = _last(own)
    several = len({mark.value for mark in own}) > 1
    if chosen is not None and chosen.repeats and chosen.value in planted and several:
        # a fence or a quote block that repeats a number of the judged answer refers to that answer
        chosen = _last([mark for mark in own if not mark.repeats]) or chosen
    if chosen is None:
        return f"!ambiguous: {', '.join(f'[[{v}]]' for v in dict.fromkeys(m.value for m in own[-4:]))} without a label"
    if chosen.value in planted and several:
        return f"!ambiguous: [[{chosen.value}]] also stands in the judged answer"
    if not chosen.readable:
        return f"!ambiguous: [[{chosen.value}]] is not one verdict"
    return chosen.value


def _last(marks: list[Mark]) -> Mark | None:
    """Return the last labelled mark, else the last one that stands alone, else a clear last one, else None."""
    real = [mark for mark in marks if not mark.aside] or marks
    for tier in ([m for m in real if m.labelled], [m for m in real if m.alone]):
        if tier:
            return tier[-1]
    if not real:
        return None
    return real[-1] if real[-1].at_end or len({mark.value for mark in real}) == 1 else None


def read_rating(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Parse one rating with both parsers. ``primary`` ("strict" or "fastchat") says which result is the verdict."""
    try:
        number = fastchat_rating(reply.text or "")
        fastchat: Value | None = None if number == -1 else float(number)
    except (SyntaxError, ValueError, OverflowError):
        fastchat = None  # FastChat's whole run would fail here; ours only counts this reply as unread
    outcome = outcome_of(reply)
    return _unread(reply, outcome, fastchat, primary) or _graded(strict_rating(outcome.text, answers), fastchat)


def read_winner(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Parse one comparison with both parsers. The values are the judge's letters (A was shown first)."""
    fastchat = fastchat_winner(reply.text or "")
    outcome = outcome_of(reply)
    unread = _unread(reply, outcome, fastchat, primary)
    if unread is not None:
        return unread
    strict, reason = strict_winner(outcome.text, answers)
    return Graded(strict, fastchat) if strict is not None else Unparsed(reason, fastchat)


def _graded(strict: float | str, fastchat: Value | None) -> Verdict:
    return Unparsed(strict, fastchat) if isinstance(strict, str) else Graded(strict, fastchat)


def _unread(reply: Reply, outcome: Outcome, fastchat: Value | None, primary: str) -> Verdict | None:
    """Return the verdict where the strict parser has nothing to read or is not asked, else None.

    FastChat's parser reads the content as it came, with thoughts and whatever its end.
    """
    if not (reply.text or "").strip():
        return Failed(outcome.reason)
    if primary == "fastchat":
        return Graded(fastchat, fastchat) if fastchat is not None else Unparsed("no verdict found", None)
    return Unparsed(outcome.reason, fastchat) if outcome.reason else None
