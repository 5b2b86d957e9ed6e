"""Several processes tokenise: the same examples, counts and problems as one, and no process is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data import token_processes
from salient_ds.data.conversation import ASSISTANT, USER, Conversation, DataError, Turn
from salient_ds.data.dataset import build_dataset
from salient_ds.data.template_base import NAMES
from salient_ds.data.templates import ALPACA_REGISTERED, get_template
from salient_ds.data.token_processes import CannotStart, WorkerDied, Workers, useful
from salient_ds.data.token_report import TokenizationReport
from salient_ds.data.token_worker import serve


class InThread:
    """What a process does, in a thread of this one: a process takes seconds to start."""

    pid = 0

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[-1] == "salient_ds.data.token_worker"
        (asked, stdin), (stdout, answers) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        self._thread = threading.Thread(target=serve, args=(os.fdopen(asked, "rb"), os.fdopen(answers, "wb")))
        self._thread.start()

    def terminate(self) -> None:
        """Its input has been closed."""

    def wait(self) -> int:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return 0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(token_processes, "CHUNK", 7)
    if "slow" not in request.keywords:
        monkeypatch.setattr(token_processes.subprocess, "Popen", InThread)


def talk(number: int, **more: Any) -> Conversation:
    turns = (Turn(USER, f"Name river {number}. " * (1 + number % 5)), Turn(ASSISTANT, f"The Elbe, {number}."))
    return Conversation(None, turns, source=("a.jsonl", number), **more)


def rows(count: int) -> list[Conversation]:
    """Some of them plain text, some too long."""
    texts = [Conversation(None, (Turn(ASSISTANT, "a river " * 120),), plain=True, source=("a.jsonl", 1))]
    return [*map(talk, range(1, count)), *texts, *map(talk, range(count, count + 3))]


@pytest.mark.parametrize("packing", [False, True])
def test_examples_and_counts_are_those_of_one_process(llama: Any, packing: bool) -> None:
    template = get_template("vicuna_v1.1")
    one, counts = build_dataset(rows(40), template, llama, 150, packing)
    many, same = build_dataset(rows(40), template, llama, 150, packing, workers=3)
    assert many.fingerprint() == one.fingerprint() and asdict(same) == asdict(counts)
    assert counts.truncated and counts.blocks > 1 and len(one) > 7


def test_problems_are_collected_in_the_order_of_the_rows(llama: Any) -> None:
    bad = [talk(k, tools=[{"name": "x"}]) if k % 3 == 0 else talk(k) for k in range(1, 60)]
    said = []
    for workers in (1, 2):
        with pytest.raises(DataError) as caught:
            build_dataset(bad, get_template("alpaca"), llama, 512, workers=workers)
        said.append(str(caught.value))
    assert said[0] == said[1] and "19 problems" in said[0] and "... and 9 more" in said[0]
    found, report = build_dataset(bad, get_template("alpaca"), llama, 512, bad_rows="skip", workers=2)
    assert report.refused == {"tools": 19} and len(found) == 40


def test_what_a_process_raises_is_raised_here(chatml: Any) -> None:
    chatml.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        build_dataset(rows(3), get_template("alpaca"), chatml, 64, workers=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_sent_to_another_process_says_what_it_needs(name: str) -> None:
    """A fresh process has FastChat's registry without our entries."""
    from fastchat import conversation as fastchat

    sent = pickle.dumps(get_template(name))
    ours = fastchat.conv_templates.pop(ALPACA_REGISTERED)
    try:
        template = pickle.loads(sent)
        assert template.name == name and (name == "tokenizer" or template.text(talk(1)))
    finally:
        fastchat.conv_templates[ALPACA_REGISTERED] = ours


def test_no_process_is_started_that_gets_nothing() -> None:
    assert [useful(3, rows) for rows in (0, 1, 7, 8, 15, 100)] == [1, 1, 1, 2, 3, 3] and useful(1, 100) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca", "tokenizer"])
def test_processes_give_the_same_rows(chatml: Any, name: str) -> None:
    one = build_dataset(rows(40), get_template(name), chatml, 150)[0]
    assert build_dataset(rows(40), get_template(name), chatml, 150, workers=2)[0].fingerprint() == one.fingerprint()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_none_is_left(llama: Any) -> None:
    workers = Workers(2, get_template("alpaca"), llama, 512, False, 512)
    pids = [process.pid for process in workers._processes]
    found = workers.tokenized([talk(k) for k in range(60)], TokenizationReport(512), None)
    next(found)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=f"process {pids[1]}.*code -9.*data.workers=1"):
        list(found)
    workers.close()
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(llama: Any) -> None:
    """Their input ends then, as when it is killed."""
    workers = Workers(1, get_template("alpaca"), llama, 512, False, 512)
    (process,) = workers._processes
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    workers.close()


def test_a_tokenizer_that_cannot_be_sent_is_used_in_this_process(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = get_template("chatml")
    template.note = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(CannotStart):
        Workers(2, template, llama, 512, False, 512)
    found, _ = build_dataset(rows(9), template, llama, 512, workers=2)
    assert found.fingerprint() == build_dataset(rows(9), get_template("chatml"), llama, 512)[0].fingerprint()
