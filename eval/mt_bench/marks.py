"""Find the bracketed verdicts of a reply and say what stands around each: a label, a quotation, an aside.

Judges write ``[[7]]`` in many ways: ``[[**7**]]``, ``\\[\\[7\\]\\]``, ``[[7/10]]``, ``[[Rating: 7]]``.
All work on a bounded part of the text around a verdict, so the time is linear in the length of the reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MOST_MARKS = 500
"""Only the last verdicts of a reply are looked at."""
AROUND = 160
"""Characters before and after a verdict that can say something about it."""

_SAME = str.maketrans({
    "\u3010": "[", "\u3011": "]", "\uff3b": "[", "\uff3d": "]", "\u3014": "[", "\u3015": "]", "\u27e6": "[[", "\u27e7": "]]",  # noqa: E501
    "\uff1a": ":", "\uff0e": ".", "\uff0f": "/", "\uff1e": ">", "\uff1c": "<", "\uff1d": "=", "\u2212": "-", "\uff0d": "-",  # noqa: E501
    **{chr(0xFF10 + n): str(n) for n in range(10)}, **{chr(0xFF21 + n): chr(65 + n) for n in range(3)},
})  # fmt: skip
_MARK = re.compile(r"\[ ?\[([^\[\]\n]{1,60})\] ?\]")
_COMPARED = re.compile(r"\[\[ ?([AB]) ?\]\] ?([<>=]{1,3}) ?\[\[ ?([AB]) ?\]\]", re.IGNORECASE)
_WORDS = (
    r"rating|rate|score|scores?d?|grade|mark|verdict|decision|judge?ment|choice|winner|result|bewertung|wertung|note|"
    r"punktzahl|punkte|urteil|entscheidung|nota|puntuaci\u00f3n|puntaje|calificaci\u00f3n|veredicto|avalia\u00e7\u00e3o|"  # noqa: E501
    r"pontua\u00e7\u00e3o|evaluation|\u00e9valuation|valutazione|punteggio|voto|verdetto|verdict final|\u043e\u0446\u0435\u043d\u043a\u0430|"  # noqa: E501
    r"\u0431\u0430\u043b\u043b|\u0432\u0435\u0440\u0434\u0438\u043a\u0442|\u0438\u0442\u043e\u0433|ocena|puan|"
    r"\u8a55\u4fa1|\u8bc4\u4ef7|\u8a55\u50f9|\u8bc4\u5206|\u8a55\u5206|\u8a55\u70b9|\u63a1\u70b9|\u70b9\u6570|\u5206\u6570|"  # noqa: E501
    r"\u5f97\u5206|\u5224\u5b9a|\u7ed3\u8bba|\u7d50\u8ad6|\ud3c9\uac00|\ud3c9\uc810|\uc810\uc218"
)
_NEAR = re.compile(rf"(?:^|[\n,;.:!?\u3002\uff0c(>*#`_|-])[\s*#`_>-]*(?:(?:my|the|so|overall|final)\s+){{0,3}}"
                   rf"(?:{_WORDS})[\s:=*_`\"'\u201c\u201e\u00ab$(>-]{{0,12}}$", re.IGNORECASE)  # fmt: skip
_FAR = re.compile(rf"(?:\b(?:{_WORDS})\b|(?:{_WORDS})\s?:)[^\n\[\].!?;\u3002]{{0,40}}(?:\n\s*)?$", re.IGNORECASE)
_SAID = re.compile(
    r"(?:\bI(?:'ll|\u2019ll| will| shall)?(?: would therefore)? (?:give|rate|assign|award|score|grade|choose|pick|prefer)\b"  # noqa: E501
    r"[^\n\[\].!?;]{0,40}|\b(?:no|correction|revised|on second thoughts?|final(?:ly)?)[,:\s]{1,3})[*_`\"'\s]{0,4}$",
    re.IGNORECASE,
)
_AFTER = re.compile(rf"[\s*_`)]{{0,4}}(?:is |= ?|as )?(?:my |the )(?:final |overall )?(?:{_WORDS})\b", re.IGNORECASE)
_ASIDE = re.compile(
    r"\b(?:would|could|might|should have|if|deserves?|earns?|maximum|minimum|scale|out of|perfect|flawless|at most|up to|"  # noqa: E501
    r"far from|short of|instead of|rather than|not|options?|examples?|format|context only|between|von|w\u00e4re|h\u00e4tte|"  # noqa: E501
    r"exigir\u00eda|ser\u00eda|habr\u00eda|serait|aurait|sarebbe|first (?:idea|sight|guess|thought|impression))\b",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"\]\](?![^\n]*\b(?:then|but|so|now|finally|therefore|however|dann|aber)\b)[^\n.!?;:=>\u3002\u2192\[\]]{0,80}$"
)
_FIRST_TURN = re.compile(r"\b(?:turn 1|turn one|first (?:turn|question|answer))\b", re.IGNORECASE)
_SECOND_TURN = re.compile(r"\b(?:turn 2|turn two|second (?:turn|question|answer))\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?;\u3002\n](?=\s|$)|\n|\u3002|\]\]")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_FENCE = re.compile(r"\s{0,8}(```|~~~)")
_QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb\u201e\u300c\u300d"
_OPENED = re.compile(rf"[{_QUOTES}]([^{_QUOTES}\n]{{0,30}})$")
_CLOSED = re.compile(rf"[^{_QUOTES}\n]{{0,10}}[{_QUOTES}]")
_TRIM = " \t*_`$\"'\u201c\u201d"
_NUMBER = re.compile(
    rf"(?:(?:{_WORDS})\s*[:=]?\s*)?(-?[0-9]{{1,20}}(?:\.[0-9]{{0,20}})?)\s*(?:(?:/|out of|of|von|sur|de|su|\u043e\u0437)\s*10(?:\.0)?)?"  # noqa: E501
    r"\s*(?:points?|punkte|\u70b9|\u5206)?",
    re.IGNORECASE,
)
_RANGE = re.compile(r"[0-9.]{1,6}\s*(?:-|\u2013|\u2014|~|to|or|bis|/)\s*[0-9.]{1,6}", re.IGNORECASE)
_SIDE = re.compile(
    rf"(?:(?:{_WORDS})\s*[:=]?\s*)?(?:(?:assistant|model|answer|response|option)\s*)?([abc])(?:\s*(?:is better|wins|won))?",  # noqa: E501
    re.IGNORECASE,
)
_TIE = re.compile(
    rf"(?:(?:{_WORDS})\s*[:=]?\s*)?(?:a |it's a )?(?:tie|tied|draw|equal)|a\s*=+\s*b|b\s*=+\s*a", re.IGNORECASE
)
_ORDER = re.compile(r"([ab])\s*([<>])[<>]?\s*([ab])", re.IGNORECASE)


@dataclass(frozen=True)
class Mark:
    """One bracketed verdict.

    Attributes:
        quoted: it stands in quotation marks within a sentence: the judge repeats another text.
        repeats: it stands in a fence or a quote block.
        labelled: the judge says that it is the verdict, as in "Rating: [[7]]".
        aside: it belongs to a remark about another number, as in "would have been [[9]]".
        alone: nothing else is on its line.
        at_end: nothing but punctuation follows, and it is no part of a list or comparison such as "[[8]] or [[6]]".
        readable: it is one verdict; ``[[7-8]]`` is none.
    """

    value: str
    quoted: bool
    repeats: bool
    labelled: bool
    aside: bool
    alone: bool
    at_end: bool
    readable: bool = True


def rating_in(inner: str, labelled: bool) -> str | None:
    """Return the number in a pair of brackets; "?" and the text if it is an unclear rating; None if it is none."""
    text = _trimmed(inner)
    number = _NUMBER.fullmatch(text)
    if number:
        return number.group(1)
    return f"?{text}" if _RANGE.fullmatch(text) or (labelled and any(c.isdigit() for c in text)) else None


def winner_in(inner: str, labelled: bool) -> str | None:
    """Return A, B or C (a tie) for the text in a pair of brackets; None if it is no choice."""
    text = _trimmed(inner)
    if side := _SIDE.fullmatch(text):
        return side.group(1).upper()
    if _TIE.fullmatch(text):
        return "C"
    order = _ORDER.fullmatch(text)
    if order and order.group(1).lower() != order.group(3).lower():
        return order.group(1 if order.group(2) == ">" else 3).upper()
    return None


def _trimmed(inner: str) -> str:
    text = inner.strip(_TRIM)
    boxed = re.fullmatch(r"\\boxed\{([^{}]{1,40})\}", text)
    return (boxed.group(1) if boxed else text).strip(_TRIM)


def find_marks(text: str, read: Callable[[str, bool], str | None]) -> list[Mark]:
    """Return the verdicts of a text in order. ``read`` returns the verdict that a pair of brackets holds, or None."""
    text = text.translate(_SAME).replace("\\[", "[").replace("\\]", "]")
    text = _APOSTROPHE.sub("", text)
    text = _COMPARED.sub(r"[[\1\2\3]]", text)
    places = list(_MARK.finditer(text))[-MOST_MARKS:]
    fences = _fences(text) if places else []
    marks: list[Mark] = []
    contexts: list[str] = []
    fence, inside = 0, False
    for place in places:
        while fence < len(fences) and fences[fence] < place.start():
            fence, inside = fence + 1, not inside
        before = text[max(0, place.start() - AROUND) : place.start()]
        after = text[place.end() : place.end() + AROUND]
        mark, context = _mark(place.group(1), before, after, inside, read)
        if mark is not None:
            marks.append(mark)
            contexts.append(context)
    return list(_of_this_turn(marks, contexts))


def _fences(text: str) -> list[int]:
    """Return the places of the lines that begin or end a fence."""
    places, at = [], 0
    for line in text.split("\n"):
        if _FENCE.match(line):
            places.append(at)
        at += len(line) + 1
    return places


def _mark(
    inner: str, before: str, after: str, fenced: bool, read: Callable[[str, bool], str | None]
) -> tuple[Mark | None, str]:
    start, end = before.rpartition("\n")[2], after.partition("\n")[0]
    opened, closed = _OPENED.search(start), _CLOSED.match(end)
    whole = not start.strip(" \t>*_#`") or _NEAR.fullmatch(start.strip(" \t>*_#`") + " ") is not None
    whole = whole and not end.strip(" \t*_`.\u3002")
    quoted = bool(opened and closed) and not (whole and start.lstrip(" >*_")[:1] in ("`", "")) and '"' not in inner
    near = _NEAR.search(before)
    if quoted and opened and not opened.group(1).strip() and near:
        quoted = False  # Rating: "[[5]]"
    sentence = before[max((m.end() for m in _SENTENCE.finditer(before)), default=0) :]
    aside = bool(_ASIDE.search(sentence)) and not near
    said = _SAID.search(before) or _AFTER.match(after) or _FAR.search(before) or _own_label(inner)
    labelled = bool(near or (said and not aside))
    value = read(inner, labelled)
    if value is None:
        return None, ""
    readable = not value.startswith("?")
    return Mark(
        value=value if readable else value[1:],
        quoted=quoted,
        repeats=fenced or start.lstrip().startswith(">"),
        labelled=labelled,
        aside=aside,
        alone=not start.strip(" \t>*_#`") and not end.strip(" \t*_`.\u3002"),
        at_end=not re.sub(r"[\s\W]+", "", after) and not _JOINED.search(before),
        readable=readable,
    ), sentence


def _own_label(inner: str) -> bool:
    return re.match(rf"[\s*_`]{{0,4}}(?:{_WORDS})\s*[:=]", inner, re.IGNORECASE) is not None


def _of_this_turn(marks: list[Mark], contexts: list[str]) -> Iterator[Mark]:
    """Yield the marks. If both turns got one, that of turn 1 is context, because turn 2 is judged."""
    both = any(_SECOND_TURN.search(c) for c in contexts)
    for mark, context in zip(marks, contexts, strict=True):
        first = both and _FIRST_TURN.search(context) and not _SECOND_TURN.search(context)
        yield Mark(**{**vars(mark), "labelled": False, "aside": True}) if first else mark
