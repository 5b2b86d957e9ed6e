"""Every undocumented attribute of DeepSpeed that is read or replaced, by the class that has it.

:func:`require` is called when an engine is adopted. A version of DeepSpeed that lacks one of the attributes is refused
with a message that names it. tests/dist/test_contract.py checks the same on real engines of every kind, and
tests/architecture forbids these names outside of this folder.
"""

from __future__ import annotations

from typing import Any

ENGINE = (
    "basic_optimizer", "lr_scheduler", "optimizer", "global_steps", "global_samples", "skipped_steps", "micro_steps",
    "monitor", "module_forward_pre_hook", "module_forward_post_hook",
)  # fmt: skip
"""Attributes of the engine itself."""
WRAPPERS = {
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets", "partition_size",
        "real_dp_process_group", "update_lp_params", "averaged_gradients", "clip_grad", "loss_scale",
        "_global_grad_norm", "scaled_global_norm", "check_overflow", "device", "_get_preflattened_grad_partition",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat", "grad_position", "get_param_id", "fp16_groups", "persistent_parameters",
        "_reassign_or_swap_out_partitioned_parameters", "parameter_offload", "loss_scale",
    ),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "update_lp_params"),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
    "FP16_Optimizer": ("fp32_groups_flat", "fp16_groups"),
}  # fmt: skip
"""Attributes of the engine's optimizer, by the class name of the wrapper."""
PARAMETER = ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_status", "ds_process_group", "all_gather", "partition")
"""Attributes of a parameter that ZeRO-3 has partitioned."""
PRIVATE_ELSEWHERE = (
    {name for names in WRAPPERS.values() for name in names} - {"device", "loss_scale", "clip_grad"}
    | set(ENGINE) - {"optimizer", "lr_scheduler"}
    | set(PARAMETER) - {"all_gather", "partition"}
    | {"_hp_mapping", "__compatible_ops__", "loss_scaler", "loss_scale_config"}
)
"""Names that no file outside this folder may use as an attribute."""


def missing(engine: Any) -> list[str]:
    """The attributes of the contract that a DeepSpeed engine lacks, one sentence each."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    wanted = [(engine, name) for name in ENGINE] + [(optimizer, name) for name in WRAPPERS.get(kind, ())]
    return [
        f"DeepSpeed's {type(owner).__name__} has no attribute {name!r} any more, which salient_ds reads"
        for owner, name in wanted
        if not hasattr(owner, name)
    ]


def require(engine: Any) -> None:
    """Check that the engine has every attribute of the contract.

    Raises:
        RuntimeError: attributes are missing; the message names all of them.
    """
    problems = missing(engine)
    if problems:
        raise RuntimeError("; ".join(problems) + ": install the version of deepspeed that pyproject.toml names")
