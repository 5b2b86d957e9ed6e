"""Token ids, embeddings and tables of positions that do not fit together are refused before anything starts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.adapters.survey import survey
from salient_ds.check.model_files import ModelFiles, TensorInfo, inspect_model
from salient_ds.check.report import Report
from salient_ds.check.tables import check_tables, embedding_on_disk
from salient_ds.check.token_ids import token_ids, unused
from salient_ds.config.run import ModelConfig, RunConfig, parse_config
from salient_ds.models.limits import PADDED_TO, Limits, limits
from tests.support.tiny_architectures import tiny_config

WORDS = Limits(embedding="model.embed_tokens", rows=100, width=8)


def tokenizer(folder: Path, text: int = 90, added: dict[int, str] | None = None, **settings: Any) -> Path:
    """tokenizer.json and tokenizer_config.json; all added tokens are special."""
    folder.mkdir(exist_ok=True)
    tokens = [{"id": number, "content": token, "special": True} for number, token in (added or {}).items()]
    vocab = {f"piece{number}": number for number in range(text)}
    content = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run_of(folder: Path, **data: Any) -> RunConfig:
    return parse_config(
        {
            "output_dir": "out", "deepspeed": "ds.json", "model": {"path": str(folder)}, "adapter": {"rank": 2},
            "method": {"name": "lora"}, "data": {"train": "x.json", "max_length": 64, **data},
            "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
        }
    )  # fmt: skip


def checked(folder: Path, limits: Limits = WORDS, config: dict[str, Any] | None = None, **data: Any) -> Report:
    files = ModelFiles("model", directory=folder, config=config or {})
    if stored := data.pop("stored", None):
        files.tensors = {name: TensorInfo(name, "F32", shape, "model.safetensors") for name, shape in stored.items()}
    report = Report()
    check_tables(run_of(folder, **data), files, limits, report)
    return report


def test_text_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    assert checked(tokenizer(tmp_path, 100)).problems == []
    assert checked(tokenizer(tmp_path, 60)).problems == [], "a larger embedding is padding"
    (problem,) = checked(tokenizer(tmp_path, 103)).problems
    assert "has 103 tokens, model.embed_tokens of" in problem and "has 100 rows: token ids 100 to 102 would" in problem


def test_rows_on_disk_count(tmp_path: Path) -> None:
    stored = {"model.embed_tokens.weight": (95, 8)}
    first, second = checked(tokenizer(tmp_path, 98), config={"vocab_size": 100}, stored=stored).problems
    assert "model.embed_tokens.weight in model.safetensors is 95 x 8, and config.json makes it 100 x 8" in first
    assert "(vocab_size=100)" in first and "token ids 95 to 97" in second
    nested = {"text_config": {"vocab_size": 100}}
    assert "(vocab_size=100)" in checked(tmp_path, config=nested, stored=stored).problems[0]
    wide = {"language_model.model.embed_tokens.weight": (100, 16)}
    assert "is 100 x 16, and config.json makes it 100 x 8" in checked(tmp_path, stored=wide).problems[0]


def test_tokens_with_a_role_or_in_the_template(tmp_path: Path) -> None:
    added = {98: "<s>", 99: "</s>", 100: "<image>", 101: "<end>"}
    report = checked(tokenizer(tmp_path, 90, added, eos_token="<end>"))
    (problem,) = report.problems
    assert "token id 101 (<end>) would have none" in problem
    report = checked(tokenizer(tmp_path, 90, added, eos_token={"content": "</s>"}))
    assert report.problems == []
    assert "token ids 100 (<image>) to 101 of the tokenizer" in report.notes[0] and "refused when" in report.notes[0]
    template = {"chat_template": "{{ '<end>' }}", "eos_token": "</s>"}
    tokenizer(tmp_path, 90, added, **template)
    assert checked(tmp_path).problems == [], "template alpaca does not write it"
    assert "101 (<end>)" in checked(tmp_path, template="tokenizer").problems[0]


def test_a_role_without_an_id_gets_the_next_one(tmp_path: Path) -> None:
    """As when LLaMA's tokenizer is given a padding token: the embedding has no row for it."""
    folder = tokenizer(tmp_path, 100, pad_token="[PAD]")
    ids = token_ids(folder)
    assert ids is not None and ids.count == 101 and ids.added == {100: "[PAD]"} and unused(ids, None) == set()
    assert "token id 100 ([PAD]) would have none" in checked(folder).problems[0]


def test_other_tokenizer_files(tmp_path: Path, tiny_llama: Path) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_llama / "tokenizer.model")).GetPieceSize()
    found = token_ids(tiny_llama)
    assert found is not None and found.count == pieces
    assert token_ids(tmp_path) is None
    (tmp_path / "tokenizer.model").write_text("of another kind")
    assert token_ids(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\nb\nc")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 7}')
    decoder = {"added_tokens_decoder": {"9": {"content": "<y>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder))
    found = token_ids(tmp_path)
    assert found is not None and (found.text, found.added, found.rare) == (3, {9: "<y>", 7: "<x>"}, {9})
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    found = token_ids(tmp_path)
    assert found is not None and found.text == 2
    unigram = {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    found = token_ids(tmp_path)
    assert found is not None and found.text == 2


@pytest.mark.parametrize(
    ("names", "module", "expected"),
    [
        (["model.embed_tokens.weight"], "model.embed_tokens", 0),
        (["language_model.model.embed_tokens.weight"], "model.language_model.embed_tokens", 0),
        (["a.embed_tokens.weight", "b.embed_tokens.weight"], "c.embed_tokens", None),
        (["transformer.wte.weight", "transformer.wpe.weight"], "", 0),
        (["model.layers.0.weight"], "", None),
        (["xembed_tokens.weight"], "", None),
    ],
)
def test_the_embedding_on_disk(names: list[str], module: str, expected: int | None) -> None:
    tensors = {name: TensorInfo(name, "F32", (4, 2), "f") for name in names}
    found = embedding_on_disk(tensors, module)
    assert (found.name if found else None) == (names[expected] if expected is not None else None)


def test_positions(tmp_path: Path) -> None:
    table = Limits(positions="model.decoder.embed_positions", longest=64)
    assert checked(tmp_path, table, config={"max_position_embeddings": 64}).problems == []
    report = checked(tmp_path, table, {"max_position_embeddings": 64}, max_length=65)
    (problem,) = report.problems
    assert "data.max_length=65" in problem and "a table of 64 (model.decoder.embed_positions)" in problem
    assert problem.endswith("set data.max_length to 64 or less") and report.notes == []
    rotary = checked(tmp_path, WORDS, {"max_position_embeddings": 60})
    assert rotary.problems == [] and "above the 60 positions the model was made for" in rotary.notes[0]


def test_batches_are_padded_to_a_multiple() -> None:
    from salient_ds.data.collate import Collator

    assert inspect.signature(Collator).parameters["pad_to_multiple_of"].default == PADDED_TO
    assert Limits(positions="wpe", longest=63).position_problem(56) is None
    problem = Limits(positions="wpe", longest=63).position_problem(57)
    assert problem is not None and "padded to a multiple of 8" in problem and "to 56 or less" in problem


@pytest.mark.parametrize(
    "kind", ["opt", "gpt2", "gpt_neo", "bert", "roberta", "bart", "gptj", "ctrl", "mpt", "prophetnet"]
)
def test_lookups_fail_exactly_from_there_on(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = limits(model, survey(model).towers)
    assert found.rows == 96 and 0 < found.longest <= 64 and found.positions
    with torch.device("meta"):
        assert limits(AutoModelForCausalLM.from_config(config)) == found
    tokens = torch.randint(5, 96, (1, found.longest + 1))
    with torch.no_grad():
        model(input_ids=tokens[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)


def test_models_without_a_table() -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "bloom", "mamba", "gemma3"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(kind))
        assert limits(model, survey(model).towers).positions == ""
    found = limits(torch.nn.Linear(2, 2))
    assert found == Limits() and found.token_problem(10**9, "data") is None


def test_a_real_checkpoint_fits(tiny_llama: Path) -> None:
    files, report = inspect_model(ModelConfig(path=str(tiny_llama))), Report()
    check_tables(run_of(tiny_llama), files, Limits("model.embed_tokens", 192, 32), report)
    assert report.problems == [] and report.notes == []
