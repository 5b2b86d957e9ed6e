"""Every refused feature is refused by name with a reason and a remedy, and harmless values of the same keys pass."""

from __future__ import annotations

from typing import Any

import pytest

from salient_ds.zero.ds_json import DsProblems, resolve_ds_config
from salient_ds.zero.ds_keys import REMOVED_TOP_LEVEL, REMOVED_ZERO
from salient_ds.zero.ds_refusals import REFUSALS
from tests.unit.zero_config.runs import make_run

# what each rule is about -> a value that it refuses, a value of the same key that is fine
CASES: dict[str, tuple[Any, Any]] = {
    "zero_optimization.offload_optimizer.device": ("nvme", "cpu"),
    "zero_optimization.offload_param.device": ("nvme", "cpu"),
    "zero_optimization.offload_optimizer.super_offload": (True, False),
    "zero_optimization.offload_optimizer.ratio": (0.5, 1.0),
    "zero_optimization.zenflow": ({"topk_ratio": 0.1}, None),
    "zero_optimization.zero_quantized_gradients": (True, False),
    "zero_optimization.zero_quantized_weights": (True, False),
    "zero_optimization.zero_quantized_nontrainable_weights": (True, False),
    "zero_optimization.zero_hpz_partition_size": (2, 1),
    "zero_optimization.compute_grad_norm": (False, True),
    "zero_optimization.legacy_stage1": (True, False),
    "zero_optimization.cpu_offload": (True, False),
    "zero_optimization.cpu_offload_param": (True, False),
    "zero_optimization.cpu_offload_use_pin_memory": (True, False),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (True, False),
    "bf16.bf16_master_weights_and_grads": (True, False),
    "bf16.bf16_optimizer_states": (True, False),
    "bf16.check_grad_overflow": (False, True),
    "fp16.fp16_master_weights_and_grads": (True, False),
    "torch_autocast": ({"enabled": True, "dtype": "bfloat16"}, {"enabled": False}),
    "gradient_allreduce_op": ("SUM", "mean"),
    "managed_gradient_accumulation": (False, True),
    "disable_allgather": (True, False),
    "scheduler": ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, {}),
    "activation_checkpointing": ({"cpu_checkpointing": True}, {}),
    "dataloader_drop_last": (True, False),
    "data_efficiency": ({"enabled": True}, {"enabled": False}),
    "compile": ({"deepcompile": True}, {"deepcompile": False}),
    "pipeline": ({"stages": 2}, {}),
    "tensor_parallel": ({"autotp_size": 2}, {"autotp_size": 1}),
    "expert_parallel": ({"enabled": True}, {"enabled": False}),
    "sequence_parallel_size": (2, 1),
    "hybrid_engine": ({"enabled": True}, {"enabled": False}),
    "weight_quantization": ({"x": 1}, {}),
    "autotuning": ({"enabled": True}, {"enabled": False}),
    "checkpoint.load_universal": (True, False),
}
REMOVED = {*REMOVED_TOP_LEVEL, *(f"zero_optimization.{key}" for key in REMOVED_ZERO)}


def nested(path: str, value: Any) -> dict[str, Any]:
    """A ZeRO-3 JSON with ``value`` at the dotted path."""
    ds: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    *parents, last = path.split(".")
    node = ds
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return ds


def test_every_rule_has_a_case() -> None:
    assert {rule.path for rule in REFUSALS} == set(CASES) | REMOVED


@pytest.mark.parametrize("path", CASES)
def test_refused_with_reason_and_remedy(path: str) -> None:
    rule = next(rule for rule in REFUSALS if rule.path == path)
    with pytest.raises(DsProblems) as caught:
        resolve_ds_config(nested(path, CASES[path][0]), make_run(), 1, None)
    (problem,) = caught.value.problems
    assert path in problem and rule.reason in problem and rule.remedy in problem
    assert problem.startswith("ds_configs/zero2.json: ")


@pytest.mark.parametrize("path", list(CASES))
def test_harmless_values_pass(path: str) -> None:
    resolve_ds_config(nested(path, CASES[path][1]), make_run(), 1, None)


@pytest.mark.parametrize("path", sorted(REMOVED))
def test_removed_features_name_the_version(path: str) -> None:
    with pytest.raises(DsProblems) as caught:
        resolve_ds_config(nested(path, {"enabled": True}), make_run(), 1, None)
    (problem,) = caught.value.problems
    assert path in problem and "was removed from DeepSpeed 0.19.8" in problem


def test_what_our_own_fragment_map_handles_is_accepted() -> None:
    zero = {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True, "reduce_scatter": False}
    resolve_ds_config({"zero_optimization": zero, "comms_logger": {"enabled": True}}, make_run(), 2, None)


def test_several_refusals_come_together() -> None:
    ds = {
        "zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}, "mics_shard_size": 2},
        "amp": {"enabled": True},
    }
    with pytest.raises(DsProblems) as caught:
        resolve_ds_config(ds, make_run(), 3, None)
    problems = "\n".join(caught.value.problems)
    for word in ("ZenFlow", "MiCS", "Apex AMP", "is not a multiple of"):
        assert word in problems
