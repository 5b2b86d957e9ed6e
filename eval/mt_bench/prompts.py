"""Judge prompts: eight templates by kind, turn and use of a reference answer, and the messages made from them.

Source: ``judge_prompts.jsonl`` of FastChat's llm_judge (its eight MT-Bench prompts), or our own file in the same
format and with the same placeholders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["single", "pair"]
Messages = list[dict[str, str]]

# FastChat's template for each (kind, turn, with a reference answer).
MT_BENCH_NAMES: dict[tuple[Kind, int, bool], str] = {
    ("single", 1, False): "single-v1",
    ("single", 1, True): "single-math-v1",
    ("single", 2, False): "single-v1-multi-turn",
    ("single", 2, True): "single-math-v1-multi-turn",
    ("pair", 1, False): "pair-v2",
    ("pair", 1, True): "pair-math-v1",
    ("pair", 2, False): "pair-v2-multi-turn",
    ("pair", 2, True): "pair-math-v1-multi-turn",
}
OWN_NAMES: dict[tuple[Kind, int, bool], str] = {
    (kind, turn, ref): f"own-{kind}{'-ref' if ref else ''}-turn{turn}"
    for kind in ("single", "pair")
    for turn in (1, 2)
    for ref in (False, True)
}
_PLACEHOLDER = re.compile(r"\{([a-z_0-9]+)\}")


@dataclass(frozen=True)
class Template:
    """One judge prompt. ``user`` contains placeholders such as {question} or {answer_a_2}."""

    name: str
    system: str
    user: str

    def fields(self) -> list[str]:
        """Return the names of the placeholders, sorted and without duplicates."""
        return sorted(set(_PLACEHOLDER.findall(self.user)))

    def render(self, values: Mapping[str, str], merge_system: bool = False) -> Messages:
        """Return chat messages with all placeholders filled in one pass.

        Answers are data: braces in them are kept and never treated as placeholders.

        Args:
            merge_system: put the system text at the start of the user message, for judges without a system role.

        Raises:
            ValueError: a placeholder has no value.
        """
        missing = [name for name in self.fields() if name not in values]
        if missing:
            raise ValueError(f"prompt {self.name!r} needs {missing}, given {sorted(values)}")
        user = _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.user)
        if merge_system:
            return [{"role": "user", "content": f"{self.system.rstrip()}\n\n{user}"}]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


class PromptSet:
    """The templates of one file, by kind, turn and use of a reference answer."""

    def __init__(self, templates: Mapping[str, Template], names: Mapping[tuple[Kind, int, bool], str]) -> None:
        self._templates = dict(templates)
        self._names = dict(names)
        if not self.all():
            raise ValueError(f"judge prompts have none of {sorted(names.values())}; the file has {sorted(templates)}")

    def at(self, kind: Kind, turn: int, with_reference: bool) -> Template:
        """Return a template.

        Raises:
            ValueError: the file lacks it.
        """
        name = self._names[kind, turn, with_reference]
        if name not in self._templates:
            raise ValueError(f"judge prompts lack {name!r}; the file has {sorted(self._templates)}")
        return self._templates[name]

    def has(self, kind: Kind, turn: int, with_reference: bool) -> bool:
        return self._names[kind, turn, with_reference] in self._templates

    def all(self) -> list[Template]:
        """Return the templates that there are, at most eight, in the order of the protocol."""
        return [self._templates[name] for name in self._names.values() if name in self._templates]


def load_prompts(path: Path) -> PromptSet:
    """Read a judge prompt file. The names in it show whether it is FastChat's or our own.

    Raises:
        ValueError: a line is damaged, lacks a key, or has a placeholder that no value fills; or no name is known.
    """
    templates = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            parts = row["name"], row["system_prompt"], row["prompt_template"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: a judge prompt needs name, system_prompt and prompt_template ({error!r})"
            ) from None
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path}, line {number}: name, system_prompt and prompt_template must be texts")
        templates[parts[0]] = Template(*parts)
    own = any(name.startswith("own-") for name in templates)
    names = OWN_NAMES if own else MT_BENCH_NAMES
    for key, name in names.items():
        if name in templates:
            _check_placeholders(path, templates[name], *key)
    return PromptSet(templates, names)


def _check_placeholders(path: Path, template: Template, kind: Kind, turn: int, with_reference: bool) -> None:
    answers = [["", ""]] * (1 if kind == "single" else 2)
    known = values_for(turn, ["", ""], answers, ["", ""] if with_reference else None)
    unknown = [name for name in template.fields() if name not in known]
    unused = [name for name in known if name.startswith("answer") and name not in template.fields()]
    if unknown or unused:
        raise ValueError(
            f"{path}: prompt {template.name!r} "
            + (f"has unknown placeholders {unknown}" if unknown else f"does not show {unused}")
            + f"; it can use {sorted(known)}"
        )


def values_for(
    turn: int,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    reference: Sequence[str] | None,
) -> dict[str, str]:
    """Return the placeholder values for one game.

    Args:
        turn: 1 or 2.
        questions: the user's turns.
        answers: the turns of one model (single), or of two models in the order shown (pair).
        reference: the reference turns, if the template needs them.
    """
    assert turn in (1, 2) and len(answers) in (1, 2)
    values: dict[str, str] = {}
    suffixes = [""] if len(answers) == 1 else ["_a", "_b"]
    if turn == 1:
        values["question"] = questions[0]
        values |= {f"answer{s}": turns[0] for s, turns in zip(suffixes, answers, strict=True)}
    else:
        values |= {"question_1": questions[0], "question_2": questions[1]}
        for s, turns in zip(suffixes, answers, strict=True):
            values |= {f"answer{s}_1": turns[0], f"answer{s}_2": turns[1]}
    for number, text in enumerate((reference or [])[:turn], start=1):
        values[f"ref_answer_{number}"] = text
    return values
