"""Last part of the demo: base model and adapter answer our own 16 questions. A judge grades them if one is named."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "mt_bench_own_set.sh"
TINY_KNOWS = "The tiny model knows one task, so its answers here are noise. The questions are ours, not MT-Bench's."
NEW_TOKENS = 64
TINY_NEW_TOKENS = 8
"""The tiny model's window of 256 tokens is nearly filled by most questions."""
NARROW = (
    "The adapter was trained to answer yes or no, so that is what it now says to anything. These are our own "
    "questions, not MT-Bench."
)


def answer_questions(
    arguments: Sequence[str], cache: Path, tiny: bool, execute: Callable[[list[str]], None], say: Callable[[str], None]
) -> None:
    """Generate the answers, and judge them if JUDGE_MODEL is set. Otherwise say how to have them judged later.

    Args:
        arguments: run file and overrides of the trained run.
        cache: the demo's directory; answers and report are written below it.
        execute: shows a command and runs it.
        say: prints one message.
    """
    tokens = TINY_NEW_TOKENS if tiny else NEW_TOKENS
    os.environ.update(
        STEPS="generate judge report", DATA=str(cache / "mt_bench"),
        REPORT=str(cache / "mt_bench" / "report"), GENERATE_ARGS=f"--max-new-tokens {tokens} --overwrite",
    )  # fmt: skip
    command = ["bash", os.path.relpath(SCRIPT), *arguments]
    execute(command)
    say(TINY_KNOWS if tiny else NARROW)
    if not os.environ.get("JUDGE_MODEL"):
        where = f"STEPS='judge report' DATA={os.environ['DATA']} REPORT={os.environ['REPORT']}"
        say(f"To have them judged: {where} JUDGE_MODEL=... JUDGE_URL=http://... {shlex.join(command[1:])}")
