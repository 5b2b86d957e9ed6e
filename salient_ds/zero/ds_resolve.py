"""Fills the "auto" fields of one ZeRO JSON from the run, and collects all of its problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salient_ds.config.run import RunConfig
from salient_ds.strict import did_you_mean
from salient_ds.zero.ds_keys import (
    OPTIMIZER_PARAMS,
    REMOVED_TOP_LEVEL,
    REMOVED_ZERO,
    SECTIONS,
    TOP_LEVEL,
    kind_problem,
)
from salient_ds.zero.ds_refusals import REFUSALS, optimizer_refusal

MISSING = object()
ANY = object()

_REFUSED_PARAMS: dict[str, tuple[Any, str]] = {
    "max_grad_norm": (ANY, "clipping is train.max_grad_norm in the run file; remove it"),
    "amsgrad": (True, "its third moment would not be pruned with the others; set it to false"),
    "adam_w_mode": (False, "train.weight_decay is decoupled (AdamW); remove it"),
    "fp32_optimizer_states": (False, "moments are kept in fp32; remove it"),
}
"""Refused values of optimizer parameters (ANY: every value), and why."""

_AUTO_ALLOWED = ("data_types.keep_in_fp32_modules", "zero_optimization.stage")
"""Keys that may still be "auto" at the end: the first means something to DeepSpeed, the second has its own message."""


class Resolver:
    """Fills one ZeRO JSON in place and collects its problems."""

    def __init__(self, ds: dict[str, Any], run: RunConfig, world_size: int, source: str, run_source: str) -> None:
        self.ds, self.run, self.world_size = ds, run, world_size
        self.source, self.run_source = source, run_source
        self.problems: list[str] = []
        self.refused: set[str] = set()  # paths that have a problem already, so that no second one is reported

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.source}: {text}")

    def get(self, path: str) -> Any:
        """Value at a dotted path, or MISSING."""
        node: Any = self.ds
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return MISSING
            node = node[part]
        return node

    def put(self, path: str, value: Any) -> None:
        *parents, last = path.split(".")
        node = self.ds
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value

    def own(self, path: str, value: Any, owner: str) -> None:
        """Fill ``path``, which the run owns, if it is "auto" or missing. Any other value must equal the run's.

        Args:
            owner: names the run's setting and its value in the message.
        """
        given = self.get(path)
        if given is MISSING or given == "auto":
            self.put(path, value)
        elif given != value:
            self.problem(
                f'{path}={json.dumps(given)}, {self.run_source}: {owner}: set the former to "auto" or make them equal'
            )

    def default(self, path: str, value: Any) -> None:
        """Fill ``path`` if it is "auto" or missing, and accept any other value."""
        if self.get(path) in (MISSING, "auto"):
            self.put(path, value)

    def drop_nulls(self) -> None:
        """Remove null values, which mean "not set". DeepSpeed would use some of them as values and fail on others."""
        self.ds = _without_nulls(self.ds)

    def check_keys(self) -> None:
        """Report unknown keys and values of the wrong type, and rename "bfloat16" to "bf16"."""
        self._check_section("", self.ds, TOP_LEVEL, REMOVED_TOP_LEVEL)
        for path, known in SECTIONS.items():
            section = self.get(path)
            if isinstance(section, dict):
                self._check_section(f"{path}.", section, known, REMOVED_ZERO if path == "zero_optimization" else ())
        params = self.get("optimizer.params")
        name = self.get("optimizer.type")
        if isinstance(params, dict) and isinstance(name, str) and optimizer_refusal(name) is None:
            self._check_section("optimizer.params.", params, OPTIMIZER_PARAMS, ())
        if "bf16" in self.ds and "bfloat16" in self.ds:
            self.problem('both "bf16" and its old name "bfloat16" are set: keep "bf16"')
        elif "bfloat16" in self.ds:
            self.ds["bf16"] = self.ds.pop("bfloat16")

    def _check_section(
        self, prefix: str, section: dict[str, Any], known: dict[str, str], removed: tuple[str, ...]
    ) -> None:
        for key, value in section.items():
            if key in removed:
                continue
            if key not in known:
                hint = did_you_mean(key, known) or f"known: {', '.join(sorted(known))}"
                self.problem(f"unknown key {prefix + key!r} (DeepSpeed 0.19.8 would ignore or reject it): {hint}")
                continue
            wrong = kind_problem(known[key], value)
            if wrong:
                self.problem(f"{prefix}{key}={json.dumps(value)} {wrong}")

    def refuse(self, total_steps: int | None) -> None:
        """Report settings that :mod:`salient_ds.zero.ds_refusals` lists, and profiling after the last step."""
        for rule in REFUSALS:
            value = self.get(rule.path)
            if value is not MISSING and rule.when(value):
                self.refused.add(rule.path)
                shown = "" if isinstance(value, dict) else f"={json.dumps(value)}"
                self.problem(f"{rule.path}{shown} is refused: {rule.reason}; {rule.remedy}")
        step = self.get("flops_profiler.profile_step")
        profiling = self.get("flops_profiler.enabled") is True
        if profiling and isinstance(step, int) and total_steps is not None and step > total_steps:
            self.problem(f"flops_profiler.profile_step={step} is beyond the run's last step {total_steps}: lower it")

    def batch(self) -> None:
        """Fill in batch sizes, gradient accumulation and clipping."""
        train, world = self.run.train, self.world_size
        self.own("train_batch_size", train.global_batch_size, f"train.global_batch_size={train.global_batch_size}")
        self.own(
            "train_micro_batch_size_per_gpu",
            train.micro_batch_size,
            f"train.micro_batch_size={train.micro_batch_size}",
        )
        # 0.19.8 clips at 1.0 unless told otherwise, so the value is always written, 0 included
        self.own("gradient_clipping", train.max_grad_norm, f"train.max_grad_norm={train.max_grad_norm:g}")
        per_pass = train.micro_batch_size * world
        if train.global_batch_size % per_pass:
            lower = train.global_batch_size // per_pass * per_pass
            nearest = " or ".join(str(n) for n in (lower, lower + per_pass) if n)
            self.problems.append(
                f"{self.run_source}: train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size x processes = {train.micro_batch_size} x {world} = {per_pass}: "
                f"set it to {nearest}, or lower the micro-batch"
            )
            self.refused.add("gradient_accumulation_steps")
            return
        steps = train.global_batch_size // per_pass
        self.own(
            "gradient_accumulation_steps",
            steps,
            f"train.global_batch_size / (train.micro_batch_size x processes) = "
            f"{train.global_batch_size} / ({train.micro_batch_size} x {world}) = {steps}",
        )

    def precision(self) -> None:
        """Fill in the training precision."""
        precision = self.run.train.precision
        for section in ("bf16", "fp16"):
            if self.get(section) == "auto":
                self.ds.pop(section)
            self.own(f"{section}.enabled", precision == section, f"train.precision={precision!r}")
        if self.get("data_types.param_dtype") is not MISSING:
            self.own("data_types.param_dtype", precision, f"train.precision={precision!r}")
        accumulated = self.get("data_types.grad_accum_dtype")
        stage = self.get("zero_optimization.stage")
        if stage in (MISSING, 0) and accumulated not in (MISSING, "auto", precision):
            self.problem(
                f"data_types.grad_accum_dtype={accumulated!r} differs from train.precision={precision!r}: "
                "DeepSpeed supports that from ZeRO stage 1 on, remove it or raise the stage"
            )

    def optimizer(self) -> None:
        """Fill in the optimizer's parameters, if there is an optimizer section (else the run builds torch's AdamW)."""
        section = self.get("optimizer")
        if not isinstance(section, dict):
            self.ds.pop("optimizer", None)
            if self.get("zero_force_ds_cpu_optimizer") is True and self._offloads_optimizer():
                self.problem(
                    "zero_force_ds_cpu_optimizer=true, but without an optimizer section torch's AdamW is "
                    'used: set it to "auto", or add "optimizer": {"type": "AdamW"}'
                )
        else:
            self._optimizer_section(section)
        self.default("zero_allow_untested_optimizer", True)
        self.default("zero_force_ds_cpu_optimizer", False)

    def _offloads_optimizer(self) -> bool:
        return bool(self.get("zero_optimization.offload_optimizer.device") == "cpu")

    def _optimizer_section(self, section: dict[str, Any]) -> None:
        name = section.get("type")
        if not isinstance(name, str) or name == "auto":
            self.problem(f'optimizer.type={json.dumps(name)}: give "AdamW", or remove the section')
            return
        reason = optimizer_refusal(name)
        if reason:
            self.problem(f'optimizer.type="{name}" is refused: {reason}; use "AdamW" or remove the section')
            return
        train = self.run.train
        if section.get("params", "auto") == "auto":
            section["params"] = {}
        self.own("optimizer.params.lr", train.lr, f"train.lr={train.lr:g}")
        self.own("optimizer.params.betas", list(train.betas), f"train.betas={list(train.betas)}")
        self.own("optimizer.params.eps", train.eps, f"train.eps={train.eps:g}")
        decay = train.weight_decay
        self.own("optimizer.params.weight_decay", decay, f"train.weight_decay={decay:g}")
        for key, (refused, reason) in _REFUSED_PARAMS.items():
            value = section["params"].get(key)
            if value == "auto":
                section["params"].pop(key)
            elif value is not None and refused in (value, ANY):
                self.problem(f"optimizer.params.{key}={json.dumps(value)} is refused: {reason}")

    def zero(self, hidden_size: int | None) -> None:
        """Check stage and offload, and fill in buffer sizes from the hidden size."""
        zero = self.ds.get("zero_optimization")
        if zero is None or zero == "auto":
            self.ds["zero_optimization"] = zero = {}
        stage = zero.setdefault("stage", 0)
        if stage not in (0, 1, 2, 3):
            self.problem(f"zero_optimization.stage={json.dumps(stage)}: must be 0, 1, 2 or 3")
        by_hidden_size: dict[str, Callable[[int], int]] = {
            "reduce_bucket_size": lambda hidden: hidden * hidden,
            "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
        }
        for key, formula in by_hidden_size.items():
            if zero.get(key) == "auto" and hidden_size is not None:
                zero[key] = formula(hidden_size)
        for key in [key for key, value in zero.items() if value == "auto" and key != "stage"]:
            del zero[key]  # DeepSpeed too uses its default for "auto" in this section
        for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
            device = (zero.get(section) or {}).get("device", "none")
            if device not in ("none", "cpu") and f"zero_optimization.{section}.device" not in self.refused:
                self.problem(
                    f"zero_optimization.{section}.device={json.dumps(device)}: is no device to offload to, use "
                    '"cpu" or "none"'
                )
            if (zero.get(section) or {}).get("device", "none") != "none" and stage in range(lowest):
                self.problem(
                    f"zero_optimization.{section} needs stage {lowest} or higher, but stage={stage}: "
                    "raise the stage or remove the section"
                )

    def monitors(self) -> None:
        """Put TensorBoard and CSV files into the run directory, unless the JSON says otherwise."""
        run_dir = Path(self.run.output_dir)
        for section in ("tensorboard", "csv_monitor"):
            if self.get(f"{section}.enabled") is True:
                self.default(f"{section}.output_path", str(run_dir / "monitor"))
                self.default(f"{section}.job_name", run_dir.name)

    def leftovers(self, node: dict[str, Any], prefix: str) -> None:
        """Report every value that is still "auto": the run has no setting for it."""
        for key, value in node.items():
            path = prefix + key
            if path in self.refused:
                continue
            if isinstance(value, dict):
                self.leftovers(value, f"{path}.")
            elif value == "auto" and path not in _AUTO_ALLOWED:
                self.problem(f'{path}="auto": the run has no such setting, give a value or remove the key')


def _without_nulls(node: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in node.items()
        if value is not None
    }
