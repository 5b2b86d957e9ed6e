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
PLAIN = Case(2, method={"name": "lora"}, train={"max_steps": STEPS}, speed={})
NOISY = replace(PLAIN, train=PLAIN.train | {"neftune_alpha": ALPHA})
CASES = {
    "stage0": replace(NOISY, stage=0), "stage2": NOISY,
    "sharded": replace(NOISY, stage=3, zero=TINY_PARTITIONS),
    "partitioned": replace(NOISY, stage=3, zero=TINY_PARTITIONS, speed={"zero3": "partitioned"}),
}  # fmt: skip


def run(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"none": losses(PLAIN, global_rank, world_size, model)}
    for key, case in CASES.items():
        found[key] = losses(case, global_rank, world_size, model)
    return found


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
    return spawn(2, run, tiny_llama, timeout=240)


@pytest.mark.parametrize("key", CASES)
def test_the_first_loss_is_that_of_noisy_embeddings(two: list[dict[str, Any]], key: str, tiny_llama: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total = targets = 0.0
    for process in range(2):
        for batch in scenario.batches(0, process, 2)[0]:
            total += noisy_loss(model, batch).item() * batch.num_targets
            targets += batch.num_targets
    for found in two:
        assert found[key]["trained"][0] == pytest.approx(total / targets, rel=1e-5)
        assert found[key]["trained"][0] != pytest.approx(found["none"]["trained"][0], rel=1e-4)


def noisy_loss(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The loss of the embeddings with noise as the paper has it."""
    words = model.get_input_embeddings()(batch.inputs["input_ids"])
    draw = torch.Generator().manual_seed(noise_seed(0, 1, batch.indices))
    bound = ALPHA / (words.shape[1] * words.shape[2]) ** 0.5
    noise = torch.rand(words.shape, generator=draw) * 2 * bound - bound
    found: torch.Tensor = model(inputs_embeds=words + noise, labels=batch.inputs["labels"]).loss
    return found


def test_all_stages_train_alike_and_the_noise_changes_the_training(two: list[dict[str, Any]]) -> None:
    for found in two:
        for key in CASES:
            assert found[key]["trained"] == pytest.approx(found["stage2"]["trained"], rel=2e-5), key
        assert found["none"]["trained"][2] != pytest.approx(found["stage2"]["trained"][2], rel=1e-4)


def test_other_forward_passes_have_no_noise(two: list[dict[str, Any]]) -> None:
    for found in two:
        for key in CASES:
            assert found[key]["evaluated"][0] == pytest.approx(found["none"]["evaluated"][0], rel=1e-5), key
