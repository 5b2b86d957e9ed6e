"""Questions that need torch or transformers, asked in a process of its own, so that ``salient-ds check`` needs neither.

``ask`` starts ``python -m MODULE`` with one JSON argument and reads one JSON object from the last line of its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

TIMEOUT = 600
"""Seconds after which an answer is given up."""


def ask(module: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """What ``module`` answers to ``question``, a JSON-able mapping.

    The process sees no GPU and touches no network.

    Raises:
        ValueError: with the answer's own sentence (key "error"), or with the last line of what went wrong.
    """
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, json.dumps(question)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | quiet, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{module} gave no answer within {TIMEOUT} s") from error
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ValueError(f"{module} failed: {reason}") from None
    if not isinstance(answer, dict):
        raise ValueError(f"{module} answered {answer!r}, expected an object")
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    return answer


def reply(answer: Mapping[str, Any]) -> None:
    """Print an answer for :func:`ask`."""
    print(json.dumps(answer), flush=True)


def tokenizer_of(question: Mapping[str, Any]) -> Any:
    """In the helper: the tokenizer that a question names. If it cannot be loaded, that is the answer: returns None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(question["tokenizer"], trust_remote_code=question["trust_remote_code"])
    except Exception as error:  # each library has its own kinds
        reply({"error": f"the tokenizer of {question['tokenizer']} cannot be loaded: {error}"})
        return None
