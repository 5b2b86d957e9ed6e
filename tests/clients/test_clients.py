"""Our adapters in other people's clients, each in an environment of its own. `pytest -m clients` (minutes, an index).

Tolerances are for log probabilities in float32. docs/clients.md has the numbers that were measured.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import COUNT, Served, make, to_gguf
from tests.clients.environments import ask, python_of

pytestmark = pytest.mark.clients
TOLERANCE = 2e-3


@pytest.fixture
def noted(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Print one line of the table."""

    def note(version: str, form: str, difference: float) -> None:
        record_property(f"{version} {form}", difference)
        print(f"\n{version} | {form} | {difference:.1e}")

    return note


@pytest.mark.parametrize("form", ["ragged", "padded"])
@pytest.mark.parametrize("client", ["peft", "transformers", "peft_0.13"])
def test_peft_and_transformers(served: Served, tmp_path: Path, client: str, form: str, noted: Any) -> None:
    python = python_of("peft_0.13") if client == "peft_0.13" else Path(sys.executable)
    job = served.job(form, load_adapter=client == "transformers")
    found = ask(client, "peft_reader", job, tmp_path, python)
    noted(found["version"], form, served.assert_right(found, TOLERANCE))
    assert found["lost"] == []
    if "merged_logprobs" in found:
        assert served.difference(found["merged_logprobs"]) < TOLERANCE


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_vllm(served: Served, tmp_path: Path, form: str, noted: Any) -> None:
    found = ask("vllm", "vllm_reader", served.job(form), tmp_path)
    noted(found["version"], form, served.assert_right(found, TOLERANCE))


def test_vllm_server(served: Served, tmp_path: Path, noted: Any) -> None:
    """Its OpenAI server, with both forms at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = python_of("vllm")
    adapters = [f"{form}={served.forms[form]}" for form in ("ragged", "padded")]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.base),
               "--enable-lora", "--max-lora-rank", "8",
               "--lora-modules", *adapters, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LD_PRELOAD")}
    settings = clean | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                        "LD_PRELOAD": str(python.parent.parent / "lib" / "libiomp5.so")}  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=settings)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, tmp_path / "log")
            for form in ("ragged", "padded"):
                logprobs, answers = [], []
                for prompt in served.prompts:
                    answer = _complete(url, form, prompt, COUNT, return_token_ids=True, ignore_eos=True, logprobs=0)
                    answers.append(answer["token_ids"])
                    logprobs.append(answer["logprobs"]["token_logprobs"])
                found = {"logprobs": logprobs, "answers": answers}
                noted("vLLM's OpenAI server", form, served.assert_right(found, TOLERANCE))
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def _complete(url: str, model: str, prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
    asked = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, **more}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_lm_eval(served: Served, tmp_path: Path, form: str, noted: Any) -> None:
    found = ask("lm_eval", "lm_eval_reader", served.job(form), tmp_path)
    wanted = [sum(values[-COUNT:]) for values in served.logprobs]
    difference = max(abs(a - b) for a, b in zip(wanted, found["sums"], strict=True))
    noted(f"{found['version']} (sums of {COUNT})", form, difference)
    assert difference < COUNT * TOLERANCE and all(found["greedy"])


@pytest.fixture(scope="session")
def base_gguf(served: Served) -> Path:
    """The LLaMA as GGUF."""
    return to_gguf(served.base, served.base.parent / "base.gguf")


def test_llama_cpp(served: Served, base_gguf: Path, tmp_path: Path, noted: Any) -> None:
    """Our own GGUF, and those that llama.cpp's converter makes of the PEFT forms."""
    gguf = {"gguf": served.forms["gguf"] / "adapter.gguf"}
    for form in ("ragged", "padded"):
        gguf[f"{form}, converted by llama.cpp"] = _converted(served, form, tmp_path)
    for form, path in gguf.items():
        job = served.job("gguf") | {"base": str(base_gguf), "adapter": str(path)}
        found = ask("llama_cpp", "llama_cpp_reader", job, tmp_path)
        noted(found["version"], form, served.assert_right(found, TOLERANCE))


def test_an_alpha_pattern_is_what_llama_cpp_reads_wrong(served: Served, base_gguf: Path, tmp_path: Path) -> None:
    """The test would see it: the form of before 2026-11-26, scale 1 by an alpha_pattern."""
    from safetensors.torch import load_file, save_file

    old = tmp_path / "old"
    shutil.copytree(served.forms["ragged"], old)
    config, stored = json.loads((old / "adapter_config.json").read_text()), load_file(old / "adapter_model.safetensors")
    for key in [key for key in stored if key.endswith("lora_B.weight")]:
        stored[key] *= config["lora_alpha"] / stored[key].shape[1]
    save_file(stored, old / "adapter_model.safetensors", metadata={"format": "pt"})
    (old / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": config["rank_pattern"]}))
    served.forms["old"] = old
    job = served.job("old") | {"base": str(base_gguf), "adapter": str(_converted(served, "old", tmp_path))}
    assert served.difference(ask("llama_cpp", "llama_cpp_reader", job, tmp_path)["logprobs"]) > 0.1


def _converted(served: Served, form: str, tmp_path: Path) -> Path:
    from tests.clients.environments import converter

    target = tmp_path / f"{form}.gguf"
    command = [sys.executable, str(converter() / "convert_lora_to_gguf.py"), "--base", str(served.base), "--outfile",
               str(target), str(served.forms[form])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


FAMILIES = ["mistral", "qwen2", "qwen3", "granite", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3",
            "starcoder2"]  # fmt: skip


def test_all_families_are_compared() -> None:
    from salient_ds.export.gguf_format import FAMILIES as known

    assert {"llama", *FAMILIES} == set(known)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_llama_cpp(tmp_path: Path, family: str, noted: Any) -> None:
    served = make(tmp_path / "served", family, ("gguf",))
    job = served.job("gguf") | {"base": str(to_gguf(served.base, tmp_path / "base.gguf")),
                                "adapter": str(served.forms["gguf"] / "adapter.gguf")}  # fmt: skip
    found = ask("llama_cpp", "llama_cpp_reader", job, tmp_path)
    noted(found["version"], f"gguf, {family}", served.assert_right(found, TOLERANCE))
