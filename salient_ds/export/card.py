"""README.md of an exported adapter: what it is, how it was made, how to load it. It is the model card on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salient_ds.export.forms import VLLM_RANKS
from salient_ds.export.meta import ExportMeta

CARD_FILE, PICTURE_FILE = "README.md", "ranks.png"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "QUESTION_ANS": "question-answering",
}
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def write_card(folder: Path, meta: ExportMeta, form: str, base_name: str, ranks: Mapping[str, int], rank: int) -> None:
    """Write ``README.md`` into the folder of an adapter (:func:`card_text`)."""
    text = card_text(meta, form, base_name, ranks, rank, (folder / PICTURE_FILE).is_file())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def card_text(
    meta: ExportMeta, form: str, base_name: str, ranks: Mapping[str, int], rank: int, picture: bool = False
) -> str:
    """The card.

    Args:
        ranks: module -> rank, 0 included.
        rank: of the file: the largest, or that which all are padded to.
        picture: whether ``ranks.png`` lies beside it.

    ``meta.card`` may hold tables of facts, title -> (key -> value), such as {"Data": {"train": "alpaca.json"}}.
    """
    total, live = sum(ranks.values()), [value for value in ranks.values() if value]
    parts = [
        _front_matter(meta, base_name),
        f"# LoRA adapter for {_shown(base_name)}",
        f"Trained with [salient_ds](https://pypi.org/project/salient-ds/), method `{meta.method}`: the ranks "
        f"were decided during training. {len(live)} of {len(ranks)} matrices have an update, of rank {min(live)} to "
        f"{max(live)}, {total} in all; the file has the {form} form (`r` = {rank}). `salient_ds.json` lists all ranks.",
    ]
    if picture:
        parts.append(f"![rank of every matrix]({PICTURE_FILE})")
    for title, facts in (meta.card or {}).items():
        parts += [f"## {title}", _table(facts)]
    parts += ["## Load it", _loading(meta, form, base_name, rank)]
    return "\n\n".join(parts) + "\n"


def _front_matter(meta: ExportMeta, base_name: str) -> str:
    lines = ["library_name: peft"]
    if not Path(base_name).is_absolute():  # the hub knows no folders
        lines.append(f"base_model: {base_name}")
    if meta.task_type in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[meta.task_type]}")
    lines += ["tags:", "- lora", "- salient_ds", f"- {meta.method}"]
    return "\n".join(["---", *lines, "---"])


def _shown(base_name: str) -> str:
    return Path(base_name).name if Path(base_name).is_absolute() else base_name


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _loading(meta: ExportMeta, form: str, base_name: str, rank: int) -> str:
    if form == "gguf":
        return (
            "```sh\nllama-server -m base.gguf --lora adapter.gguf\n```\n\n"
            f"`base.gguf` is {base_name}, converted with `convert_hf_to_gguf.py` of llama.cpp."
        )
    revision = meta.revision_of(base_name)
    pinned = f', revision="{revision}"' if revision else ""
    kind = _CLASSES[meta.task_type]
    blocks = [
        "PEFT (`ADAPTER` is this folder, or its name on the hub):",
        f"```python\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base_name}"{pinned})\n'
        'model = PeftModel.from_pretrained(base, "ADAPTER")\n```',
        "transformers (with PEFT installed):",
        f'```python\nmodel = {kind}.from_pretrained("{base_name}"{pinned})\nmodel.load_adapter("ADAPTER")\n```',
    ]
    if meta.task_type != "CAUSAL_LM":
        return "\n\n".join(blocks)
    limit = next((value for value in VLLM_RANKS if value >= rank), None)
    at = f" --revision {revision}" if revision else ""
    if limit is None:
        blocks.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: export it as merged.")
    else:
        version = " 0.32 or later" if form == "ragged" else ""
        blocks += [
            f"vLLM{version}:",
            f"```sh\nvllm serve {base_name}{at} --enable-lora --max-lora-rank {limit} --lora-modules mine=ADAPTER\n```",
        ]
    if form == "padded":
        blocks += [
            "SGLang:",
            f"```sh\npython -m sglang.launch_server --model-path {base_name}{at} --lora-paths mine=ADAPTER\n```",
        ]
    blocks += [
        "llama.cpp, after `salient-ds export RUN --form gguf` or llama.cpp's `convert_lora_to_gguf.py`:",
        "```sh\nllama-server -m base.gguf --lora adapter.gguf\n```",
    ]
    return "\n\n".join(blocks)
