"""Filling a ZeRO JSON from the run: what is written, what conflicts, what is wrong with the file itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.zero.ds_json import DsProblems, load_ds_config, resolve_ds_config, summary
from tests.unit.zero_config.runs import make_run


def problems_of(raw: dict[str, Any], world_size: int = 1, total_steps: int | None = 100, **train: Any) -> list[str]:
    with pytest.raises(DsProblems) as caught:
        resolve_ds_config(raw, make_run(**train), world_size, total_steps)
    return caught.value.problems


def test_an_empty_file_gets_every_essential_number() -> None:
    ds = resolve_ds_config({}, make_run(), 4, None)
    assert ds == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 0},
    }


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("bf16", True, False), ("fp16", False, True), ("fp32", False, False)]
)
def test_precision_owns_both_switches_and_keeps_the_rest(precision: str, bf16: bool, fp16: bool) -> None:
    raw = {"fp16": {"enabled": "auto", "initial_scale_power": 12}, "bf16": "auto"}
    ds = resolve_ds_config(raw, make_run(precision=precision), 1, None)
    assert ds["bf16"] == {"enabled": bf16}
    assert ds["fp16"] == {"enabled": fp16, "initial_scale_power": 12}


def test_the_given_file_is_not_changed() -> None:
    raw = {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    before = copy.deepcopy(raw)
    resolve_ds_config(raw, make_run(), 1, 100, hidden_size=64)
    assert raw == before


def test_clipping_is_written_even_when_it_is_off() -> None:
    # DeepSpeed 0.19.8 clips at 1.0 if the key is missing
    assert resolve_ds_config({}, make_run(max_grad_norm=0), 1, 100)["gradient_clipping"] == 0


def test_a_different_concrete_number_names_both_places() -> None:
    (problem,) = problems_of({"train_micro_batch_size_per_gpu": 4})
    assert problem == (
        "ds_configs/zero2.json: train_micro_batch_size_per_gpu=4, run.yaml: train.micro_batch_size=2: "
        'set the former to "auto" or make them equal'
    )


def test_equal_concrete_numbers_are_accepted() -> None:
    raw = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
           "gradient_clipping": 1, "bf16": {"enabled": True}}  # fmt: skip
    assert resolve_ds_config(raw, make_run(), 2, 100)["gradient_accumulation_steps"] == 4


def test_every_conflict_is_listed() -> None:
    raw = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
    }
    problems = problems_of(raw)
    for key, owner in [
        ("train_batch_size=8", "train.global_batch_size=16"),
        ("gradient_accumulation_steps=3", "16 / (2 x 1) = 8"),
        ("gradient_clipping=0.5", "train.max_grad_norm=1"),
        ("bf16.enabled=false", "train.precision='bf16'"),
        ("optimizer.params.lr=0.001", "train.lr=0.0005"),
        ("optimizer.params.betas=[0.9, 0.95]", "train.betas=[0.9, 0.999]"),
    ]:
        assert any(key in p and owner in p for p in problems), (key, problems)
    assert len(problems) == 6


def test_processes_that_do_not_divide_the_batch() -> None:
    (problem,) = problems_of({"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}, world_size=3)
    assert "train.global_batch_size=16 is not a multiple of train.micro_batch_size x processes = 2 x 3 = 6" in problem
    assert "set it to 12 or 18" in problem


def test_optimizer_section_is_filled_and_named_ones_are_refused() -> None:
    ds = resolve_ds_config(
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "amsgrad": "auto"}}}, make_run(), 1, 9
    )
    assert ds["optimizer"]["params"] == {"lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    for name, reason in [
        ("Muon", "Muon mixes the rows"),
        ("OneBitAdam", "1-bit optimizers were removed"),
        ("Lion", "moments"),
    ]:
        (problem,) = problems_of({"optimizer": {"type": name, "params": {"lr": 1}}})
        assert f'optimizer.type="{name}" is refused' in problem and reason in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_grad_norm", 1.0), ("amsgrad", True), ("adam_w_mode", False), ("fp32_optimizer_states", False)],
)
def test_optimizer_parameters_that_would_break_a_run(key: str, value: Any) -> None:
    (problem,) = problems_of({"optimizer": {"type": "Adam", "params": {key: value}}})
    assert problem.startswith(f"ds_configs/zero2.json: optimizer.params.{key}={json.dumps(value)} is refused")


def test_bucket_sizes_follow_the_hidden_size_or_deepspeed() -> None:
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    raw = {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto"), "overlap_comm": "auto"}}
    zero = resolve_ds_config(raw, make_run(), 1, None, hidden_size=4096)["zero_optimization"]
    assert [zero[key] for key in keys] == [4096**2, int(0.9 * 4096**2), 40960]
    assert resolve_ds_config(raw, make_run(), 1, None)["zero_optimization"] == {"stage": 3}


def test_auto_without_an_owner_is_an_error() -> None:
    (problem,) = problems_of({"steps_per_print": "auto"})
    assert 'steps_per_print="auto": the run has no such setting' in problem
    assert "data_types" in resolve_ds_config({"data_types": {"keep_in_fp32_modules": "auto"}}, make_run(), 1, None)


def test_unknown_keys_and_wrong_kinds_are_all_listed() -> None:
    raw = {
        "gradient_cliping": 1.0,
        "train_batch_size": "16",
        "bf16": True,
        "zero_optimization": {
            "stage": 2,
            "overlap_com": True,
            "reduce_bucket_size": 1.5,
            "offload_optimizer": {"devise": "cpu"},
        },
        "tensorboard": {"enable": True},
    }
    problems = problems_of(raw)
    for expected in [
        "unknown key 'gradient_cliping' (DeepSpeed 0.19.8 would ignore or reject it): did you mean "
        "'gradient_clipping'?",
        'train_batch_size="16" must be a whole number',
        "bf16=true must be an object",
        "unknown key 'zero_optimization.overlap_com'",
        "zero_optimization.reduce_bucket_size=1.5 must be a whole number",
        "unknown key 'zero_optimization.offload_optimizer.devise'",
        "unknown key 'tensorboard.enable'",
    ]:
        assert any(expected in p for p in problems), (expected, problems)
    assert len(problems) == 7


def test_scientific_notation_counts_as_a_whole_number() -> None:
    raw = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}
    assert resolve_ds_config(raw, make_run(), 1, None)["zero_optimization"]["reduce_bucket_size"] == 5e8


def test_null_means_not_set() -> None:
    raw = {"optimizer": None, "bf16": None, "tensorboard": None, "train_batch_size": None,
           "zero_optimization": {"stage": 2, "offload_optimizer": None, "overlap_comm": None}}  # fmt: skip
    expected = resolve_ds_config({"zero_optimization": {"stage": 2}}, make_run(), 1, None)
    assert resolve_ds_config(raw, make_run(), 1, None) == expected
    assert resolve_ds_config({"zero_optimization": None}, make_run(), 1, None)["zero_optimization"] == {"stage": 0}


def test_offload_needs_the_right_stage() -> None:
    (problem,) = problems_of({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}})
    assert "offload_param needs stage 3 or higher, but stage=2" in problem
    (problem,) = problems_of({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}})
    assert "offload_optimizer needs stage 1 or higher, but stage=0" in problem
    (problem,) = problems_of({"zero_optimization": {"stage": 4}})
    assert "stage=4: must be 0, 1, 2 or 3" in problem


def test_forced_cpu_optimizer_contradicts_our_own() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (problem,) = problems_of({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": True})
    assert "zero_force_ds_cpu_optimizer=true" in problem
    with_section = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": True, "optimizer": {"type": "AdamW"}}
    assert resolve_ds_config(with_section, make_run(), 1, None)["zero_force_ds_cpu_optimizer"] is True


def test_grad_accumulation_type_at_stage_0() -> None:
    raw = {"data_types": {"grad_accum_dtype": "fp32"}}
    (problem,) = problems_of(raw)
    assert "data_types.grad_accum_dtype='fp32' differs from train.precision='bf16'" in problem
    resolve_ds_config(raw | {"zero_optimization": {"stage": 1}}, make_run(), 1, None)


def test_profile_step_beyond_the_run() -> None:
    (problem,) = problems_of({"flops_profiler": {"enabled": True, "profile_step": 101}})
    assert "flops_profiler.profile_step=101 is beyond the run's last step 100" in problem


def test_old_name_of_bf16() -> None:
    ds = resolve_ds_config({"bfloat16": {"enabled": "auto"}}, make_run(), 1, None)
    assert ds["bf16"] == {"enabled": True} and "bfloat16" not in ds
    (problem,) = problems_of({"bfloat16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}})
    assert 'keep "bf16"' in problem


def test_monitor_files_go_into_the_run_directory() -> None:
    ds = resolve_ds_config({"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": False}}, make_run(), 1, None)
    assert ds["tensorboard"] == {"enabled": True, "output_path": "runs/demo/monitor", "job_name": "demo"}
    assert ds["csv_monitor"] == {"enabled": False}


def test_summary_uses_deepspeeds_defaults() -> None:
    plain = summary({})
    assert (plain.stage, plain.offload_optimizer, plain.offload_param, plain.overlap_comm) == (0, False, False, False)
    assert (plain.reduce_bucket_size, plain.max_live_parameters) == (500_000_000, 1_000_000_000)
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"},
            "stage3_max_live_parameters": 7}  # fmt: skip
    three = summary({"zero_optimization": zero})
    assert (three.stage, three.offload_optimizer, three.offload_param, three.overlap_comm) == (3, False, True, True)
    assert three.max_live_parameters == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "bf16": {"enabled": true,}\n}', "invalid JSON at line 2"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "key 'enabled' appears twice"),
        ("[1, 2]", "holds list, expected an object"),
        ('{"a": 1} // comment', "comments are not allowed"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(DsProblems) as caught:
        load_ds_config(path)
    (problem,) = caught.value.problems
    assert expected in problem and "zero.json" in problem


def test_a_missing_file_names_the_working_directory(tmp_path: Path) -> None:
    with pytest.raises(DsProblems, match="does not exist .working directory: "):
        load_ds_config(tmp_path / "nothing.json")
