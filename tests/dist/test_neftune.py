"""NEFTune at every ZeRO stage: the losses of a plain model that is given noisy embeddings, and none in evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine.reports import MicroBatch
from salient_ds.models.embedding_noise import noise_seed
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.dist.test_parity import TINY_PARTITIONS
from tests.support.spawn import spawn

ALPHA, STEPS = 20.0, 3
NOISY = Case(2, method={"name": "lora"}, train={"max_steps": STEPS, "neftune_alpha": ALPHA}, speed={})
QUICK = {
    "stage2": NOISY,
    "partitioned": replace(NOISY, stage=3, zero=TINY_PARTITIONS, speed={"zero3": "partitioned"}),
}  # fmt: skip
OTHERS = {"stage0": replace(NOISY, stage=0), "sharded": replace(NOISY, stage=3, zero=TINY_PARTITIONS)}


def run(global_rank: int, world_size: int, model: Path, cases: dict[str, Case]) -> dict[str, Any]:
    return {key: losses(case, global_rank, world_size, model) for key, case in cases.items()}


def losses(case: Case, global_rank: int, world_size: int, model: Path) -> dict[str, list[float]]:
    engine = scenario.build(case, model, world_size)
    trained, evaluated = [], []
    for step in range(STEPS):
        batches, targets = scenario.batches(step, global_rank, world_size)
        with torch.no_grad():  # as evaluations call it; the model is in training mode
            evaluated.append(float(engine.engine(**batches[0].inputs).loss))
        trained.append(engine.train_step(batches, targets).loss)
    engine.engine.destroy()
    return {"trained": trained, "evaluated": evaluated}


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> list[dict[str, Any]]:
    return spawn(2, run, tiny_llama, QUICK, timeout=240)


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@torch.no_grad()
def loss_of(model: Any, batch: MicroBatch, alpha: float) -> float:
    """The loss of the embeddings with noise as the paper has it."""
    words = model.get_input_embeddings()(batch.inputs["input_ids"])
    draw = torch.Generator().manual_seed(noise_seed(0, 1, batch.indices))
    bound = alpha / (words.shape[1] * words.shape[2]) ** 0.5
    noise = torch.rand(words.shape, generator=draw) * 2 * bound - bound
    return float(model(inputs_embeds=words + noise, labels=batch.inputs["labels"]).loss)


def first_step(model: Any, alpha: float) -> float:
    """Mean loss per target of the first global batch."""
    batches = [batch for process in range(2) for batch in scenario.batches(0, process, 2)[0]]
    total = sum(loss_of(model, batch, alpha) * batch.num_targets for batch in batches)
    return total / sum(batch.num_targets for batch in batches)


def compare(found: list[dict[str, Any]], model: Any) -> None:
    noisy, quiet = first_step(model, ALPHA), first_step(model, 0.0)
    assert noisy != pytest.approx(quiet, rel=1e-3)
    for global_rank, process in enumerate(found):
        alone = loss_of(model, scenario.batches(0, global_rank, 2)[0][0], 0.0)
        for key, values in process.items():
            assert values["trained"][0] == pytest.approx(noisy, rel=1e-5), key
            assert values["evaluated"][0] == pytest.approx(alone, rel=1e-5), f"{key}: no noise outside of training"


def test_the_first_loss_is_that_of_noisy_embeddings(two: list[dict[str, Any]], plain: Any) -> None:
    compare(two, plain)


def test_stages_train_alike(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["partitioned"]["trained"] == pytest.approx(found["stage2"]["trained"], rel=2e-5)


@pytest.mark.slow
def test_other_stages_train_alike(two: list[dict[str, Any]], plain: Any, tiny_llama: Path) -> None:
    others = spawn(2, run, tiny_llama, OTHERS, timeout=240)
    compare(others, plain)
    for mine, theirs in zip(others, two, strict=True):
        for key in OTHERS:
            assert mine[key]["trained"] == pytest.approx(theirs["stage2"]["trained"], rel=2e-5), key
