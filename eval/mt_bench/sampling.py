"""Sample each row's tokens from its own random stream, inside transformers' ``generate``.

The random numbers of a row are determined by (seed, question, choice, turn). So they do not depend on the other
questions in the batch, on the order, or on the process.
Shapes: B = rows of a batch, V = vocabulary, L = tokens so far, P = tokens of the longest prompt, T = most new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

GREEDY_BELOW = 1e-4
"""Below this temperature decoding is greedy, as in FastChat."""


class SeededSampler(LogitsProcessor):
    """Leaves one token possible in each row: the likeliest, or one sampled at the row's temperature.

    Sampling uses inversion: it takes the first token at which the cumulative probability (fp64) exceeds the row's
    uniform random number for this step. A row whose logits are not finite ends there. ``broken_at_B`` is the step at
    which that happened, or -1. With ``together``, process 0 chooses the tokens for all processes, because rounding
    differences could make their choices diverge.
    """

    def __init__(
        self, seeds: Sequence[int], temperatures: Sequence[float], prompt_length: int, *, max_new: int, end: int,
        device: torch.device, together: bool = False,
    ) -> None:  # fmt: skip
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniforms = [torch.rand(max_new, generator=stream, dtype=torch.float64) for stream in streams]
        self.uniform_BT = torch.stack(uniforms).to(device)
        self.temperature_B1 = torch.tensor(temperatures, dtype=torch.float64, device=device).unsqueeze(1)
        self.greedy_B = self.temperature_B1[:, 0] < GREEDY_BELOW
        self.broken_at_B = torch.full((len(seeds),), -1, device=device)
        self.prompt_length, self.end, self.together = prompt_length, end, together

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) tokens and (B, V) logits -> (B, V), zero at the chosen token and -inf elsewhere."""
        step = input_ids.shape[1] - self.prompt_length
        chosen_B = self._choose(scores, step)
        if self.together:
            torch.distributed.broadcast(chosen_B, 0)
        broken_B = chosen_B < 0
        self.broken_at_B = torch.where(broken_B & (self.broken_at_B < 0), step, self.broken_at_B)
        chosen_B = torch.where(broken_B, self.end, chosen_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B.unsqueeze(1), 0.0)

    def _choose(self, scores: Tensor, step: int) -> Tensor:
        """(B, V) -> (B,) tokens, -1 where the logits are broken."""
        broken_B = scores.isnan().any(1) | ~scores.max(1).values.isfinite()
        scaled_BV = scores.double() / self.temperature_B1.clamp(min=GREEDY_BELOW)
        cumulated_BV = torch.where(broken_B.unsqueeze(1), 0.0, scaled_BV).softmax(1).cumsum(1)
        total_B1 = cumulated_BV[:, -1:]
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # rounding must not lead past the last token
        target_B1 = torch.minimum(self.uniform_BT[:, step : step + 1] * total_B1, below_B1)
        drawn_B = torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]
        return torch.where(broken_B, -1, torch.where(self.greedy_B, scores.argmax(1), drawn_B))


class RowStops(StoppingCriteria):
    """Ends a row at an end token, after a stop text, or at the row's own limit of new tokens.

    This only saves time. Which tokens belong to the answer is decided afterwards by :func:`cut_answer`.
    """

    def __init__(
        self, tokenizer: Any, ends: Collection[int], stops: Sequence[str], limits: Sequence[int], prompt_length: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        self.ends_E = torch.tensor(sorted(ends), device=device)
        self.limit_B = torch.tensor(limits, device=device)
        self.done_B = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self.window = max((len(text) for text in stops), default=0) + 8  # tokens: at least one per character

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B, L) -> (B,) bool, True where the row is complete."""
        step = input_ids.shape[1] - self.prompt_length
        self.done_B |= torch.isin(input_ids[:, -1], self.ends_E) | (step >= self.limit_B)
        if self.stops:
            begin = max(self.prompt_length, input_ids.shape[1] - self.window)
            tails = self.tokenizer.batch_decode(input_ids[:, begin:], skip_special_tokens=True)
            hits = [any(stop in tail for stop in self.stops) for tail in tails]
            self.done_B |= torch.tensor(hits, device=self.done_B.device)
        return self.done_B


def cut_answer(
    tokens: Sequence[int], tokenizer: Any, ends: Collection[int], stops: Sequence[str], limit: int
) -> tuple[str, int, bool]:
    """Return (text, tokens used, whether the model ended the answer) from a row's new tokens. The rest is ignored."""
    used = next((place for place, token in enumerate(tokens[:limit]) if token in ends), None)
    ended = used is not None
    kept = list(tokens[: limit if used is None else used])
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        text, ended = text[: min(places)], True
    return text.strip(), min(len(kept) + (used is not None), limit), ended
