"""Bodies of the commands ``chat`` and ``generate``."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, RowError, Turn
from salient_ds.run.exits import RUN_ERROR, USAGE_ERROR, print_problems

if TYPE_CHECKING:
    from salient_ds.run.talk_model import Talker

_LEAVE = ("/exit", "/quit")
_HELP = "type a message; /new begins a new conversation, /exit (or Ctrl-D) leaves"


@dataclass(frozen=True)
class TalkOptions:
    """What both commands know."""

    base: str | None = None
    template: str | None = None
    precision: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    compare: bool = False


def _loaded(place: str, options: TalkOptions) -> Talker | None:
    from salient_ds.engine.shard_files import CheckpointError
    from salient_ds.run.talk_model import load_talker, speech_of

    try:
        speech = speech_of(place, options.base)
        if options.compare and speech.adapter is None and speech.checkpoint is None:
            raise ValueError(f"{place} is a model by itself, there is no base to compare it with: leave --compare out")
        return load_talker(speech, place, options.template, options.precision, options.compare)
    except (ValueError, CheckpointError) as error:
        print_problems([str(error)])
        return None


def chat(place: str, options: TalkOptions, read: Callable[[], str] | None = None) -> int:
    """Talk to a model until the input ends. Answers are printed token by token.

    Returns:
        0, or 1 after printing why the model cannot be loaded.
    """
    talker = _loaded(place, options)
    if talker is None:
        return RUN_ERROR
    print(f"{place}: template {talker.template.name}; {_HELP}", file=sys.stderr, flush=True)
    turns: dict[str, list[Turn]] = {name: [] for name in (("base", "adapter") if options.compare else ("answer",))}
    while (text := _line(read or _prompt)) is not None:
        if text in _LEAVE:
            break
        if text == "/new":
            turns = {name: [] for name in turns}
            continue
        if text:
            _exchange(talker, options, turns, text)
    return 0


def _prompt() -> str:
    return input("> " if sys.stdin.isatty() else "")


def _line(read: Callable[[], str]) -> str | None:
    try:
        return read().strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _exchange(talker: Talker, options: TalkOptions, turns: dict[str, list[Turn]], text: str) -> None:
    """One question; every side has a conversation of its own. Ctrl-C ends an answer, not the conversation."""
    for name, said in turns.items():
        if len(turns) > 1:
            print(f"[{name}]", flush=True)
        asked = [*said, Turn(USER, text)]
        pieces: list[str] = []
        try:
            with talker.without_adapter() if name == "base" else nullcontext():
                for piece in stream(talker, Conversation(options.system, tuple(asked)), options):
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except (RowError, ValueError) as error:
            print_problems([str(error)])
            continue
        print(flush=True)
        said[:] = [*asked, Turn(ASSISTANT, "".join(pieces).strip())]


def stream(talker: Talker, conversation: Conversation, options: TalkOptions) -> Iterator[str]:
    """The answer, piece by piece.

    Raises:
        ValueError: the conversation fills the model's window.
    """
    import torch
    from transformers import TextIteratorStreamer

    ids = _fitting(talker, talker.tokens(conversation))
    streamer: Any = TextIteratorStreamer(talker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []
    stop = _Stop()
    asked = torch.tensor([ids], device=talker.model.device)

    def work() -> None:
        try:
            torch.manual_seed(options.seed)
            talker.model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), streamer=streamer, stopping_criteria=[stop],
                **_settings(talker, options, len(ids)),
            )  # fmt: skip
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _before_stop(streamer, talker.stops)
    finally:
        stop.now = True
        thread.join()
    if failed:
        raise ValueError(f"the model failed: {failed[0]}")


class _Stop:
    """A stopping criterion that another thread sets."""

    now = False

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), self.now, dtype=torch.bool, device=ids.device)


def _before_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the first stop text. What may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        cut = min((held.find(stop) for stop in stops if stop in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _fitting(talker: Talker, ids: list[int]) -> list[int]:
    window = getattr(talker.model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and len(ids) >= window:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, and the model's window is {window}: /new begins anew"
        )
    return ids


def _settings(talker: Talker, options: TalkOptions, length: int) -> dict[str, Any]:
    window = getattr(talker.model.config.get_text_config(), "max_position_embeddings", None)
    room = options.max_new_tokens if window is None else min(options.max_new_tokens, window - length)
    sampled = (
        {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {"do_sample": False}
    )
    return {
        **sampled, "top_p": None, "top_k": None, "max_new_tokens": room, "pad_token_id": talker.tokenizer.pad_token_id,
        "stop_strings": talker.stops or None, "tokenizer": talker.tokenizer,
    }  # fmt: skip


def generate(place: str, prompts: Sequence[str], file: str | None, output: str | None, options: TalkOptions) -> int:
    """Answer prompts of the command line, or those of a file.

    Args:
        file: a text file with a prompt per line, or JSON lines, each a text or an object with "prompt", "instruction"
            (and "input") or "messages".
        output: JSON lines with prompt and answer, written as they come (default: answers are printed).

    Returns:
        0; 2 if the command or the file is wrong; 1 if the model cannot be loaded or an answer failed.
    """
    from salient_ds.run.talk_prompts import PromptError, read_prompts

    try:
        conversations = read_prompts(prompts, file, options.system)
        if output is not None and Path(output).exists():
            raise PromptError(f"--output {output} exists already: choose another file, or remove it")
    except PromptError as error:
        print_problems([str(error)])
        return USAGE_ERROR
    talker = _loaded(place, options)
    if talker is None:
        return RUN_ERROR
    return _answer_all(talker, conversations, output, options)


def _answer_all(talker: Talker, conversations: Sequence[Conversation], output: str | None, options: TalkOptions) -> int:
    from tqdm import tqdm

    failures = 0
    sides = ("base", "adapter") if options.compare else ("answer",)
    bar = tqdm(conversations, unit="prompt", disable=len(conversations) < 2 or not sys.stderr.isatty())
    with Path(output).open("w", encoding="utf-8") if output is not None else nullcontext() as sink:
        for number, conversation in enumerate(bar, 1):
            line: dict[str, Any] = {"messages": conversation.messages()}
            for side in sides:
                try:
                    with talker.without_adapter() if side == "base" else nullcontext():
                        text = ""
                        for piece in stream(talker, conversation, options):
                            text += piece
                            bar.set_postfix_str(f"{len(text)} characters")
                    line[side] = text.strip()
                except (RowError, ValueError) as error:
                    failures += 1
                    line["error"] = str(error)
                    print_problems([f"prompt {number}: {error}"])
            if sink is not None:
                sink.write(json.dumps(line, ensure_ascii=False) + "\n")
                sink.flush()
            else:
                _print(line, sides, len(conversations) > 1, conversation)
    return RUN_ERROR if failures else 0


def _print(line: dict[str, Any], sides: Sequence[str], several: bool, conversation: Conversation) -> None:
    if several:
        print(f"> {conversation.turns[-1].text}")
    for side in sides:
        if side in line:
            print(f"[{side}] {line[side]}" if len(sides) > 1 else line[side], flush=True)
