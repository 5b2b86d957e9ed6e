"""Configuration keys that DeepSpeed 0.19.8 reads, with the kind of value that it expects.

DeepSpeed silently ignores a misspelt top-level key, so the names are listed here and checked before
processes start. They come from its source (runtime/config.py, runtime/constants.py, runtime/zero/config.py,
runtime/zero/offload_config.py, runtime/precision_config.py, monitor/config.py, comm/config.py). A contract
test compares them with the installed version.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

TOP_LEVEL: dict[str, str] = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "managed_gradient_accumulation": "bool",
    "gradient_clipping": "number",
    "steps_per_print": "steps",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "disable_allgather": "bool",
    "log_level": "str",
    "vocabulary_size": "int",
    "communication_data_type": "str",
    "seq_parallel_communication_data_type": "str",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "str",
    "zero_optimization": "section",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "optimizer": "section",
    "scheduler": "section",
    "bf16": "section",
    "bfloat16": "section",
    "fp16": "section",
    "torch_autocast": "section",
    "data_types": "section",
    "activation_checkpointing": "section",
    "comms_logger": "section",
    "flops_profiler": "section",
    "timers": "section",
    "tensorboard": "section",
    "wandb": "section",
    "csv_monitor": "section",
    "comet": "section",
    "checkpoint": "section",
    "datastates_ckpt": "any",
    "aio": "section",
    "autotuning": "section",
    "compile": "section",
    "dataloader_drop_last": "bool",
    "data_efficiency": "section",
    "data_parallel_size": "int",
    "sequence_parallel_size": "int",
    "tensor_parallel": "section",
    "expert_parallel": "section",
    "use_data_before_expert_parallelism": "bool",
    "pipeline": "section",
    "hybrid_engine": "section",
    "weight_quantization": "section",
}

REMOVED_TOP_LEVEL = (
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
)
"""Keys of features that 0.19.8 no longer has; DeepSpeed raises an error when it finds them."""

REMOVED_ZERO = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")

ZERO: dict[str, str] = {
    "stage": "int",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "int",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "int",
    "overlap_comm": "bool",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "elastic_checkpoint": "bool",
    "offload_param": "section",
    "offload_optimizer": "section",
    "zenflow": "section",
    "sub_group_size": "int",
    "cpu_offload": "bool",
    "cpu_offload_param": "bool",
    "cpu_offload_use_pin_memory": "bool",
    "stage3_prefetch_bucket_size": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_module_granularity_threshold": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
    "prefetch_bucket_size": "int",
    "param_persistence_threshold": "int",
    "model_persistence_threshold": "int",
    "max_live_parameters": "int",
    "max_reuse_distance": "int",
    "gather_16bit_weights_on_model_save": "bool",
    "module_granularity_threshold": "int",
    "use_all_reduce_for_fetch_params": "bool",
    "allgather_sequential": "bool",
    "stage3_gather_fp16_weights_on_model_save": "bool",
    "ignore_unused_parameters": "bool",
    "legacy_stage1": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "int",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "pipeline_loading_checkpoint": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
    "save_muon_momentum_buffer_in_memory": "bool",
    "leaf_module": "section",
}

SECTIONS: dict[str, dict[str, str]] = {
    "zero_optimization": ZERO,
    "zero_optimization.offload_optimizer": {
        "device": "str", "nvme_path": "str", "buffer_count": "int", "pin_memory": "bool",
        "pipeline_read": "bool", "pipeline_write": "bool", "fast_init": "bool", "ratio": "number",
        "super_offload": "bool",
        "cpuadam_cores_perc": "number",
    },
    "zero_optimization.offload_param": {
        "device": "str", "nvme_path": "str", "buffer_count": "int", "buffer_size": "int", "max_in_cpu": "int",
        "pin_memory": "bool",
    },
    "zero_optimization.leaf_module": {"classes": "any", "names": "any", "name_suffixes": "any"},
    "bf16": {
        "enabled": "bool", "immediate_grad_update": "bool", "check_grad_overflow": "bool",
        "bf16_master_weights_and_grads": "bool", "bf16_optimizer_states": "bool",
    },
    "fp16": {
        "enabled": "bool", "auto_cast": "bool", "loss_scale": "number", "initial_scale_power": "int",
        "loss_scale_window": "int", "hysteresis": "int", "consecutive_hysteresis": "bool",
        "min_loss_scale": "int", "fp16_master_weights_and_grads": "bool",
    },
    "data_types": {
        "grad_accum_dtype": "str", "param_dtype": "str", "buffer_dtype": "str", "keep_in_fp32_modules": "any",
    },
    "optimizer": {"type": "str", "params": "section", "legacy_fusion": "bool"},
    "tensorboard": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "csv_monitor": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "wandb": {"enabled": "bool", "group": "str", "team": "str", "project": "str"},
    "comet": {
        "enabled": "bool", "samples_log_interval": "int", "project": "str", "workspace": "str",
        "api_key": "str", "experiment_name": "str", "experiment_key": "str", "online": "bool", "mode": "str",
    },
    "comms_logger": {
        "enabled": "bool", "prof_all": "bool", "prof_ops": "any", "verbose": "bool", "debug": "bool",
    },
    "flops_profiler": {
        "enabled": "bool", "recompute_fwd_factor": "number", "profile_step": "int", "module_depth": "int",
        "top_modules": "int", "detailed": "bool", "output_file": "str",
    },
}  # fmt: skip

OPTIMIZER_PARAMS: dict[str, str] = {
    "lr": "number",
    "betas": "any",
    "eps": "number",
    "weight_decay": "number",
    "bias_correction": "bool",
    "adam_w_mode": "bool",
    "torch_adam": "bool",
    "foreach": "bool",
    "amsgrad": "bool",
    "fp32_optimizer_states": "bool",
    "max_grad_norm": "number",
}
"""Parameters of the Adam that DeepSpeed builds itself (FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)."""

_KIND_NAMES = {
    "int": "a whole number",
    "steps": "a whole number or Infinity",
    "number": "a number",
    "bool": "true or false",
    "str": "a string",
    "section": "an object {...}",
}


def kind_problem(kind: str, value: Any) -> str | None:
    """Say what ``value`` should have been, or None if it fits ``kind`` ("auto" and null always do)."""
    if value is None or value == "auto" or kind == "any":
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "int": is_number and float(value).is_integer(),
        "steps": is_number and (float(value).is_integer() or value == float("inf")),
        "number": is_number and isfinite(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "section": isinstance(value, dict),
    }[kind]
    return None if fits else f"must be {_KIND_NAMES[kind]}"
