"""The reply cache: nothing lost, one writer, a torn tail is no damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mt_bench_helpers import endpoint
from salient_eval.mt_bench.cache import ReplyCache, request_key
from salient_eval.mt_bench.verdicts import Reply


def test_replies_come_back_and_later_ones_replace(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with ReplyCache(path) as cache:
        cache.put("k1", Reply("one\u2028line", model="m", attempts=2))
        cache.put("k2", Reply(None, finish_reason="content_filter"))
        cache.put("k1", Reply("two"))
    with ReplyCache(path) as cache:
        assert len(cache) == 2
        found = cache.get("k1")
        assert found is not None and found[0] == Reply("two")
        assert cache.get("k2")[0].text is None  # type: ignore[index]
        assert cache.get("k3") is None
    assert len(path.read_text().split("\n")) == 4


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.jsonl"
    with ReplyCache(path) as cache:
        cache.put("k1", Reply("one"))
        cache.put("k2", Reply("two"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with ReplyCache(path) as cache:
        assert "k1" in cache and "k2" not in cache and cache.torn_bytes > 0
        cache.put("k2", Reply("again"))
    with ReplyCache(path) as cache:
        assert cache.torn_bytes == 0 and cache.get("k2")[0].text == "again"  # type: ignore[index]


def test_damage_in_the_middle_is_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with ReplyCache(path) as cache:
        cache.put("k1", Reply("one"))
    with open(path, "ab") as file:
        file.write(b'{"key": "k9"}\n\xff\xfe\n')
    with ReplyCache(path) as cache:
        cache.put("k2", Reply("two"))
    with ReplyCache(path) as cache:
        assert cache.damaged_lines == 2 and {k for k in ("k1", "k2", "k9") if k in cache} == {"k1", "k2"}


def test_every_put_is_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd))[1])
    with ReplyCache(tmp_path / "c.jsonl") as cache:
        cache.put("k1", Reply("one"))
        assert len(synced) == 1
        assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 1


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with ReplyCache(path) as cache:
        threads = [
            threading.Thread(target=lambda n=n: [cache.put(f"k{n}-{i}", Reply("x" * 500)) for i in range(20)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 160


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+b'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another judging run"):
            ReplyCache(path)
        other.kill()
    ReplyCache(path).close()


def test_the_key_depends_on_everything_that_can_change_the_answer() -> None:
    base = endpoint("http://127.0.0.1:1/v1")
    messages = [{"role": "user", "content": "u"}]
    keys = [
        request_key(base, messages),
        request_key(base, [{"role": "user", "content": "v"}]),
        request_key(base, messages, repeat=1),
        request_key(endpoint("http://127.0.0.1:1/v1", model="other"), messages),
        request_key(endpoint("http://127.0.0.1:2/v1"), messages),
        request_key(endpoint("http://127.0.0.1:1/v1", temperature=1.0), messages),
        request_key(endpoint("http://127.0.0.1:1/v1", max_tokens=9), messages),
    ]
    assert len(set(keys)) == len(keys)
    assert request_key(endpoint("http://127.0.0.1:1/v1", timeout_s=9.0, max_attempts=1), messages) == keys[0]


@pytest.mark.parametrize(
    "line",
    [
        "null", "[]", "7", '"text"', "{}", '{"key": "k", "tstamp": 0}',
        '{"key": 1, "tstamp": 0, "reply": {"text": "x"}}',
        '{"key": "k", "tstamp": 0, "reply": []}', '{"key": "k", "tstamp": 0, "reply": "text"}',
        '{"key": "k", "tstamp": "x", "reply": {"text": "x"}}', '{"key": "k", "tstamp": null, "reply": {"text": "x"}}',
        '{"key": "k", "tstamp": 0, "reply": {"text": 5}}', "[" * 50_000, "9" * 5000,
        '{"key": "k", "tstamp": 0, "reply": {"text": "x", "prompt_tokens": "many"}}',
    ],
)  # fmt: skip
def test_a_line_of_wrong_types_is_skipped_and_counted(line: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    with ReplyCache(path) as cache:
        assert len(cache) == 0 and cache.damaged_lines == 1
        cache.put("k", Reply("good"))
        assert (stored := cache.get("k")) is not None and stored[0].text == "good"
