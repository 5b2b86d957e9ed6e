"""Read a verdict from a judge's reply: a strict reading, and FastChat's reading for comparison.

Source: the output formats ``[[rating]]`` and ``[[A]]`` of Zheng et al. 2023 (MT-Bench), appendix A.
Differs from the reference: FastChat takes the first ``[[n]]`` (then any ``[n]``), checks no range and prefers
A over B over C wherever they stand, so that a quoted instruction, an index ``arr[0]`` or a rating planted in the
judged answer becomes the score. The strict reading takes the judge's last own verdict, or none.
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
# A number in double brackets; "/10" is a common and unambiguous way to write the same scale. ASCII digits only.
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
    """FastChat's reading of a rating; -1 when it finds none.

    Raises SyntaxError for ``[[08]]`` and for digits that are not ASCII, as FastChat does.
    """
    match = _FIRST_DOUBLE.search(text) or _FIRST_SINGLE.search(text)
    return ast.literal_eval(match.groups()[0]) if match else -1


def fastchat_winner(text: str) -> Winner | None:
    """FastChat's reading of a comparison: A anywhere wins over B over C; None is its "error"."""
    for letter, winner in _WINNER_NAMES.items():
        if f"[[{letter}]]" in text:
            return winner
    return None


def strict_rating(text: str, answers: Iterable[str] = ()) -> float | str:
    """The judge's last own rating (a float in 1..10), or a string that says why there is none.

    ``answers`` are the judged texts: a rating that also stands in one of them is not believed when the reply
    holds other ratings too, because it may be an echo of a planted verdict.
    """
    chosen = _choose(_candidates(text, _RATING), {m.group(1) for a in answers for m in _RATING.finditer(a)})
    if chosen.startswith("!"):
        return chosen[1:]
    value = float(chosen)
    if not LOWEST <= value <= HIGHEST:
        return f"out of range: {value:g} is not in {LOWEST:g}..{HIGHEST:g}"
    return value


def strict_winner(text: str, answers: Iterable[str] = ()) -> tuple[Winner | None, str]:
    """The judge's last own choice (A, B or tie) and "", or None and the reason why there is none."""
    chosen = _choose(_candidates(text, _WINNER), {m.group(1) for a in answers for m in _WINNER.finditer(a)})
    if chosen.startswith("!"):
        return None, chosen[1:]
    return _WINNER_NAMES[chosen], ""


def _candidates(text: str, pattern: re.Pattern[str]) -> list[_Candidate]:
    """All bracketed verdicts in order. Fenced and quoted ones are marked: there the judge repeats somebody."""
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
    """True when a quotation that holds little more than the verdict surrounds it, as in ``"Rating: [[5]]"``."""
    opened = re.search(rf"[{_QUOTES}][^{_QUOTES}\n]{{0,30}}$", before)
    closed = re.match(rf"[^{_QUOTES}\n]{{0,10}}[{_QUOTES}]", after)
    return bool(opened and closed)


def _choose(candidates: list[_Candidate], planted: set[str]) -> str:
    """The text of the chosen verdict, or "!" and a reason."""
    own = [c for c in candidates if not c.quoted]
    if not own:
        if len({c.value for c in candidates}) != 1:
            return "!several quoted verdicts and none of its own" if candidates else "!no verdict found"
        own = candidates
    chosen = own[-1]
    labelled = [c for c in own if c.labelled]
    if labelled and not chosen.labelled and chosen.value in planted:
        chosen = labelled[-1]  # a bare number at the end that the judged answer holds is a remark about it
    if chosen.value in planted and len({c.value for c in own}) > 1:
        return f"!ambiguous: [[{chosen.value}]] also stands in the judged answer"
    return chosen.value


def read_rating(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Both readings of one rating. ``primary`` ("strict" or "fastchat") decides which one is the verdict."""
    if reply.text is None:
        return Failed(f"no content (finish_reason {reply.finish_reason or 'not given'})")
    try:
        number = fastchat_rating(reply.text)
        fastchat: Value | None = None if number == -1 else float(number)
    except SyntaxError:
        fastchat = None  # FastChat's whole run would end here; one reply that cannot be read is enough
    if primary == "fastchat":
        return Graded(fastchat, fastchat) if fastchat is not None else Unparsed("no verdict found", None)
    strict = strict_rating(reply.text, answers)
    if isinstance(strict, str):
        return Unparsed(_with_finish(strict, reply), fastchat)
    return Graded(strict, fastchat)


def read_winner(reply: Reply, answers: Iterable[str] = (), primary: str = "strict") -> Verdict:
    """Both readings of one comparison, in the judge's own letters (A was shown first)."""
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
    """A reply cut at the token limit usually has no verdict yet: say so, the remedy is another limit."""
    return f"{reason} (reply cut at the token limit)" if reply.finish_reason == "length" else reason
