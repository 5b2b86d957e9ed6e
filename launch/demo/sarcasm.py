"""Turn labelled headlines into balanced Alpaca rows, split into training and held-out rows without common headlines."""

from __future__ import annotations

import json
import random
from pathlib import Path

INSTRUCTION = "Is this headline sarcastic?"
SYSTEM = "Answer yes or no."
ANSWERS = {"1": "yes", "0": "no"}


def read_headlines(path: Path) -> dict[str, str]:
    """Read {headline: "yes" | "no"} in file order. Repeated headlines count once; those with both labels are dropped.

    Raises:
        ValueError: a line is not a labelled headline (the message gives the line number).
    """
    found: dict[str, str] = {}
    contradicting = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            headline, answer = row["input"][-1]["content"].strip(), ANSWERS[row["ideal"]]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is not a labelled headline ({error!r})") from error
        if found.setdefault(headline, answer) != answer:
            contradicting.add(headline)
    return {headline: answer for headline, answer in found.items() if headline not in contradicting}


def alpaca_row(headline: str, answer: str) -> dict[str, str]:
    """One row in Alpaca's format. Its system message replaces the template's."""
    return {"system": SYSTEM, "instruction": INSTRUCTION, "input": headline, "output": answer}


def split(
    headlines: dict[str, str], train: int, held_out: int, max_characters: int, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (training rows, held-out rows), each half yes and half no. The same arguments give the same rows.

    Args:
        train, held_out: number of rows, even.
        max_characters: longer headlines are left out, so that sequences are short and the demo is fast.

    Raises:
        ValueError: a number is odd, or there are too few headlines.
    """
    if train % 2 or held_out % 2:
        raise ValueError(f"train={train} and held_out={held_out} must be even: half of the rows is yes, half no")
    draw = random.Random(seed)
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for answer in ANSWERS.values():
        usable = sorted(h for h, a in headlines.items() if a == answer and len(h) <= max_characters)
        if len(usable) < (train + held_out) // 2:
            raise ValueError(
                f"{len(usable)} headlines of at most {max_characters} characters are labelled {answer!r}, fewer than "
                f"the {(train + held_out) // 2} wanted: lower train={train} or held_out={held_out}, or allow "
                "longer headlines"
            )
        draw.shuffle(usable)
        parts[0].extend(alpaca_row(h, answer) for h in usable[held_out // 2 : (train + held_out) // 2])
        parts[1].extend(alpaca_row(h, answer) for h in usable[: held_out // 2])
    for rows in parts:
        draw.shuffle(rows)
    return parts


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    """Write the rows as JSONL and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
