"""What the adapter_config.json of a PEFT LoRA adapter says about its factors, and what it must not say.

The update of a module is scale * B A. PEFT (0.21, ``tuners/lora/layer.py``) computes the scale as alpha / r, or as
alpha / sqrt(r) with rsLoRA. Both numbers may differ between modules (``alpha_pattern``, ``rank_pattern``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
_NOT_A_PRODUCT = {
    "use_dora": "DoRA divides by the norm of the whole merged weight, which the base model is needed for",
    "lora_bias": "the factor B has a bias, which no factors of lower rank can carry",
    "use_qalora": "QA-LoRA averages groups of inputs before the factors",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, and singular vectors are not",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA also changes the base model's weights",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "target_parameters": "it adapts parameters with more than two dimensions, such as stacked experts",
    "layer_replication": "its layers are copies of the base model's",
    "megatron_config": "its factors are parts of those of tensor-parallel layers",
}
"""Fields whose adapters are not scale * B A of one matrix, and why."""
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base model's weights, which PEFT repeats whenever it loads the adapter."""
_KNOWN_ELSEWHERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save", "lora_dropout", "fan_in_fan_out", "bias", "trainable_token_indices", "alora_invocation_tokens",
    "exclude_modules", "ensure_weight_tying", "megatron_core", "qalora_group_size", "salient_ds",
}  # fmt: skip
"""Fields that do not concern the factors. They are carried over."""
_REPLACED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "layers_to_transform",
    "layers_pattern", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "velora_config", "runtime_config",
}  # fmt: skip
"""Fields that name modules and ranks, which a writer states anew, or that matter before training only."""


@dataclass(frozen=True)
class LoraConfig:
    """A configuration of plain LoRA."""

    path: Path
    values: Mapping[str, Any]
    """The fields as they are stored."""

    def rank_of(self, module: str) -> int:
        """The rank that PEFT gives to a module."""
        return int(self._of(module, "rank_pattern", "r"))

    def scaling(self, module: str) -> float:
        """The scale of a module's update."""
        alpha, rank = self._of(module, "alpha_pattern", "lora_alpha"), self.rank_of(module)
        return float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, default: str) -> Any:
        """As ``peft.utils.other.get_pattern_key``: the first pattern that is the end of the path decides."""
        for pattern, value in (self.values.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.values[default]

    @property
    def carried(self) -> dict[str, Any]:
        """The fields that an adapter with other ranks keeps."""
        return {key: value for key, value in self.values.items() if key not in _REPLACED}

    @property
    def unknown(self) -> list[str]:
        """Fields that say something and that this version does not know. PEFT may have got them since."""
        known = _KNOWN_ELSEWHERE | _REPLACED | _NOT_A_PRODUCT.keys()
        return [key for key, value in self.values.items() if key not in known and value]


def read_lora_config(folder: Path) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        ValueError: ``folder`` holds no adapter, the file is damaged, or the adapter is not plain LoRA.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(_why_not(folder))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the adapter again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object: save the adapter again")
    _refuse_other_types(path, values)
    _check_numbers(path, values)
    return LoraConfig(path, values)


def _why_not(folder: Path) -> str:
    wanted = "give the directory of a PEFT LoRA adapter (adapter_config.json and adapter_model.safetensors)"
    if folder.is_file():
        return f"{folder} is a file: {wanted}"
    if not folder.exists():
        return (
            f"{folder} does not exist: {wanted}; one on the hub is fetched with `hf download NAME --local-dir FOLDER`"
        )
    if (folder / "shortcut_adapter.json").is_file():
        return f"{folder} is an adapter with shortcuts, which PEFT's format cannot hold: {wanted}"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a model (config.json), not an adapter; a merged adapter cannot be taken out again: {wanted}"
        )
    return f"{folder} holds no {CONFIG_FILE}: {wanted}"


def _refuse_other_types(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        remedy = "; salient-ds exports its own AdaLoRA runs as LORA" if kind == "ADALORA" else ""
        raise ValueError(f"{path} has peft_type {kind!r}, and only LORA has factors B A alone{remedy}")
    for field, reason in _NOT_A_PRODUCT.items():
        if values.get(field):
            raise ValueError(f"{path} sets {field}, so its updates are not products of two factors alone: {reason}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path} has init_lora_weights={start!r}, which changes the base model's weights by an amount that depends "
            "on the rank: save the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value.bit_length() < 64 if isinstance(value, int) else math.isfinite(value)


def _check_numbers(path: Path, values: Mapping[str, Any]) -> None:
    for default, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if default not in values:
            raise ValueError(f"{path} has no {default!r}: save the adapter again")
        table = values.get(patterns) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{path} has {patterns}={table!r}, expected names with numbers")
        for pattern in table:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path} has {pattern!r} in {patterns}, which is no pattern ({error})") from error
        for name, value in [(default, values[default]), *((f"{patterns}[{key!r}]", v) for key, v in table.items())]:
            if not _is_number(value) or (default == "r" and (value < 1 or value != int(value))):
                shown = value if not isinstance(value, int) or value.bit_length() < 64 else "a number of many digits"
                raise ValueError(
                    f"{path} has {name}={shown!r}, expected a {'rank above 0' if default == 'r' else 'number'}"
                )
