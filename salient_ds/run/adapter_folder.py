"""What an exported adapter's folder holds beside the weights: tokenizer, chat template, ranks as a picture, facts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.template_base import Template
from salient_ds.data.templates import get_template
from salient_ds.export.base_files import local_folder
from salient_ds.export.card import PICTURE_FILE
from salient_ds.export.fold import AdapterFactors
from salient_ds.own_files import read_object

CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "spiece.model",
    "sentencepiece*.model", "chat_template.*",
)  # fmt: skip
_SYSTEM_FIRST = "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else DEFAULT %}"
_OTHERS = "{%- for message in messages if message['role'] != 'system' %}"
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
JINJA = {
    "alpaca": _SYSTEM_FIRST.replace("DEFAULT", repr(_ALPACA)) + "{{- BOS + system + '\n\n' }}" + _OTHERS
    + "{%- if message['role'] == 'user' %}{{- '### Instruction:\n' + message['content'] + '\n\n' }}"
    + "{%- else %}{{- '### Response:' + message['content'] + eos_token + '\n\n' }}{%- endif %}{%- endfor %}"
    + "{%- if add_generation_prompt %}{{- '### Response:' }}{%- endif %}",
    "vicuna_v1.1": _SYSTEM_FIRST.replace("DEFAULT", repr(_VICUNA)) + "{{- BOS + system + ' ' }}" + _OTHERS
    + "{%- if message['role'] == 'user' %}{{- 'USER: ' + message['content'] + ' ' }}"
    + "{%- else %}{{- 'ASSISTANT: ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
    + "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}",
    "llama-2": _SYSTEM_FIRST.replace("DEFAULT", "none") + "{{- BOS }}" + _OTHERS
    + "{%- if message['role'] == 'user' %}{%- if loop.first and system is not none %}"
    + "{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    + "{%- else %}{%- set text = message['content'] %}{%- endif %}"
    + "{{- ('' if loop.first else bos_token) + '[INST] ' + text.strip() + ' [/INST]' }}"
    + "{%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}",
    "chatml": "{%- for message in messages %}"
    + "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endfor %}"
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "none": "{{- BOS }}{%- for message in messages %}{{- message['content'] }}"
    + "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}",
}  # fmt: skip
"""Template -> the same as a chat template for servers. BOS stands for the first token, where the tokenizer adds one."""
_BEGINNINGS = ("bos_token", "bos_token + ' '", "''")
"""What may stand for BOS. Some sentencepiece tokenizers put a blank before a text, but not after a special token."""
_QUESTION = Turn(USER, "Name a river.")
_SAMPLES = (
    Conversation(None, (_QUESTION,)),
    Conversation("Be brief.", (_QUESTION,)),
    Conversation(None, (_QUESTION, Turn(ASSISTANT, "The Elbe."), Turn(USER, "And a city on it?"))),
)


def complete(folder: Path, config: dict[str, Any], factors: list[AdapterFactors], base: str, title: str) -> None:
    """Add tokenizer, chat template and a picture of the ranks to an adapter that is being written.

    Args:
        config: the run's settings.
        base: directory or hub name of the base model.
        title: of the picture.
    """
    copy_tokenizer(folder, config, base)
    from salient_ds.monitor.heatmap import save_rank_png

    ranks = {item.name: item.rank for item in factors}
    save_rank_png(ranks, folder / PICTURE_FILE, title, config["adapter"]["rank"])


def copy_tokenizer(folder: Path, config: dict[str, Any], base: str) -> None:
    """Copy the tokenizer's files, with the template of training as its chat template where that can be expressed.

    Nothing is copied if the tokenizer is not on this machine. A chat template of the tokenizer that would format
    prompts otherwise than in training is left out.
    """
    model, name = config["model"], config["data"].get("template")
    own = model.get("tokenizer")
    try:
        source = local_folder(own or base, None if own or Path(base).is_dir() else model.get("revision"))
    except ValueError:
        return
    for path in sorted({path for pattern in _TOKENIZER for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if config["data"].get("task") is None and name is not None and name != "tokenizer":
        _replace_chat_template(folder, name)


def _replace_chat_template(folder: Path, name: str) -> None:
    for path in folder.glob("chat_template.*"):
        path.unlink()
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = jinja_of(name, folder)
    if text is not None:
        (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")


def jinja_of(name: str, tokenizer_folder: Path) -> str | None:
    """The chat template that gives the tokens of the template called ``name``; None if none of ours does.

    Tokens are compared on conversations with and without a system message and with several turns.
    """
    if name not in JINJA:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
        wanted = [_tokens(get_template(name), tokenizer, sample) for sample in _SAMPLES]
        for begin in _BEGINNINGS:
            text = JINJA[name].replace("BOS", begin)
            if [_tokens_of_server(text, tokenizer, sample) for sample in _SAMPLES] == wanted:
                return text
    except (OSError, ValueError, TypeError):  # the last one: a tokenizer without the token that is asked for
        return None
    return None


def _tokens(template: Template, tokenizer: Any, sample: Conversation) -> list[int]:
    text = template.prompt(sample, tokenizer)
    return list(tokenizer(text, add_special_tokens=template.adds_bos).input_ids)


def _tokens_of_server(text: str, tokenizer: Any, sample: Conversation) -> list[int]:
    found = tokenizer.apply_chat_template(
        sample.messages(), chat_template=text, add_generation_prompt=True, return_dict=False
    )
    return list(found)


def card_facts(run: Path, config: dict[str, Any], checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Tables for the model card: data, training and what was measured."""
    data, train, adapter = config["data"], config["train"], config["adapter"]
    task = data.get("task") or {}
    named = task.get("name") if isinstance(task, dict) else task
    found = {
        "Data": {"train": _shown(data.get("train")), "evaluation": _shown(data.get("eval")) or data.get("eval_size"),
                 "task": named, "template": data.get("template"), "tokens per row": data.get("max_length")},
        "Training": {"method": config["method"]["name"], "initial rank": adapter.get("rank"),
                     "alpha": adapter.get("alpha"), "step": int(checkpoint.name.rpartition("-")[2] or 0)
                     if checkpoint.name.startswith("step-") else None,
                     "learning rate": train.get("lr"), "batch": train.get("global_batch_size"),
                     "precision": train.get("precision"), "seed": train.get("seed")},
    }  # fmt: skip
    measured = _measured(run)
    return {**found, "Measured": measured} if measured else found


def _shown(source: Any) -> str | None:
    """Data by name; of a local file, the name alone. Of several sets, each with its weight."""
    if source is None:
        return None
    if isinstance(source, list):
        return ", ".join(f"{_shown(one['path'])} (weight {one['weight']:g})" for one in source)
    return Path(str(source)).name if Path(str(source)).exists() else str(source)


def _measured(run: Path) -> dict[str, Any]:
    try:
        facts = read_object(run / "summary.json")
    except (OSError, ValueError):
        return {}
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= {f"{key} {name}": item for name, item in value.items() if isinstance(item, (int, float, str))}
        elif isinstance(value, (int, float, str)):
            flat[key] = value
    return flat
