"""Fixtures of the whole suite: a tiny LLaMA checkpoint and instruction data, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("SALIENT_TEST_GPU") else "cuda")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.support.tiny import make_llama, write_alpaca  # noqa: E402


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a 2-layer LLaMA with a sentencepiece tokenizer."""
    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 Alpaca rows."""
    return write_alpaca(tmp_path_factory.mktemp("data") / "alpaca.json", 64)


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of tokenised data of this test session, for processes that tests start, too."""
    place = tmp_path_factory.mktemp("cache")
    os.environ["SALIENT_DS_CACHE"] = str(place)
    return place
