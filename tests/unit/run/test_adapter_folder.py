"""Tokenizer, chat template and picture of an exported adapter; facts of its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.templates import get_template
from salient_ds.export.fold import AdapterFactors
from salient_ds.run.adapter_folder import JINJA, card_facts, complete
from tests.support.tiny import train_sentencepiece


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train_sentencepiece(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def config_of(base: Path, template: str, **data: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "tokenizer": None, "revision": None},
        "data": {"train": "tatsu/alpaca", "template": template, **data},
        "adapter": {"rank": 4, "alpha": 8},
        "method": {"name": "salientlora"},
        "train": {"lr": 1e-3},
    }


FACTORS = [AdapterFactors("model.layers.0.q_proj", torch.ones(2, 3), None, torch.ones(3, 2), torch.ones(2).bool(), 1.0)]


@pytest.mark.parametrize("name", sorted(JINJA))
def test_servers_format_prompts_as_training_did(base: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    complete(tmp_path, config_of(base, name), FACTORS, str(base), "Ranks")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja", "ranks.png", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    turns = [Turn(USER, "red stone?"), Turn(ASSISTANT, "blue."), Turn(USER, "And {{ x }}?"), Turn(ASSISTANT, "no")]
    for system in (None, "Be brief."):
        for length in (1, 3):
            conversation = Conversation(system, tuple(turns[:length]))
            text = get_template(name).prompt(conversation, tokenizer)
            wanted = tokenizer(text, add_special_tokens=get_template(name).adds_bos).input_ids
            found = tokenizer.apply_chat_template(
                conversation.messages(), add_generation_prompt=True, return_dict=False
            )
            assert found == wanted


def test_the_tokenizers_own_template_is_kept_and_others_are_not_passed_off(base: Path, tmp_path: Path) -> None:
    for name, kept in (("tokenizer", "{{ messages }}"), ("fastchat:zero_shot", None)):
        folder = tmp_path / name
        folder.mkdir()
        complete(folder, config_of(base, name), FACTORS, str(base), "Ranks")
        assert json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template") == kept
        assert not (folder / "chat_template.jinja").exists()


def test_a_tokenizer_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    complete(tmp_path, config_of(Path("no/such-model"), "alpaca"), FACTORS, "no/such-model", "Ranks")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.png"]


def test_facts_of_the_card(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("[]")
    config = config_of(base, "alpaca", eval=str(tmp_path / "mine.json"))
    facts = card_facts(tmp_path, config, tmp_path / "checkpoints" / "step-00000160")
    assert facts["Data"]["train"] == "tatsu/alpaca" and facts["Data"]["evaluation"] == "mine.json"
    assert facts["Training"]["step"] == 160 and "Measured" not in facts
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 160, "evaluation": {"loss": 0.5}, "best": None}))
    assert card_facts(tmp_path, config, tmp_path)["Measured"] == {"steps": 160, "evaluation loss": 0.5}
