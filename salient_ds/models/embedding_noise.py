"""NEFTune (Jain et al. 2023): uniform noise on the input embeddings of training batches (``train.neftune_alpha``).

x + alpha / sqrt(L d) u with u uniform in [-1, 1], where L is the number of tokens of the sequence and d the width of
the embedding. Padding gets no noise. Of packed examples, each counts its own tokens.

The noise of a micro-batch follows from the run's seed, the step and the numbers of its rows. So a resumed run draws
what the uninterrupted one drew, and processes draw different noise. It is there only while the engine trains on a
batch: not in evaluations, probes, generation and exports.

Differs from transformers' Trainer: that counts padding in L, and gives it noise.

Shape legend: B = sequences, S = tokens, d = width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds the noise by a hook on the model's input embedding. It works on partitioned embeddings, too."""

    def __init__(self, model: nn.Module, alpha: float, seed: int, device: torch.device) -> None:
        """
        Args:
            alpha: strength; 5 to 15 in the paper.

        Raises:
            ValueError: the model does not say which module embeds its tokens.
        """
        self.alpha, self.seed = alpha, seed
        self._generator = torch.Generator(device)
        self._scale_BS: Tensor | None = None
        """Of the batch that is trained on now; None: no noise."""
        self._used = False
        embedding = _embedding(model)
        if embedding is None:
            raise ValueError(
                f"train.neftune_alpha={alpha:g}: {type(model).__name__} does not say which module embeds its tokens; "
                "remove the option"
            )
        embedding.register_forward_hook(self._add)

    @contextmanager
    def during(self, step: int, rows: Sequence[int], inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Add noise in the forward pass of one micro-batch.

        Args:
            step: number of the step that is being taken, counted from 1.
            rows: numbers of the rows in the training data.
            inputs: of the model.

        Raises:
            ValueError: the model did not call its input embedding, so there was no noise.
        """
        self._scale_BS, self._used = self.alpha * lengths(inputs).rsqrt(), False
        self._generator.manual_seed(noise_seed(self.seed, step, rows))
        try:
            yield
        finally:
            self._scale_BS = None
        if not self._used:
            raise ValueError(
                f"train.neftune_alpha={self.alpha:g}: the model does not call the module that it names as its input "
                "embedding, so there would be no noise; remove the option"
            )

    def _add(self, module: nn.Module, inputs: Any, output_BSd: Tensor) -> Tensor | None:
        if self._scale_BS is None:
            return None
        self._used = True
        noise_BSd = torch.empty(output_BSd.shape, device=output_BSd.device)
        noise_BSd.uniform_(-1, 1, generator=self._generator)
        noise_BSd *= (self._scale_BS / output_BSd.shape[-1] ** 0.5).unsqueeze(-1)
        return output_BSd + noise_BSd.to(output_BSd.dtype)


def lengths(inputs: Mapping[str, Tensor]) -> Tensor:
    """For every token, how many tokens its sequence has (B, S), fp32. Infinity for padding."""
    shape = inputs["input_ids"].shape
    if "position_ids" in inputs:  # packed: every example begins at position 0
        begins = (inputs["position_ids"] == 0).reshape(-1)
        example = begins.cumsum(0) - 1
        count = torch.zeros(begins.shape, device=begins.device).index_add_(
            0, example, torch.ones_like(example, dtype=torch.float32)
        )
        return count[example].reshape(shape)
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.full(shape, float(shape[1]), device=inputs["input_ids"].device)
    real = mask.to(torch.float32)
    return torch.where(mask > 0, real.sum(1, keepdim=True), torch.inf)


def noise_seed(seed: int, step: int, rows: Sequence[int]) -> int:
    """The seed of a micro-batch's noise."""
    text = f"neftune:{seed}:{step}:{','.join(map(str, rows))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _embedding(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
