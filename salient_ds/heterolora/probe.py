"""Probes: passes over a few batches between two steps. They give gradients of all adapters and scores of all modules.

Shape legend: n = elements of one factor, M = modules.

A probe leaves no trace. Gradients come from ``torch.autograd.grad`` through the module that DeepSpeed wrapped. Its
hooks gather and release ZeRO-3's parameters as in any pass, but nothing is accumulated: no ``.grad``, reduction bucket,
partition of averaged gradients, loss-scale state or step count is touched. The gradients are those of plain PyTorch at
every ZeRO stage (tests/dist/test_heterolora_matrix.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from salient_ds.adapters.bank import FactorBank
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.engine.shards import ShardMap
from salient_ds.heterolora import proxies
from salient_ds.heterolora.absolute import AbsoluteParameters, gradients
from salient_ds.heterolora.probing import ProbeScores, ProbeSettings
from salient_ds.zero.collectives import packed_sum, sum_numbers, world
from salient_ds.zero.internals.engine_state import loss_scale, release_gathered
from salient_ds.zero.internals.layouts import full_numel

if TYPE_CHECKING:
    from salient_ds.engine.reports import MicroBatch

_CHUNK = 2**26
"""Elements per all-reduce (256 MiB in fp32). This bounds the copies that a backend makes."""
NEEDS_WEIGHTS = ("snip", "synflow", "fisher")


@dataclass(frozen=True)
class ProbeData:
    """The ``count`` batches that every event uses. ``batch(j)`` holds the same rows on every process."""

    count: int
    batch: Callable[[int], MicroBatch]


Factors = list[dict[str, Tensor]]
"""Whole factors (or their gradients) in fp32 on every process: one dict per module, keyed by factor name."""


class Prober:
    """Scores all modules of an engine in evaluation mode, with all of them switched on.

    Batch j goes to process j mod world size. Gradients are summed over batches and processes before any norm or
    absolute value is taken. During a probe every process holds the gradients of all adapters in fp32. For proxies that
    multiply by the weights (``NEEDS_WEIGHTS``), it holds the fp32 weights too.
    """

    def __init__(
        self, engine: Any, adapted: AdaptedModel, shards: ShardMap, settings: ProbeSettings, device: torch.device
    ) -> None:
        self.engine, self.adapted, self.shards = engine, adapted, shards
        self.settings, self.device = settings, device

    def score(self, proxy: str, data: ProbeData) -> ProbeScores:
        """Scores (M,) by this proxy, identical on every process. Training state and random state do not change."""
        count = len(self.adapted.adapters)
        if proxy == "constant":
            return ProbeScores(torch.full((count,), proxies.constant(), dtype=torch.float64), None)
        trained_M = None
        with _quiet(self.engine.module, self.device), self._all_on():
            if proxy == "alpha_test":
                score_M = self._alpha_test(data)
            else:
                weights = self._weights() if proxy in NEEDS_WEIGHTS else None
                score_M = self._by_gradient(proxy, data, weights)
                if weights is not None:
                    trained_M = torch.tensor([bool(factors["B"].any()) for factors in weights])
        if world().world_size > 1:  # unequal hardware may round differently
            shared_M = score_M.to(self.device)
            dist.broadcast(shared_M, 0)
            score_M = shared_M.cpu()
        return ProbeScores(score_M, trained_M)

    def _by_gradient(self, proxy: str, data: ProbeData, weights: Factors | None) -> Tensor:
        if proxy == "fisher":
            assert weights is not None
            return self._fisher(data, weights)
        if proxy == "synflow":
            summed = self._absolute_gradients(data)
        else:
            sums = _Sums(self.adapted, self.device)
            for batch, weight in self._mine(data):
                sums.add(self._gradients(batch.inputs, sums.parameters, weight))
            sums.reduce()
            summed = sums.by_module()
        scores = []
        for k, (adapter, G) in enumerate(zip(self.adapted.adapters.values(), summed, strict=True)):
            own = weights[k] if weights is not None else G  # grad_norm does not look at them
            scores.append(
                proxies.proxy_score(
                    proxy,
                    own["A"],
                    own["B"],
                    G["A"],
                    G["B"],
                    scaling=adapter.scaling,
                    scale_free=self.settings.scale_free,
                )
            )
        return torch.tensor(scores, dtype=torch.float64)

    def _mine(self, data: ProbeData) -> Iterator[tuple[MicroBatch, float]]:
        """This process' batches with weight 1, then fillers with weight 0: every process takes part in every pass."""
        global_rank, world_size = world()
        for first in range(0, data.count, world_size):
            j = first + global_rank
            batch = data.batch(j if j < data.count else 0)
            yield batch, 1.0 if j < data.count and batch.num_targets else 0.0

    def _gradients(
        self, inputs: dict[str, Tensor], parameters: list[nn.Parameter], weight: float, absolute: bool = False
    ) -> list[Tensor]:
        """Gradients of one batch's mean loss, with the loss scale divided out."""
        scale = loss_scale(self.engine)
        loss = self.engine.module(**inputs).loss * scale
        if not weight:
            loss = loss.nan_to_num() * 0.0
        found = gradients(loss, parameters) if absolute else torch.autograd.grad(loss, parameters)
        release_gathered(self.engine)
        return [gradient.float().div_(scale).view(-1) for gradient in found]

    def _absolute_gradients(self, data: ProbeData) -> Factors:
        """Gradients of the absolute network's loss for all-ones embeddings and the labels of batch 0.

        Every process computes the same.
        """
        inputs = dict(data.batch(0).inputs)
        tokens = inputs.pop("input_ids")
        embedding: Any = self.adapted.model.get_input_embeddings()  # type: ignore[operator]
        inputs["inputs_embeds"] = torch.ones(*tokens.shape, embedding.embedding_dim, device=self.device)
        sums = _Sums(self.adapted, self.device)
        with self._absolute_banks(), AbsoluteParameters():
            sums.add(self._gradients(inputs, sums.parameters, 1.0, absolute=True))
        return sums.by_module()

    @contextlib.contextmanager
    def _absolute_banks(self) -> Iterator[None]:
        """Let banks hand out the absolute values of packed factors inside the block."""
        packed = self.adapted.packed
        banks = [] if packed is None else [bank for bank in packed.banks if isinstance(bank, FactorBank)]
        for bank in banks:
            bank.substitute = lambda parameter: parameter.abs().float()
        try:
            yield
        finally:
            for bank in banks:
                bank.substitute = None

    def _fisher(self, data: ProbeData, weights: Factors) -> Tensor:
        sums = _Sums(self.adapted, self.device)
        total_M = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for batch, weight in self._mine(data):
            sums.zero()
            sums.add(self._gradients(batch.inputs, sums.parameters, weight))
            for k, (own, G) in enumerate(zip(weights, sums.by_module(), strict=True)):
                total_M[k] += proxies.fisher(own["A"], G["A"])
        return packed_sum({"fisher": total_M}, True, self.device)["fisher"].cpu() / data.count

    def _weights(self) -> Factors:
        """Whole fp32 masters of all adapters, put together by summing the parts that the processes own."""
        sums = _Sums(self.adapted, self.device)
        masters = sums.by_module()
        if not self.shards.replicated or world().global_rank == 0:
            for fragment in self.shards.layout.fragments:
                part = self.shards.part(fragment)
                if part is not None:
                    target = masters[part.module][part.factor].view(-1)
                    target[part.lo : part.lo + part.numel].copy_(self.shards.master(fragment))
        sums.reduce()
        return masters

    @torch.no_grad()
    def _alpha_test(self, data: ProbeData) -> Tensor:
        limit = proxies.MetricLimit.of(self._perplexity(data), self.settings.tolerance, "perplexity", "dynamic")
        scores = []
        for adapter in self.adapted.adapters.values():
            scores.append(self._smallest_level(adapter, data, limit))
        return torch.tensor(scores, dtype=torch.float64)

    def _smallest_level(self, adapter: Any, data: ProbeData, limit: Any) -> float:
        def metric(importance: float) -> float:
            adapter.importance = importance
            return self._perplexity(data)

        try:
            return float(proxies.alpha_test(metric, limit))
        finally:
            adapter.importance = 1.0

    def _perplexity(self, data: ProbeData) -> float:
        """exp of the mean loss per target over all batches and processes."""
        loss, targets = 0.0, 0.0
        for batch, weight in self._mine(data):
            found = float(self.engine.module(**batch.inputs).loss)
            if weight and batch.num_targets:
                loss += found * batch.num_targets
                targets += batch.num_targets
        total, count = sum_numbers([loss, targets], self.device)
        mean = total / max(count, 1.0)
        return math.exp(mean) if mean < 700 else math.inf

    @contextlib.contextmanager
    def _all_on(self) -> Iterator[None]:
        """Switch every module on inside the block, and restore the masks after it."""
        adapters = list(self.adapted.adapters.values())
        before = [(adapter.rank_mask_R.clone(), adapter.gated) for adapter in adapters]
        for adapter in adapters:
            adapter.set_mask(torch.ones_like(adapter.rank_mask_R), False, False)
        try:
            yield
        finally:
            for adapter, (mask_R, gated) in zip(adapters, before, strict=True):
                adapter.set_mask(mask_R, gated, False)


class _Sums:
    """One fp32 buffer for all adapters' gradients. Its parts can be reached by parameter or by factor."""

    def __init__(self, adapted: AdaptedModel, device: torch.device) -> None:
        self.adapted = adapted
        addresses = [a for adapter in adapted.adapters.values() for a in adapter.factors().values()]
        self.parameters = list({id(a.parameter): a.parameter for a in addresses}.values())
        sizes = [full_numel(parameter) for parameter in self.parameters]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        pieces = self.flat.split(sizes)
        self._piece = {id(p): piece for p, piece in zip(self.parameters, pieces, strict=True)}

    def zero(self) -> None:
        self.flat.zero_()

    def add(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            self._piece[id(parameter)].add_(gradient)

    def reduce(self) -> None:
        """Sum over all processes, in place."""
        if world().world_size > 1:
            for chunk in self.flat.split(_CHUNK):
                dist.all_reduce(chunk)

    def by_module(self) -> Factors:
        """Live views with the shapes of the factors."""
        return [
            {
                name: self._piece[id(a.parameter)][a.offset : a.offset + math.prod(a.shape)].view(a.shape)
                for name, a in adapter.factors().items()
            }
            for adapter in self.adapted.adapters.values()
        ]


@contextlib.contextmanager
def _quiet(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode that still checkpoints activations. Random state and modes are restored afterwards.

    transformers recomputes a layer only if the layer is in training mode. So layers with activation checkpointing stay
    in training mode, with their own dropout set to 0.
    """
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for module, training in modes:
                if training and getattr(module, "gradient_checkpointing", False):
                    module.training = True
                    for name in ("dropout", "activation_dropout", "attention_dropout"):
                        if isinstance(getattr(module, name, None), float):
                            rates.append((module, name, getattr(module, name)))
                            setattr(module, name, 0.0)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, rate in rates:
                setattr(module, name, rate)
