"""What really made a run fast: read off the engine at its end, for summary.json.

A compiler may have failed and a bank may have fallen back to single factors, whatever the run file asks for. These are
facts of the run, not of its configuration.
"""

from __future__ import annotations

from typing import Any

import torch

from salient_ds.adapters.bank import FactorBank
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.methods.duties import FusingMethod
from salient_ds.models.kernels import has_fused_loss
from salient_ds.models.target_head import uses_target_head
from salient_ds.run.compiled import GraphedForward, layer_paths
from salient_ds.salience.sensitivity_kernel import AVAILABLE as KERNEL_AVAILABLE
from salient_ds.zero.internals.engine_state import basic_optimizer


def speed_facts(engine: AllocatingEngine) -> dict[str, Any]:
    """Key "speed" of summary.json.

    * ``compiled_layers``: layers whose forward pass is compiled; ``graphed_layers``: those that were launched as CUDA
      graphs. ``compiled_graphs`` and ``compiler_failures``: what the compiler made of them in this process. Layers that
      fell back to eager mode count as failures.
    * ``packed_factors``: whether factors lie in banks; ``fused_adapters`` of ``adapters``: those whose last forward
      pass took mask, scaling and singular values from the bank, in one factor.
    * ``penalty_graphs``: banks whose penalty is one CUDA graph.
    * ``attention``: what computes it. ``fused_loss``, ``target_head``: which loss.
    * ``fused_optimizer``: one kernel for the optimizer's step; ``fused_statistics``: one for the method's.
    """
    adapted, model = engine.adapted, engine.adapted.model
    adapters = list(adapted.adapters.values())
    method, optimizer = engine.method, basic_optimizer(engine.engine)
    on_gpu = engine.device.type == "cuda"
    facts = {
        **_compiler(adapted),
        "packed_factors": adapted.packed is not None,
        "adapters": len(adapters),
        "fused_adapters": sum(_derived(adapter) for adapter in adapters),
        "penalty_graphs": sum(bank.penalty_is_graph for bank in _banks(adapted)),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "fused_loss": has_fused_loss(model),
        "target_head": uses_target_head(model),
        "fused_optimizer": all(bool(group.get("fused")) for group in optimizer.param_groups),
        "fused_statistics": on_gpu and isinstance(method, FusingMethod) and method.fused and KERNEL_AVAILABLE,
    }
    return {"speed": facts}


def _compiler(adapted: AdaptedModel) -> dict[str, int]:
    forwards = [adapted.model.get_submodule(path).forward for path in layer_paths(adapted)]
    compiled = [forward for forward in forwards if _is_compiled(forward)]
    counters: Any = torch._dynamo.utils.counters if compiled else {}
    frames = counters.get("frames", {})
    return {
        "compiled_layers": len(compiled),
        "graphed_layers": sum(isinstance(forward, GraphedForward) and forward.graphs for forward in compiled),
        "compiled_graphs": counters.get("stats", {}).get("unique_graphs", 0),
        "compiler_failures": frames.get("total", 0) - frames.get("ok", 0),
    }


def _is_compiled(forward: Any) -> bool:
    return isinstance(forward, GraphedForward) or hasattr(forward, "_torchdynamo_orig_callable")


def _banks(adapted: AdaptedModel) -> list[FactorBank]:
    banks: Any = [] if adapted.packed is None else adapted.packed.banks
    return [bank for bank in banks if isinstance(bank, FactorBank)]


def _derived(adapter: Any) -> bool:
    return any(getattr(adapter, name, None) is not None for name in ("gain_R", "merged_kI"))
