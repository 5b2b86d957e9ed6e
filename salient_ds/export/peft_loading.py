"""Which matrices of an adapter PEFT would not load, although they are in the file.

PEFT (0.19 to 0.21, ``peft/utils/transformers_weight_conversion.py``) also loads adapters from before transformers 5
fused experts. For that it takes certain names to mean experts, wherever in the model they are, and runs transformers'
rules for old names over the names in the file, even if they are new ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from salient_ds.export.base_files import local_folder, some
from salient_ds.export.disk_names import CLASS_OF_TASK_TYPE
from salient_ds.models.meta_model import build_without_weights

_MEANS_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Group of models that are converted alike -> last parts of names that PEFT takes for those of experts."""


def misread_by_peft(modules: Iterable[str], base: Path | str, task_type: str) -> list[str]:
    """The ``modules`` whose factors PEFT would not load.

    Args:
        base: checkpoint directory or hub name of the base model. Nothing is found if it is not here, or if transformers
            cannot build it or has no such rules (before 5.23).
    """
    try:
        model = build_without_weights(local_folder(base), CLASS_OF_TASK_TYPE[task_type])
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings, dot_natural_key
    except (ValueError, ImportError):
        return []
    kind = model.config.model_type
    if conversion_mapping.get_checkpoint_conversion_mapping(kind) is None:
        return []
    groups: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = _MEANS_EXPERTS.get(groups.get(kind, ""), ())
    rules: Any = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    lost = []
    for module in sorted(modules, key=dot_natural_key):
        key = f"{module}.lora_A.weight"
        renamed = apply_renamings(key, renamings)
        if module.rpartition(".")[2] in names or not key.endswith(renamed):
            lost.append(module)
    return lost


def peft_warning(modules: Iterable[str], base: Path | str, task_type: str) -> str | None:
    """One line for the user if PEFT would load something else than the adapter."""
    lost = misread_by_peft(modules, base, task_type)
    if not lost:
        return None
    return (
        f"warning: PEFT takes the names of {len(lost)} matrices of this adapter for other ones and does not load them "
        f"({some(lost[:1])}, for example): use --form merged, or a server that reads names as they are"
    )
