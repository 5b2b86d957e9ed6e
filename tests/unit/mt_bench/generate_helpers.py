"""A tiny LLaMA that ends some of its answers, an adapter exported for it, and the command run in-process or forked."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.store import Row
from typer.testing import CliRunner

from salient_ds.data.record import template_record
from salient_ds.data.templates import get_template
from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from tests.support.spawn import free_port
from tests.support.tiny import make_llama

NEW_TOKENS = 24
SCALING = 2.0


def make_answering_llama(folder: Path, window: int) -> Path:
    """Random weights with a louder end token, so that some answers end, some are empty and some run on."""
    from transformers import LlamaForCausalLM

    make_llama(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[2] *= 3
    model.config.max_position_embeddings = window
    model.save_pretrained(folder)
    return folder


def random_factors(base: Path) -> list[AdapterFactors]:
    """Uneven ranks 0 to 3, large enough to change every answer."""
    from transformers import LlamaForCausalLM

    draw = torch.Generator().manual_seed(1)
    found = []
    for name, layer in LlamaForCausalLM.from_pretrained(base).named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("v_proj", "o_proj", "gate_proj", "down_proj")):
            A = torch.randn(4, layer.in_features, generator=draw) * 0.3
            B = torch.randn(layer.out_features, 4, generator=draw) * 0.15
            mask = torch.arange(4) < len(found) % 4
            found.append(AdapterFactors(name, A, torch.randn(4, generator=draw), B, mask, SCALING))
    return found


def record_of(base: Path, template: str = "alpaca") -> dict[str, str]:
    from transformers import AutoTokenizer

    return template_record(get_template(template), AutoTokenizer.from_pretrained(base)).to_dict()


def export(base: Path, target: Path, form: Any = "peft", template: str = "alpaca") -> Path:
    """What training would have exported."""
    meta = ExportMeta("salientlora", "CAUSAL_LM", "run", record_of(base, template))
    return export_adapter(random_factors(base), meta, target, form, base)


def generate(data: Path, *arguments: str, fails: bool = False, tokens: int = NEW_TOKENS) -> str:
    """The command on our own questions; its output."""
    command = ["generate", *map(str, arguments), "--data", str(data), "--questions", "own"]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", str(tokens)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def rows_of(data: Path, model_id: str) -> list[Row]:
    """The answer file without what differs between two equal runs."""
    path = data / "salient_own" / "model_answer" / f"{model_id}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert isinstance(row.pop("tstamp"), float)
    return rows


def answers_of(data: Path, model_id: str) -> list[Any]:
    """Texts, statuses, reasons and token counts only: comparable between models' files."""
    keys = ("question_id", "choices", "statuses", "reasons", "tokens")
    return [[row[key] for key in keys] for row in rows_of(data, model_id)]


def forked(functions: list[Callable[[], None]], timeout: float = 120) -> list[int]:
    """Run each function in a forked process, as ranks of one launcher run if there are several; their exit codes."""
    context = multiprocessing.get_context("fork")
    port = free_port()

    def child(global_rank: int, function: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        if len(functions) > 1:
            os.environ.update(RANK=str(global_rank), WORLD_SIZE=str(len(functions)), LOCAL_RANK=str(global_rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        function()
        os._exit(0)  # without the parent's exit handlers

    processes = [context.Process(target=child, args=item) for item in enumerate(functions)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    return [process.exitcode if process.exitcode is not None else -signal.SIGKILL - 1000 for process in processes]
