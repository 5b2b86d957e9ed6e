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
