"""``salient-ds templates``: every template with a sample that shows what is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.data.template_base import NAMES
from salient_ds.data.templates import get_template, known_templates
from salient_ds.guide.templates import samples


def test_every_template_has_a_sample(tiny_llama: Path) -> None:
    done = CliRunner().invoke(app, ["templates"])
    assert done.exit_code == 0 and all(f"\n{name}  " in done.output for name in NAMES)
    assert "2 + 3 =>> 5</s><<" in done.output and "give --tokenizer FOLDER" in done.output
    assert "### Input:\n    cheese" in done.output


def test_a_tokenizer_shows_its_own_template(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" \
        "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
    ((_, _, segments),) = samples("tokenizer", False, tokenizer)
    assert [part for part, trained in segments if trained] == ["The Elbe.</s>", "Dresden.</s>"]
    done = CliRunner().invoke(app, ["templates", "chatml", "--tokenizer", str(tiny_llama)])
    assert done.exit_code == 0 and ">>The Elbe.<|im_end|><<" in done.output and "alpaca" not in done.output


def test_all_are_those_that_a_run_can_use() -> None:
    found = known_templates()
    assert len(found) > 20 and found == sorted(set(found), key=found.index)
    assert all(get_template(name).name for name in found)
    assert {name for name, _, _ in samples(None, True)} == {*NAMES, *found}


@pytest.mark.parametrize(
    ("options", "said"), [(["alpacca"], "did you mean"), (["--tokenizer", "no/where"], "--tokenizer no/where")]
)
def test_what_is_not_there_is_named(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["templates", *options])
    assert done.exit_code != 0 and said in str(done.exception)
