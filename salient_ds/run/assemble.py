"""From a loaded base model to an engine that allocates ranks: puts the parts together in the order they need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salient_ds.adapters.full import parts
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.config.run import RunConfig
from salient_ds.config.speed import compiles, row_multiple
from salient_ds.engine.build import build_engine, rate_plan
from salient_ds.engine.compact import Resizer
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.resize import all_rows, first_rows, set_rows
from salient_ds.engine.state import AllocationState
from salient_ds.heterolora.probe import ProbeData
from salient_ds.heterolora.probe_events import ProbeEvents
from salient_ds.heterolora.probing import ProbingMethod
from salient_ds.methods.duties import FusingMethod, GrowingMethod, Method, ResizableMethod, ScoringMethod
from salient_ds.methods.options import MethodConfig
from salient_ds.models.attention import leave_out_masks
from salient_ds.models.embedding_noise import EmbeddingNoise
from salient_ds.models.kernels import apply_kernels
from salient_ds.models.loading import DTYPES, recompute_layers
from salient_ds.models.packed_masks import keep_examples_apart
from salient_ds.models.target_head import use_target_head
from salient_ds.models.varlen_attention import use_varlen_attention
from salient_ds.run.adapt import adapt
from salient_ds.run.compiled import compile_layers, graph_problem
from salient_ds.zero.ds_json import summary
from salient_ds.zero.internals.layouts import full_shape
from salient_ds.zero.sharded_base import ShardedBase, adapter_config

log = logging.getLogger(__name__)
MakeEngine = Callable[[AdaptedModel, dict[str, Any], bool], Any]
"""Builds an engine from the adapted model, DeepSpeed settings, and whether clipping may move into the optimizer."""


def assemble(
    model: nn.Module,
    config: RunConfig,
    ds_config: dict[str, Any],
    total_steps: int,
    device: torch.device,
    *,
    kept_N: Tensor | None = None,
    steps_per_epoch: int | None = None,
    probe_data: ProbeData | None = None,
    make_engine: MakeEngine | None = None,
    fresh: Sequence[str] = (),
) -> AllocatingEngine:
    """Put adapters, method and DeepSpeed engine around ``model``.

    Args:
        model: from :func:`salient_ds.models.loading.load_model` with the same ``ds_config``.
        ds_config: resolved DeepSpeed settings.
        total_steps: applied optimizer steps of the run.
        kept_N: which rows of the initial layout the checkpoint has that the run resumes from (bool, CPU); None: begin
            with the rows of a fresh run.
        steps_per_epoch: needed by methods whose events are given in epochs.
        probe_data: needed by methods that probe: the batches of events that come before a step.
        make_engine: used instead of :func:`salient_ds.engine.build.build_engine` (benchmarks).
        fresh: names of the parameters that the checkpoint of the base lacked; see :class:`BaseModel`.

    Raises:
        ValueError: the checkpoint lacks rows but this run's adapters are not packed, or the kernels of ``speed.liger``
            are not available.
    """
    plan = config.speed_plan(summary(ds_config).stage)
    apply_kernels(model, config.speed, device)
    if config.speed.target_head:
        use_target_head(model)
    if config.data.packing:
        varlen = config.speed.packed_attention == "varlen" and device.type == "cuda"
        if not (varlen and use_varlen_attention(model, device)):
            keep_examples_apart(model)
    else:
        leave_out_masks(model, device)
    if plan.sharded_base:
        full = parts(model, full_shape).trained(config.adapter, fresh)
        ShardedBase(model, ds_config, device, full)  # before adapters are added, because it must not partition them
        ds_config = adapter_config(ds_config)
    dtype = DTYPES[config.train.precision]
    adapted = adapt(model, config, dtype, device, plan.grows_in_flight, full_shape, fresh)
    if plan.packed:
        adapted.pack()
    for adapter in adapted.adapters.values():
        adapter.fused = config.train.activation_checkpointing != "selective"
    share = config.train.activation_memory
    if compiles(config.speed, config.method, plan.packed, device.type == "cuda"):
        may_fail, graphs = config.speed.compile_layers == "auto", uses_graphs(adapted, config, summary(ds_config).stage)
        compile_layers(adapted, may_fail, share, graphs)
    elif share < 1:
        log.warning(
            "train.activation_memory=%g: layers are not compiled here, so all of them are recomputed in the backward "
            "pass (train.activation_checkpointing: all)", share,
        )  # fmt: skip
        recompute_layers(model)
    elif config.speed.cuda_graphs:
        log.warning("speed.cuda_graphs has no effect here: layers are compiled on GPUs, and this is %s", device.type)
    layout = all_rows(adapted)
    rates = rate_plan(config.train, total_steps)
    method = config.method.build(layout, total_steps, rates, steps_per_epoch)
    check_capabilities(config.method, method)
    if isinstance(method, FusingMethod):
        method.fused = config.speed.fused_statistics
    here_N = first_rows(layout, adapted.layout.ranks)
    if kept_N is None or len(kept_N) != len(here_N):  # of another model: the checkpoint is refused when it is read
        kept_N = here_N
    if not torch.equal(kept_N, here_N):
        if not plan.packed:
            raise ValueError(
                f"the checkpoint holds {int(kept_N.sum())} of {len(kept_N)} rows (it was compacted, or still grows in "
                f"flight), which needs packed adapters; speed.packing={config.speed.packing} and "
                f"speed.zero3={config.speed.zero3} rule them out: set both to auto"
            )
        set_rows(adapted, layout, kept_N)
    if adapted.layout != layout:
        assert isinstance(method, ResizableMethod)
        method.resized(adapted.layout)

    folding = not method.needs_before  # a method that looks at gradients before the step wants them clipped

    def build() -> Any:
        if make_engine is not None:
            return make_engine(adapted, ds_config, folding)
        ratio = config.sigma_ratio(layout)
        flat = config.speed.flat_gradients
        return build_engine(
            adapted, config.train, ds_config, total_steps, device, folding, sigma_ratio=ratio, flat_gradients=flat
        )

    when = compaction(config, method, plan.packed)
    multiple = row_multiple(config.speed, device.type == "cuda")
    resizes = plan.packed and isinstance(method, ResizableMethod)
    resizer = Resizer(build, when, multiple) if resizes else None
    state = AllocationState(build(), adapted, method, device, initial_layout=layout, kept_N=kept_N)
    before = None
    if isinstance(method, ProbingMethod):
        assert probe_data is not None, "a method that probes needs batches"
        before = ProbeEvents(state, probe_data)
    alpha, noise = config.train.neftune_alpha, None
    if alpha:
        noise = EmbeddingNoise(model, alpha, config.train.seed, device)
    return AllocatingEngine(state, resizer=resizer, before=before, noise=noise)


def check_capabilities(options: MethodConfig, method: Method) -> None:
    """Check that the method's class can do what its options promise. It helps authors of methods.

    Raises:
        TypeError: the options declare something for which the class lacks functions.
    """
    resizes = options.compactable != "never" or options.grows
    for promised, protocol, name in (
        (resizes, ResizableMethod, "compactable or grows"),
        (options.grows, GrowingMethod, "grows"),
        (options.scoring_bytes > 0, ScoringMethod, "scoring_bytes"),
    ):
        if promised and not isinstance(method, protocol):
            raise TypeError(
                f"the options of method {options.name!r} declare {name}, but {type(method).__name__} is no "
                f"{protocol.__name__}: write the functions that it names, or take the declaration back"
            )


def compaction(config: RunConfig, method: Method, packed: bool) -> Literal["none", "last", "every"]:
    """When this run drops pruned rows: ``speed.compaction`` with "auto" resolved."""
    wanted = config.speed.compaction
    possible = packed and config.method.compactable != "never"
    if wanted == "auto":
        # Without gating, pruned rows still act through the penalty, and dropping them would change the training.
        return "last" if possible and method.policy.gate_forward else "none"
    return wanted if possible else "none"


def uses_graphs(adapted: AdaptedModel, config: RunConfig, stage: int) -> bool:
    """Whether compiled layers are launched as CUDA graphs: ``speed.cuda_graphs``, where nothing rules it out."""
    if not config.speed.cuda_graphs:
        return False
    reason = graph_problem(adapted, stage == 3)
    if reason is not None:
        log.warning("speed.cuda_graphs has no effect here: %s", reason)
    return reason is None
