"""NEFTune's noise: its size per sequence, that it repeats, and that it is there only while a batch is trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.models.embedding_noise import EmbeddingNoise, lengths, noise_seed
from tests.support.tiny_architectures import tiny_model

CPU, ALPHA, WIDTH = torch.device("cpu"), 5.0, 64


class Words(nn.Module):
    """A model that is nothing but its embedding."""

    def __init__(self, calls: bool = True) -> None:
        super().__init__()
        self.words, self.calls = nn.Embedding(100, WIDTH), calls

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.words(input_ids) if self.calls else self.words.weight[input_ids]
        return found


def noise_of(inputs: dict[str, torch.Tensor], step: int = 1, rows: tuple[int, ...] = (0,), seed: int = 0) -> Any:
    model = Words()
    noise = EmbeddingNoise(model, ALPHA, seed, CPU)
    plain = model(inputs["input_ids"])
    with noise.during(step, rows, inputs):
        noisy = model(inputs["input_ids"])
    assert torch.equal(model(inputs["input_ids"]), plain), "afterwards there is none"
    return (noisy - plain).detach()


def test_it_is_that_of_transformers_where_nothing_is_padded() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    ids = torch.randint(0, 100, (3, 40))
    torch.manual_seed(noise_seed(0, 4, (7, 8, 9)))
    theirs = neftune_post_forward_hook(
        SimpleNamespace(training=True, neftune_noise_alpha=ALPHA), (ids,), torch.zeros(3, 40, WIDTH)
    )
    ours = noise_of({"input_ids": ids}, 4, (7, 8, 9))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_every_sequence_counts_its_own_tokens_and_padding_gets_none() -> None:
    ids = torch.randint(0, 100, (2, 50))
    mask = torch.zeros(2, 50, dtype=torch.long)
    mask[0, :40], mask[1, 45:] = 1, 1  # padded on the right, and on the left
    found = noise_of({"input_ids": ids, "attention_mask": mask}).abs()
    assert found[mask == 0].max() == 0
    for row, count in ((0, 40), (1, 5)):
        bound = ALPHA / (count * WIDTH) ** 0.5
        assert 0.97 * bound < found[row].max() <= bound * (1 + 1e-5)
        assert found[row][mask[row] == 1].mean() == pytest.approx(bound / 2, rel=0.1)


def test_packed_examples_count_their_own_tokens() -> None:
    positions = torch.tensor([[*range(30), *range(3), *range(7)], [*range(10), *range(20), *range(10)]])
    assert lengths({"input_ids": positions, "position_ids": positions}).tolist() == [
        [30.0] * 30 + [3.0] * 3 + [7.0] * 7, [10.0] * 10 + [20.0] * 20 + [10.0] * 10,
    ]  # fmt: skip
    found = noise_of({"input_ids": positions, "position_ids": positions}).abs()
    assert found[0, :30].max() <= ALPHA / (30 * WIDTH) ** 0.5 * (1 + 1e-5) < found[0, 30:33].max()


def test_it_repeats_and_differs_by_seed_step_and_rows() -> None:
    inputs = {"input_ids": torch.randint(0, 100, (2, 8))}
    first = noise_of(inputs, 3, (1, 2))
    torch.manual_seed(99)
    assert torch.allclose(noise_of(inputs, 3, (1, 2)), first, atol=1e-6)
    others = [noise_of(inputs, 4, (1, 2)), noise_of(inputs, 3, (1, 3)), noise_of(inputs, 3, (12,)),
              noise_of(inputs, 3, (1, 2), seed=1)]  # fmt: skip
    assert all(not torch.allclose(other, first, atol=1e-3) for other in others)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    model = Words()
    after_model = torch.get_rng_state()
    assert not torch.equal(before, after_model)
    noise = EmbeddingNoise(model, ALPHA, 0, CPU)
    with noise.during(1, (0,), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}):
        model(torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), after_model)


def test_the_precision_of_the_embedding_is_kept() -> None:
    model = Words().to(torch.bfloat16)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with EmbeddingNoise(model, ALPHA, 0, CPU).during(1, (0,), {"input_ids": ids}):
        noisy = model(ids)
    assert noisy.dtype == torch.bfloat16 and not torch.equal(noisy, model(ids))


def test_a_model_that_goes_round_its_embedding_is_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    model = Words(calls=False)
    noise = EmbeddingNoise(model, ALPHA, 0, CPU)
    with pytest.raises(ValueError, match="no noise; remove the option"), noise.during(1, (0,), {"input_ids": ids}):
        model(ids)
    with pytest.raises(ValueError, match="Linear does not say which module embeds"):
        EmbeddingNoise(nn.Linear(2, 2), ALPHA, 0, CPU)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "bert"])
def test_real_models_take_it(model_type: str) -> None:
    model = tiny_model(model_type).eval()
    noise = EmbeddingNoise(model, ALPHA, 0, CPU)
    ids = torch.randint(7, 96, (1, 6))
    plain = model(input_ids=ids).logits
    with noise.during(1, (0,), {"input_ids": ids}):
        noisy = model(input_ids=ids).logits
    assert (noisy - plain).abs().max() > 1e-4
    assert torch.equal(model(input_ids=ids).logits, plain)
