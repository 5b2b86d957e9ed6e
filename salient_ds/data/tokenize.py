"""Turns conversations into token ids and labels.

Labels are -100 except on answers, whose end tokens count as part of them. Names: `ids` and `labels` are int32 arrays of
the same length. `starts` holds the character at which each token begins. A boundary is "clean" if no token crosses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from salient_ds.data.conversation import IGNORED, Conversation, OnBadRow, Problem, ProblemLog, RowError
from salient_ds.data.segments import Segment
from salient_ds.data.template_base import Template
from salient_ds.data.texts import Text, texts_of
from salient_ds.data.token_processes import CannotStart, Workers
from salient_ds.data.token_report import Array, Example, TokenizationReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # texts per call of a fast tokenizer, which spreads a batch over threads


def tokenize_conversation(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Example:
    """Tokenises one conversation; only its first `max_length` tokens stay. Raises ValueError as `Template.segments`."""
    text = Text(template.segments(conversation, tokenizer))
    ids, labels = next(_encode([text], tokenizer, _bos(tokenizer), template.adds_bos))
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def tokenize_all(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: TokenizationReport,
    bad_rows: OnBadRow = "error",
    block: int | None = None,
    workers: int = 1,
) -> Iterator[Example]:
    """Tokenises and truncates conversations, and counts them in `report`. Those left without an answer are dropped.

    Plain text is not truncated: it becomes blocks of at most `block` tokens (default: `max_length`). The first token
    of a block is the last one of the block before, so that every token but the first is predicted once.

    `workers`: processes that tokenise; the examples are the same for any number of them.
    `bad_rows`: "skip" leaves out conversations that the template cannot render as they are. Raises DataError with all
    of them by kind otherwise, and ValueError when no answer token is left of any, with the max_length that would help.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a sequence needs at least 2 tokens, one to read and one to predict")
    log = ProblemLog("")
    kept, size = None if bad_rows == "skip" else log, block or max_length
    many = _started(workers, template, tokenizer, max_length, kept is None, size) if workers > 1 else None
    if many is None:
        yield from tokenize_rows(conversations, template, tokenizer, max_length, report, kept, size)
    else:
        try:
            yield from many.tokenized(conversations, report, kept)
        finally:
            many.close()
    log.raise_if_any()
    if report.refused and not report.examples:
        kinds = ", ".join(report.refused)
        raise ValueError(f"the template can render none of {sum(report.refused.values())} conversations ({kinds})")
    if report.examples and not report.kept:
        raise ValueError(
            f"max_length={max_length} leaves no answer token in any of the {report.examples} examples (the "
            f"longest has {report.longest} tokens): raise max_length to {report.shortest_useful} or more, or "
            "shorten the prompts"
        )


def _started(count: int, *setup: Any) -> Workers | None:
    """Processes that tokenise; None if the tokenizer cannot be used in other processes."""
    try:
        return Workers(count, *setup)
    except CannotStart:
        return None


def tokenize_rows(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: TokenizationReport,
    log: ProblemLog | None,
    block: int,
) -> Iterator[Example]:
    """Tokenises some of the rows of a data set. What cannot be rendered goes to ``log``, or is left out without it."""
    bos = _bos(tokenizer)
    control = re.compile("|".join(map(re.escape, sorted(tokenizer.all_special_tokens))) or r"(?!)")
    remaining = iter(conversations)
    while batch := list(islice(remaining, _BATCH)):
        report.control_tokens += sum(any(control.search(turn.text) for turn in item.turns) for item in batch)
        segmented = list(_rendered(batch, template, tokenizer, report, log))
        encoded = _encode(segmented, tokenizer, bos, template.adds_bos) if segmented else iter(())
        for text, (ids, labels) in zip(segmented, encoded, strict=True):
            if text.plain:
                yield from _blocks(ids, labels, block, report)
                continue
            example = _cut(ids, labels, max_length, report)
            if example is not None:
                yield example


def _rendered(
    batch: Iterable[Conversation],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    report: TokenizationReport,
    log: ProblemLog | None,
) -> Iterator[Text]:
    """The training texts of a batch. What cannot be rendered goes to ``log``, or is counted and left out without it."""
    for conversation in batch:
        try:
            texts = texts_of(conversation, template, tokenizer)
        except RowError as error:
            if log is None:
                report.refused[error.kind] += 1
            else:
                log.source, log.unit = log.source or conversation.source[0], conversation.unit
                log.add(Problem(error.kind, conversation.source[1], str(error)))
            continue
        report.split += len(texts) > 1
        yield from texts


def count_targets(labels: npt.NDArray[np.integer]) -> int:
    """Number of labels that a causal loss uses. It predicts token t + 1 from token t, so the first label is unused."""
    return int(np.count_nonzero(labels[1:] != IGNORED))


def _cut(ids: Array, labels: Array, max_length: int, report: TokenizationReport) -> Example | None:
    report.examples += 1
    report.longest = max(report.longest, len(ids))
    targets = np.flatnonzero(labels[1:] != IGNORED)
    if targets.size:
        useful = int(targets[0]) + 2
        report.shortest_useful = min(report.shortest_useful or useful, useful)
    if len(ids) > max_length:
        report.truncated += 1
        report.tokens_cut += len(ids) - max_length
        ids, labels = ids[:max_length], labels[:max_length]
    kept = count_targets(labels)
    if not kept:
        report.dropped += 1
        return None
    report.kept += 1
    report.tokens += len(ids)
    report.targets += kept
    return {"input_ids": ids, "labels": labels}


def _blocks(ids: Array, labels: Array, size: int, report: TokenizationReport) -> Iterator[Example]:
    """Plain text as blocks of at most ``size`` tokens, each of which begins with the last token of the one before."""
    report.documents += 1
    report.longest = max(report.longest, len(ids))
    report.shortest_useful = report.shortest_useful or 2
    for start in range(0, max(1, len(ids) - 1), size - 1):
        part = slice(start, start + size)
        report.examples += 1
        targets = count_targets(labels[part])
        if not targets:  # a tokenizer that makes nothing of the text
            report.dropped += 1
            continue
        report.blocks += 1
        report.kept += 1
        report.tokens += len(ids[part])
        report.targets += targets
        yield {"input_ids": ids[part], "labels": labels[part]}


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer itself puts first. None if it puts none."""
    begin = tokenizer.bos_token_id
    if begin is None:
        return None
    with_special, plain = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return int(begin) if with_special[0] == begin and plain[0] != begin else None


def _encode(
    texts: list[Text], tokenizer: PreTrainedTokenizerBase, bos: int | None, adds_bos: bool
) -> Iterator[tuple[Array, Array]]:
    """Yields (ids, labels) per text, with `bos` in front unless the text already begins with it.

    `adds_bos`: whether the template leaves this to the tokenizer. Plain text always does.
    """
    encode = _encode_by_offsets if tokenizer.is_fast else _encode_by_segments
    segmented = [text.segments for text in texts]
    for (segments, plain), (ids, is_answer) in zip(texts, encode(segmented, tokenizer), strict=True):
        if bos is not None and (plain or adds_bos) and not segments[0].text.startswith(str(tokenizer.bos_token)):
            ids = np.concatenate([np.array([bos], np.int32), ids])
            is_answer = np.concatenate([np.zeros(1, bool), is_answer])
        yield ids, np.where(is_answer, ids, np.int32(IGNORED))


def _encode_by_offsets(
    segmented: list[list[Segment]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Array, npt.NDArray[np.bool_]]]:
    """Encodes whole texts at once. A token belongs to the segment of its first character."""
    texts = ["".join(segment.text for segment in segments) for segments in segmented]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    for segments, ids, offsets in zip(segmented, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
        ends = np.array(list(accumulate(len(segment.text) for segment in segments)))
        owner = np.searchsorted(ends, starts, side="right").clip(max=len(segments) - 1)
        yield np.array(ids, np.int32), np.array([segment.is_answer for segment in segments])[owner]


def _encode_by_segments(
    segmented: list[list[Segment]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Array, npt.NDArray[np.bool_]]]:
    """For tokenizers without offsets: encodes each segment together with the segment before it.

    SentencePiece puts a blank before any text, so a segment alone would give other tokens than inside the whole text.
    If the boundary is clean, the right tokens are those of (previous + segment) without those of (previous).
    """

    def pieces(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    for segments in segmented:
        ids: list[int] = []
        is_answer: list[bool] = []
        previous = ""
        for segment in segments:
            known = pieces(previous) if previous else []
            both = pieces(previous + segment.text)
            clean = both[: len(known)] == known
            # Boundary not clean: encode the segment alone, without the blank that SentencePiece would double.
            new = both[len(known) :] if clean else pieces(segment.text.removeprefix(" "))
            ids += new
            is_answer += [segment.is_answer] * len(new)
            previous = segment.text
        yield np.array(ids, np.int32), np.array(is_answer, bool)
