"""Which tensor of a checkpoint each adapted matrix is read from.

transformers renames, splits and fuses tensors while it loads them. Its own rules are applied to the names on disk here,
as ``from_pretrained`` does, so that a merged matrix is written back to where it came from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salient_ds.export.base_files import locate_by_suffix, some
from salient_ds.models.meta_model import build_without_weights
from salient_ds.strict import nearest

CLASS_OF_TASK_TYPE = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""transformers' auto class of each of PEFT's task types."""
_REMEDY = "export it as peft"


@dataclass(frozen=True)
class _Origin:
    """A tensor on disk that a parameter is made from."""

    key: str
    converted: bool
    """It is split, fused or permuted on the way, not only renamed."""


def locate_weights(modules: Iterable[str], keys: Iterable[str], folder: Path, task_type: str) -> dict[str, str]:
    """Find each module's weight among a checkpoint's tensor names.

    If transformers cannot build the model from ``folder``, names that agree up to a prefix belong together.

    Args:
        modules: paths of linear layers in the model that was trained.
        keys: names of all tensors in the checkpoint.
        task_type: PEFT's name of the task, which says as what class the model is loaded.

    Returns:
        module path -> tensor name; no two modules share a tensor.

    Raises:
        ValueError: some modules have no weight of their own, or only a part of a tensor; the message lists them.
    """
    modules, keys = list(modules), list(keys)
    try:
        model = build_without_weights(folder, CLASS_OF_TASK_TYPE[task_type])
    except ValueError:
        return locate_by_suffix(modules, keys)
    _refuse_shared(model, modules)
    origins = _origins(model, keys)
    found, lost, inside = {}, [], []
    for module in modules:
        sources = origins.get(f"{module}.weight", [])
        if len(sources) == 1 and not sources[0].converted:
            found[module] = sources[0].key
        elif any(source.converted for source in sources):
            inside.append(f"{module} ({some([source.key for source in sources])})")
        else:
            lost.append(_with_hint(module, [source.key for source in sources], keys))
    if inside:
        raise ValueError(
            f"{len(inside)} adapted modules are only a part of a tensor in the base checkpoint, or stored in another "
            f"order: {some(inside)}. They cannot be merged: {_REMEDY}"
        )
    if lost:
        raise ValueError(
            f"{len(lost)} adapted modules have no weight of their own in the base checkpoint: {some(lost)}. Is this "
            f"the model that was trained? A matrix tied to the embedding (lm_head) cannot be merged: {_REMEDY}"
        )
    return found


def locate_trained(names: Iterable[str], keys: Iterable[str], folder: Path, task_type: str) -> dict[str, str]:
    """Where a checkpoint has the parameters ``names``, which were trained in full.

    Returns:
        parameter name -> tensor name. A parameter that the checkpoint lacks, such as one of a fresh head, is left out.

    Raises:
        ValueError: a parameter is only a part of a tensor in the checkpoint, or is stored in another order.
    """
    names, keys = list(names), list(keys)
    try:
        origins = _origins(build_without_weights(folder, CLASS_OF_TASK_TYPE[task_type]), keys)
    except ValueError:
        return {name: name for name in names if name in keys}
    parts = [name for name in names if any(origin.converted for origin in origins.get(name, []))]
    if parts:
        raise ValueError(
            f"{some(parts)}: trained in full, but only a part of a tensor in the base checkpoint, or stored in another "
            f"order. That cannot be merged: {_REMEDY}"
        )
    return {name: origins[name][0].key for name in names if len(origins.get(name, [])) == 1}


def _refuse_shared(model: Any, modules: Iterable[str]) -> None:
    """Refuse modules whose weight is another module's as well: merging would change both."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    others = {name: [other for other in group if other != name] for group in groups.values() for name in group}
    weights = {module: others.get(f"{module}.weight") for module in modules}
    shared = [f"{module} (with {some(names)})" for module, names in weights.items() if names]
    if shared:
        raise ValueError(
            f"{len(shared)} adapted modules share their weight with another: {some(shared)}. Merging would change "
            f"both: {_REMEDY}"
        )


def _origins(model: Any, keys: Iterable[str]) -> dict[str, list[_Origin]]:
    """Parameter name -> tensors on disk, by the rules and in the order of transformers' own loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[_Origin]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        targets = [name] if pattern is None else _all_targets(name, of_pattern[pattern].target_patterns)
        for target in targets:
            found.setdefault(target, []).append(_Origin(key, pattern is not None))
    return found


def _all_targets(name: str, patterns: list[str]) -> list[str]:
    """The parameters that a converter makes, of which ``name`` is the first."""
    return [name.replace(patterns[0], pattern) for pattern in patterns]


def _with_hint(module: str, candidates: list[str], keys: list[str]) -> str:
    if candidates:
        return f"{module} (could be {some(candidates)})"
    near = nearest(f"{module}.weight", keys)
    return f"{module} (nearest: {near})" if near else module
