"""Parse a verdict from a judge's reply, with a strict parser and with FastChat's parser for comparison.

Source: the output formats ``[[rating]]`` and ``[[A]]`` of Zheng et al. 2023 (MT-Bench), appendix A.
Differs from the reference: FastChat takes the first ``[[n]]`` (else the first ``[n]``), checks no range, and prefers A
over B over C regardless of their positions. So a quoted instruction, an index ``arr[0]`` or a rating planted in the
judged answer can become the score. The strict parser takes the last verdict that the judge gives itself, or none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .verdicts import Failed, Graded, Reply, Unparsed, Value, Verdict, Winner

LOWEST, HIGHEST = 1.0, 10.0

_FIRST_DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_FIRST_SINGLE = re.compile(r"\[(\d+\.?\d*)\]")
# A number in double brackets, with ASCII digits only. "/10" is a common and unambiguous way to write the same scale.
_RATING = re.compile(r"\[\[\s*(-?[0-9]+(?:\.[0-9]*)?)\s*(/\s*10)?\s*\]\]")
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LABEL = re.compile(r"(?:rating|score|verdict|decision)\b[^\n\[\]]{0,40}$", re.IGNORECASE)
_FENCE = re.compile(r"^\s*(```|~~~)")
_QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb\u201e"
_WINNER_NAMES: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


@dataclass(frozen=True)
class _Candidate:
    value: str
    quoted: bool
    labelled: bool


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
    chosen = _choose(_candidates(text, _RATING), {m.group(1) for a in answers for m in _RATING.finditer(a)})
    if chosen.startswith("!"):
        return chosen[1:]
    value = float(chosen)
    if not LOWEST <= value <= HIGHEST:
        return f"out of range: {value:g} is not in {LOWEST:g}..{HIGHEST:g}"
    return value


def strict_winner(text: str, answers: Iterable[str] = ()) -> tuple[Winner | None, str]:
    """Return the judge's last own choice (A, B or tie) and "", or None and the reason why there is none."""
    chosen = _choose(_candidates(text, _WINNER), {m.group(1) for a in answers for m in _WINNER.finditer(a)})
    if chosen.startswith("!"):
        return None, chosen[1:]
    return _WINNER_NAMES[chosen], ""


def _candidates(text: str, pattern: re.Pattern[str]) -> list[_Candidate]:
    """Find all bracketed verdicts in order. Fenced and quoted ones are marked: there the judge repeats another text."""
    found, fenced = [], False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
            continue
        repeats = fenced or line.lstrip().startswith(">")
        for match in pattern.finditer(line):
            before, after = line[: match.start()], line[match.end() :]
            quoted = _inside_quotes(before, after)
            found.append(_Candidate(match.group(1), repeats or quoted, bool(_LABEL.search(before))))
    return found


def _inside_quotes(before: str, after: str) -> bool:
    """Whether the verdict is in quotation marks with little other text, as in ``"Rating: [[5]]"``."""
    opened = re.search(rf"[{_QUOTES}][^{_QUOTES}\n]{{0,30}}$", before)
    closed = re.match(rf"[^{_QUOTES}\n]{{0,10}}[{_QUOTES}]", after)
    return bool(opened and closed)


def _choose(candidates: list[_Candidate], planted: set[str]) -> str:
    """Return the text of the chosen verdict, or "!" followed by the reason why there is none."""
    own = [c for c in candidates if not c.quoted]
    if not own:
        if len({c.value for c in candidates}) != 1:
            return "!several quoted verdicts and none of its own" if candidates else "!no verdict found"
        own = candidates
    chosen = own[-1]
    labelled = [c for c in own if c.labelled]
    if labelled and not chosen.labelled and chosen.value in planted:
        chosen = labelled[-1]  # an unlabelled last number that also occurs in the judged answer refers to that answer
    if chosen.value in planted and len({c.value for c in own}) > 1:
        return f"!ambiguous: [[{chosen.value}]] also stands in the judged answer"
    return chosen.value


def read_rating(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Parse one rating with both parsers. ``primary`` ("strict" or "fastchat") says which result is the verdict."""
    if reply.text is None:
        return Failed(f"no content (finish_reason {reply.finish_reason or 'not given'})")
    try:
        number = fastchat_rating(reply.text)
        fastchat: Value | None = None if number == -1 else float(number)
    except SyntaxError:
        fastchat = None  # FastChat's whole run would fail here; ours only counts this reply as unread
    if primary == "fastchat":
        return Graded(fastchat, fastchat) if fastchat is not None else Unparsed("no verdict found", None)
    strict = strict_rating(reply.text, answers)
    if isinstance(strict, str):
        return Unparsed(_with_finish(strict, reply), fastchat)
    return Graded(strict, fastchat)


def read_winner(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Parse one comparison with both parsers. The values are the judge's letters (A was shown first)."""
    if reply.text is None:
        return Failed(f"no content (finish_reason {reply.finish_reason or 'not given'})")
    fastchat = fastchat_winner(reply.text)
    if primary == "fastchat":
        return Graded(fastchat, fastchat) if fastchat is not None else Unparsed("no verdict found", None)
    strict, reason = strict_winner(reply.text, answers)
    if strict is None:
        return Unparsed(_with_finish(reason, reply), fastchat)
    return Graded(strict, fastchat)


def _with_finish(reason: str, reply: Reply) -> str:
    """Add to the reason that the reply was cut at the token limit, if it was: a higher limit helps then."""
    return f"{reason} (reply cut at the token limit)" if reply.finish_reason == "length" else reason
