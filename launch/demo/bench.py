"""The end of the demo: base model and adapter answer our own 16 questions; a judge grades them if one is named."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "mt_bench_own_set.sh"
LEFT_OUT = (
    "left out here: the tiny model knows yes and no, and its window of 256 tokens holds few of the questions. "
    "`make demo` does this step with a real model."
)
NARROW = (
    "The adapter was trained to answer yes or no, so that is what it now says to anything. These are our own "
    "questions, not MT-Bench."
)


def answer_questions(
    arguments: Sequence[str], cache: Path, tiny: bool, execute: Callable[[list[str]], None], say: Callable[[str], None]
) -> None:
    """Answers, and verdicts if JUDGE_MODEL is set; without it the script says how to go on.

    Args:
        arguments: run file and overrides of the run that was trained.
        cache: the demo's directory; answers and report go below it.
        execute: shows and runs a command.
    """
    if tiny:
        say(LEFT_OUT)
        return
    os.environ.update(
        STEPS="generate judge report", DATA=str(cache / "mt_bench"),
        REPORT=str(cache / "mt_bench" / "report"), GENERATE_ARGS="--max-new-tokens 64 --overwrite",
    )  # fmt: skip
    command = ["bash", os.path.relpath(SCRIPT), *arguments]
    execute(command)
    say(NARROW)
    if not os.environ.get("JUDGE_MODEL"):
        where = f"DATA={os.environ['DATA']} REPORT={os.environ['REPORT']}"
        say(f"To have them judged: {where} JUDGE_MODEL=... JUDGE_URL=http://... {shlex.join(command[1:])}")
