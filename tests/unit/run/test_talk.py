"""`salient-ds chat` and `generate`: what is said is what the model says, by the template of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.own_files import write_settings
from salient_ds.run.places import unreachable
from salient_ds.run.talk import TalkOptions, _before_stop, chat
from tests.support.tiny import make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("talk") / "base")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """Both attention projections are changed a lot."""
    draw = torch.Generator().manual_seed(3)
    names = [f"model.layers.{k}.mlp.down_proj" for k in range(2)]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    factors = []
    for name in names:
        tall, wide = loaded.get_submodule(name).weight.shape
        A, B = torch.randn(3, wide, generator=draw), torch.randn(tall, 3, generator=draw)
        factors.append(AdapterFactors(name, A, None, B, torch.ones(3, dtype=torch.bool), 2.0))
    meta = ExportMeta("lora", "CAUSAL_LM", "run", {"name": "alpaca", "hash": ""})
    return export_adapter(factors, meta, model.parent / "adapter", "ragged", model)


def said(model: Path, adapter: Path | None, text: str, count: int) -> str:
    """The greedy answer by PEFT and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    ids = tokenizer(f"{opening}\n\n### Instruction:\n{text}\n\n### Response:", return_tensors="pt")
    out = loaded.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    answer = tokenizer.decode(out[0, ids.input_ids.shape[1] :])
    return answer.partition("</s>")[0].strip()


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*words])
    return result.exit_code, result.stdout, result.stderr


def test_generate_and_compare(model: Path, adapter: Path) -> None:
    code, out, _ = run("generate", str(adapter), "red stone", "--max-new-tokens", "8")
    assert (code, out.strip()) == (0, said(model, adapter, "red stone", 8))
    code, out, _ = run("generate", str(adapter), "red stone", "--max-new-tokens", "8", "--compare")
    bare = said(model, None, "red stone", 8)
    assert code == 0 and bare != said(model, adapter, "red stone", 8)
    assert f"[base] {bare}" in out and f"[adapter] {said(model, adapter, 'red stone', 8)}" in out


def test_a_file_of_prompts(model: Path, adapter: Path, tmp_path: Path) -> None:
    rows = ["blue river", {"prompt": "music"}, {"instruction": "Reverse the words.", "input": "red stone"},
            {"messages": [{"role": "user", "content": "garden"}]}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("generate", str(adapter), "--file", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    assert run(*command, "--max-new-tokens", "4")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0]["answer"] == said(model, adapter, "blue river", 4)
    assert [line["messages"][-1]["content"] for line in lines][1::2] == ["music", "garden"] and len(lines) == 4
    code, _, error = run(*command)
    assert code == 2 and "exists already" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('"a"\n{"x": 1}', "line 2 is neither a text nor an object"),
        ('"a"\nb', "line 2 is no JSON"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message must be the user's"),
        ('{"messages": [{"role": "user"}]}', "needs a role"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    code, _, error = run("generate", "nowhere/at/all", "--file", str(tmp_path / "in.jsonl"))
    assert code == 2 and message in error


def test_chat_remembers_and_begins_anew(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from salient_ds.run import talk

    asked: list[list[str]] = []

    def stream(talker: Any, conversation: Any, options: Any) -> Iterator[str]:
        asked.append([turn.text for turn in conversation.turns])
        yield from ("an", "swer")

    monkeypatch.setattr(talk, "stream", stream)
    lines = iter(["one", "", "two", "/new", "three", "/exit", "never"])
    assert chat(str(adapter), TalkOptions(), lambda: next(lines)) == 0
    assert asked == [["one"], ["one", "answer", "two"], ["three"]]
    assert capsys.readouterr().out == "answer\n" * 3


def test_chat_streams_the_answer(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["red stone"])
    options = TalkOptions(max_new_tokens=8, compare=True)
    assert chat(str(adapter), options, lambda: next(lines, "/exit")) == 0
    out = capsys.readouterr().out
    assert said(model, adapter, "red stone", 8) in out and said(model, None, "red stone", 8) in out
    assert out.index("[base]") < out.index("[adapter]")


def test_text_is_held_back_while_it_may_be_a_stop() -> None:
    found = list(_before_stop(iter(["ab #", "#", "x ##", "# end"]), ["### "]))
    assert "".join(found) == "ab ##x " and found[0] == "ab "
    assert "".join(_before_stop(iter(["ab #"]), ["##"])) == "ab #"


@pytest.mark.parametrize("command", ["chat", "generate", "evaluate"])
def test_a_bad_path_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "my-run").mkdir(parents=True)
    more = ("hello",) if command == "generate" else ()
    for place, message in (
        ("runs/my-rum", "there is no folder 'runs/my-rum'; did you mean 'my-run'?"),
        ("./nothing", "there is no folder './nothing'"),
        ("/no/such/place", "there is no folder '/no/such/place' (nor is there '/no/such')"),
    ):
        code, _, error = run(command, place, *more)
        assert code == (1 if command != "evaluate" else code) and code and message in " ".join(error.split()), error
        assert "hub" not in error.partition(": give")[0]


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    asked = []

    def model_info(self: Any, name: str, **settings: Any) -> None:
        asked.append((name, settings["timeout"]))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    code, _, error = run("generate", "some-run", "hello")
    assert code == 1 and asked == [("some-run", 10.0)]
    assert "there is no folder 'some-run' here" in error and "no route to host" in " ".join(error.split())


def test_what_need_not_be_asked_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import HfApi

    def model_info(self: Any, name: str, **settings: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert unreachable("some/model") is None, "without the network, the cache alone decides"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert unreachable(str(tmp_path)) is None
    assert unreachable("no/name/of/a/model") is None, "left to the loader's message"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert unreachable("some/model") is None


def test_a_run_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    settings = {"model": {"path": "x", "task": "causal-lm"}, "adapter": {}, "data": {"train": "d"}, "speed": {}}
    write_settings(tmp_path / "run.yaml", settings)
    whole = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(whole.partition("speed")[0])
    code, _, error = run("generate", str(tmp_path), "hello")
    assert code == 1 and "run.yaml is damaged (its last line, with the sha256, is missing" in " ".join(error.split())


def test_what_cannot_be_talked_to(adapter: Path, model: Path, tmp_path: Path) -> None:
    code, _, error = run("generate", str(adapter), "a", "--template", "llama-2")
    assert code == 1 and "was trained with template 'alpaca', not 'llama-2'" in error
    code, _, error = run("generate", str(model), "a")
    assert code == 1 and "give --template" in error
    code, _, error = run("generate", str(model), "a", "--template", "alpaca", "--compare")
    assert code == 1 and "leave --compare out" in error
    code, _, error = run("generate", str(tmp_path), "a")
    assert code == 1 and "is no run (run.yaml)" in error
    assert run("generate", str(adapter), "a", "--precision", "int8")[0] == 2
    assert run("generate", str(adapter))[0] == 2
