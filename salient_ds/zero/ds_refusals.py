"""DeepSpeed features that a run refuses by name, each with a reason and a remedy.

There are two kinds of reason. Either the feature breaks what adaptive ranks rely on (fp32 masters that this process can
read, one optimizer step hook per applied step, averaged gradients). Or nothing in this package would read the setting,
so that accepting it would promise something that does not happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """One refused setting: ``path`` is its dotted path, ``when`` says whether the value found there is refused."""

    path: str
    when: Callable[[Any], bool]
    reason: str
    remedy: str


def _present(value: Any) -> bool:
    return value is not None and value is not False and value != "auto" and value != {}


def _enabled(value: Any) -> bool:
    return isinstance(value, dict) and value.get("enabled") is True


def _true(value: Any) -> bool:
    return value is True


def _false(value: Any) -> bool:
    return value is False


def _nvme(value: Any) -> bool:
    return bool(value == "nvme")


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def _below_one(value: Any) -> bool:
    return isinstance(value, int | float) and value < 1


def _splits_tensors(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner = value.get("tensor_parallel", value.get("tp"))
    size = inner.get("tp_size", 1) if isinstance(inner, dict) else 1
    return _above_one(value.get("autotp_size", 0)) or _above_one(size)


def _compiles(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("deepcompile") is True or bool(value.get("passes")))


_NO_READER = "nothing in salient_ds reads it, so it would be ignored in silence"
_DEPRECATED = "the key is deprecated"
_TO_FALSE = "set it to false"
_TO_TRUE = "set it to true or leave it out"
_DROP_KEY = "remove the key"
_DROP = "remove the section"
_FP32 = "singular values are read from fp32 masters; 16-bit ones round most updates away"

_Rule = tuple[str, Callable[[Any], bool], str, str]
"""Path of the setting, condition on its value, reason, remedy."""

_ZERO_RULES: list[_Rule] = [
    (
        "offload_optimizer.device",
        _nvme,
        "fp32 masters on NVMe are in memory only during the optimizer step, out of reach of pruning",
        'use "cpu" or "none"',
    ),
    (
        "offload_param.device",
        _nvme,
        "parameters on NVMe are in memory only while their layer runs, out of reach of pruning",
        'use "cpu" or "none"',
    ),
    (
        "offload_optimizer.super_offload",
        _true,
        "SuperOffload steps the optimizer in another process, where the step hook does not fire",
        _TO_FALSE,
    ),
    (
        "offload_optimizer.ratio",
        _below_one,
        "partial offload steps some parameters with a second optimizer that has no step hook",
        "set it to 1.0 or leave it out",
    ),
    (
        "zenflow",
        _present,
        "ZenFlow updates selectively and late, which breaks statistics taken per step",
        _DROP,
    ),
    (
        "zero_quantized_gradients",
        _true,
        "quantised gradients change what the optimizer sees and with it the ranks that are chosen",
        _TO_FALSE,
    ),
    (
        "zero_quantized_weights",
        _true,
        "quantised gathers also quantise the adapters, whose pruned values must stay exactly zero",
        _TO_FALSE,
    ),
    (
        "zero_quantized_nontrainable_weights",
        _true,
        "a quantised base is not tested: fresh adapters would no longer equal the base model",
        _TO_FALSE,
    ),
    (
        "zero_hpz_partition_size",
        _above_one,
        "hpZ keeps a second copy of every shard and is not tested with pruning",
        "set it to 1 or leave it out",
    ),
    ("compute_grad_norm", _false, "without the norm, non-finite gradients are not noticed", _TO_TRUE),
    ("legacy_stage1", _true, "DeepSpeed has had no legacy stage 1 since 0.5.9", _DROP_KEY),
    ("cpu_offload", _present, _DEPRECATED, 'write "offload_optimizer": {"device": "cpu"}'),
    ("cpu_offload_param", _present, _DEPRECATED, 'write "offload_param": {"device": "cpu"}'),
    ("cpu_offload_use_pin_memory", _present, _DEPRECATED, 'write "pin_memory" inside the offload section'),
    (
        "stage3_gather_fp16_weights_on_model_save",
        _present,
        _DEPRECATED,
        "write stage3_gather_16bit_weights_on_model_save",
    ),
]

_RULES: list[_Rule] = [
    ("bf16.bf16_master_weights_and_grads", _true, _FP32, _TO_FALSE),
    ("bf16.bf16_optimizer_states", _true, "it requires bf16 master weights", _TO_FALSE),
    (
        "bf16.check_grad_overflow",
        _false,
        "a step with non-finite gradients would be applied and poison the statistics",
        _TO_TRUE,
    ),
    ("fp16.fp16_master_weights_and_grads", _true, _FP32, _TO_FALSE),
    ("torch_autocast", _enabled, "the precision is train.precision in the run file", _DROP),
    (
        "gradient_allreduce_op",
        lambda value: isinstance(value, str) and value.lower() == "sum",
        "summed gradients grow with the number of processes, and clipping with them",
        'use "mean" or leave it out',
    ),
    (
        "managed_gradient_accumulation",
        _false,
        "the training loop relies on DeepSpeed counting micro-batches",
        _TO_TRUE,
    ),
    ("disable_allgather", _true, "DeepSpeed 0.19.8 reads it and does nothing with it", _DROP_KEY),
    (
        "scheduler",
        _present,
        "the learning rate has one owner, train.lr_schedule and train.lr_warmup in the run file",
        "remove the section and set those",
    ),
    (
        "activation_checkpointing",
        _present,
        f"recomputation has one owner, train.activation_checkpointing in the run file; {_NO_READER}",
        "remove the section and set that",
    ),
    ("dataloader_drop_last", _true, f"salient_ds builds the data loader; {_NO_READER}", _DROP_KEY),
    (
        "data_efficiency",
        _enabled,
        f"data efficiency and curriculum learning need DeepSpeed's data loader; {_NO_READER}",
        _DROP,
    ),
    (
        "compile",
        _compiles,
        "DeepCompile replaces ZeRO's hooks and fixes shapes that compaction changes",
        _DROP,
    ),
    ("pipeline", _present, "pipeline parallelism is not supported", f"{_DROP} and use ZeRO stage 3"),
    (
        "tensor_parallel",
        _splits_tensors,
        "AutoTP splits the linear layers under the adapters, but not the adapters",
        f"{_DROP} and use ZeRO stage 3",
    ),
    ("expert_parallel", _enabled, "expert parallelism is not supported", _DROP),
    (
        "sequence_parallel_size",
        _above_one,
        "the training loop does not split sequences over processes",
        _DROP_KEY,
    ),
    ("hybrid_engine", _enabled, "the hybrid engine rewrites the layers under the adapters", _DROP),
    ("weight_quantization", _present, "the base model is trained unquantised", _DROP),
    ("autotuning", _enabled, "the autotuner changes batch sizes that the run file owns", _DROP),
    ("checkpoint.load_universal", _true, "a resumed run finds the form of its checkpoint itself", _DROP_KEY),
]

_REMOVED: dict[str, tuple[str, str]] = {
    "zero_optimization.mics_shard_size": ("MiCS", "use stage 3 without it"),
    "zero_optimization.mics_hierarchical_params_gather": ("MiCS", "use stage 3 without it"),
    "zero_optimization.zeropp_loco_param": ("LoCo", _DROP_KEY),
    "nebula": ("Nebula checkpointing", _DROP),
    "compression_training": ("the compression library", _DROP),
    "amp": ("Apex AMP", "remove the section and set train.precision"),
    "quantize_training": ("quantised training", _DROP),
    "sparse_gradients": ("the sparse_gradients flag", _DROP_KEY),
    "eigenvalue": ("eigenvalue-based quantisation", _DROP),
    "sparse_attention": ("sparse attention", _DROP),
    "elasticity": ("elastic training", "remove the section; a checkpoint resumes on another process count"),
    "graph_harvesting": ("graph harvesting", _DROP_KEY),
    "curriculum_learning": ("the top-level curriculum", _DROP),
    "progressive_layer_drop": ("progressive layer dropping", _DROP),
}

REFUSALS: tuple[Refusal, ...] = (
    *(Refusal(f"zero_optimization.{rule[0]}", *rule[1:]) for rule in _ZERO_RULES),
    *(Refusal(*rule) for rule in _RULES),
    *(
        Refusal(path, lambda value: True, f"{feature} was removed from DeepSpeed 0.19.8", remedy)
        for path, (feature, remedy) in _REMOVED.items()
    ),
)

_UNSUPPORTED_OPTIMIZERS = {
    "onebitadam": "1-bit optimizers were removed from DeepSpeed 0.19.8",
    "zerooneadam": "1-bit optimizers were removed from DeepSpeed 0.19.8",
    "onebitlamb": "1-bit optimizers were removed from DeepSpeed 0.19.8",
    "muon": "Muon mixes the rows of a matrix, so that moments no longer belong to single ranks",
}


def optimizer_refusal(name: str) -> str | None:
    """Why the optimizer type ``name`` is refused; None for Adam and AdamW."""
    lowered = name.lower()
    if lowered in ("adam", "adamw"):
        return None
    return _UNSUPPORTED_OPTIMIZERS.get(lowered, "its state is not the pair of Adam moments that pruning handles")
