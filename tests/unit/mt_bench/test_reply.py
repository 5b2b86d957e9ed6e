"""One function decides what a reply is: its end, its text, its thought, a refusal."""

from __future__ import annotations

import pytest
from salient_eval.mt_bench.completion import to_reply
from salient_eval.mt_bench.parsers import read_rating
from salient_eval.mt_bench.reply import clean_text, outcome_of, split_thought
from salient_eval.mt_bench.verdicts import Reply

VERDICT = "Clear. Rating: [[8]]"


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply("<think>maybe [[9]]", finish_reason="length"), "unparsed"),
        (Reply("<think>maybe [[9]]", finish_reason="stop"), "unparsed"),
        (Reply("A first guess is Rating: [[9]]. But", finish_reason="length"), "unparsed"),
        (Reply("first [[9]], but", finish_reason="content_filter"), "unparsed"),
        (Reply("<think>maybe [[9]]</think>I cannot decide.", finish_reason="stop"), "unparsed"),
        (Reply("<think>maybe [[9]]</think>Rating: [[3]]", finish_reason="stop"), "graded"),
        (Reply("maybe [[9]]</think>Rating: [[3]]", finish_reason="stop"), "graded"),
        (Reply(None, thought="maybe [[9]]", finish_reason="length"), "failed"),
    ],
)
def test_a_number_within_a_thought_is_no_verdict(reply: Reply, status: str) -> None:
    verdict = read_rating(reply)
    assert verdict.status == status and verdict.value in (None, 3.0)


@pytest.mark.parametrize(
    ("message", "text", "reason"),
    [
        ({"content": [{"type": "text", "text": VERDICT}]}, VERDICT, ""),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "[[2]]"}]}, VERDICT]}, VERDICT, ""),
        ({"content": None, "refusal": "I cannot help."}, "", "refused: I cannot help."),
        ({"content": None, "tool_calls": [{"function": {"name": "rate"}}]}, "", "tool 'rate'"),
        ({"reasoning_content": VERDICT}, "", "only a thought"),
        ({"content": ""}, "", "no content"),
        ({"content": 7, "reasoning": [1], "refusal": {}, "tool_calls": "x"}, "", "no content"),
        ({"content": [[[None]], 3, {"type": 4, "text": []}]}, "", "no content"),
    ],
)
def test_every_shape_of_a_message_is_read(message: dict[str, object], text: str, reason: str) -> None:
    outcome = outcome_of(to_reply({"choices": [{"message": message, "finish_reason": "stop"}]}, 0.0, 1))
    assert outcome.text == text and reason in outcome.reason and bool(outcome.reason) == bool(reason)


@pytest.mark.parametrize(
    ("finish", "ended"),
    [("stop", "ok"), (None, "ok"), ("end_turn", "ok"), ("length", "truncated"), ("model_length", "truncated"),
     ("MAX_TOKENS", "truncated"), ("error", "broken"), ("tool_calls", "broken"), ("brand_new", "broken"),
     (5, "broken")],
)  # fmt: skip
def test_an_unknown_end_is_not_good(finish: object, ended: str) -> None:
    reply = to_reply({"choices": [{"message": {"content": "Half"}, "finish_reason": finish}]}, 0.0, 1)
    assert outcome_of(reply).ended == ended


def test_tags_that_the_text_is_about_stay() -> None:
    for text in ("Write `</think>` at the end.", "Use <think>x</think> here."):
        assert split_thought(text) == (text, "", True)


def test_text_that_no_file_can_hold_is_cleaned_and_counted() -> None:
    assert clean_text("a\ud83d b\x00") == ("a\ufffd b\ufffd", 2)
    assert clean_text("\ud83d\ude00") == ("\U0001f600", 0)
    reply = to_reply({"choices": [{"message": {"content": "x\ud83d"}}]}, 0.0, 1)
    assert (reply.text, reply.cleaned) == ("x\ufffd", 1)
