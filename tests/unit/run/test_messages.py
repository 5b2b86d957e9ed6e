"""What is kept off the screen: deprecations between libraries, in a file that is named. Everything else is shown."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from salient_ds.run.messages import Messages, leave_bars_to_main

LIBRARY = "/env/lib/python3.11/site-packages/torch/distributed/c10d_logger.py"


@pytest.fixture
def shown() -> Iterator[list[str]]:
    """Texts of the warnings that a user sees."""
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: found.append(str(message))  # type: ignore[assignment]
        yield found


class BuildWarning(UserWarning):
    """As setuptools has its own."""


BuildWarning.__module__ = "setuptools.warnings"


def warn(text: str, category: type[Warning], filename: str = LIBRARY) -> None:
    warnings.warn_explicit(text, category, filename, 1)


def test_what_is_hidden_and_what_is_shown(shown: list[str], tmp_path: Path) -> None:
    messages = Messages(0)
    messages.listen()
    warn("old name", FutureWarning)
    warn("old way", DeprecationWarning)
    warn("absent from `packages`", BuildWarning)
    warn("from a build tool", UserWarning, "/env/lib/python3.11/site-packages/setuptools/command/build_py.py")
    warn("real", UserWarning)
    warn("overflow", RuntimeWarning)
    warn("our own", FutureWarning, "/work/salient_ds/run/training.py")
    assert shown == ["real", "overflow", "our own"]
    assert messages.count == 4 and messages.note() is None
    messages.keep_in(tmp_path)
    warn("later", PendingDeprecationWarning)
    text = (tmp_path / "messages" / "0.log").read_text()
    places = [text.index(part) for part in ("started as", "old name", "old way", "absent", "build tool", "later")]
    assert places == sorted(places) and LIBRARY in text and "real" not in text
    assert messages.note() == (
        f"5 warnings of one library to another, kept off the screen: {tmp_path / 'messages' / '0.log'}"
    )
    messages.close()
    warn("afterwards", FutureWarning)
    assert shown[-1] == "afterwards"


def test_a_resumed_run_goes_on_in_the_same_file(shown: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        messages = Messages(1)
        messages.keep_in(tmp_path)
        assert messages.note() is None, "nothing was hidden"
    assert (tmp_path / "messages" / "1.log").read_text().count("started as ") == 2


def test_a_folder_that_cannot_be_written_costs_the_messages_only(shown: list[str], tmp_path: Path) -> None:
    (tmp_path / "messages").write_text("in the way")
    messages = Messages(0)
    messages.listen()
    messages.keep_in(tmp_path)
    warn("lost", FutureWarning)
    messages.close()
    assert shown == []


def test_loading_bars_are_those_of_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    logging.enable_progress_bar()
    leave_bars_to_main(0)
    assert logging.is_progress_bar_enabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    try:
        leave_bars_to_main(1)
        assert not logging.is_progress_bar_enabled() and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    finally:
        logging.enable_progress_bar()
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.pop(name, None)
