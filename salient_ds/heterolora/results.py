"""The results of a search: a configuration to train, PEFT's patterns, scores, on-frequencies and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salient_ds.adapters.targets import is_shortcut
from salient_ds.config.run import RunConfig
from salient_ds.heterolora.module_map import save_module_map

FILES = ("final.yaml", "rank_pattern.json", "scores.json", "history.json", "on_frequency.json", "modules.png")


def chosen_config(
    config: RunConfig, on: Sequence[str], rank: int | None = None, method: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run configuration that trains only the modules in ``on``, as a mapping for YAML.

    Args:
        on: paths of linear layers and shortcuts.
        rank: rank of every chosen module (default: as in the search, so fewer parameters are trained in total).
        method: section ``method`` of the result (default: LoRA, which switches no modules).

    Raises:
        ValueError: ``on`` is empty.
    """
    if not on:
        raise ValueError("no module is on: raise the budget")
    run: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    run["output_dir"] = f"{config.output_dir.rstrip('/')}-chosen"
    if Path(config.deepspeed).is_file():
        run["deepspeed"] = str(Path(config.deepspeed).resolve())
    run["method"] = dict(method or {"name": "lora"})
    run["adapter"]["target_modules"] = [name for name in on if not is_shortcut(name)]
    if rank is not None:
        run["adapter"]["rank"] = rank
    shortcuts = [name for name in on if is_shortcut(name)]
    kept = config.adapter.shortcuts
    if kept is not None and (shortcuts or kept.norm_after_shortcut == "reuse"):
        own = rank or kept.rank or config.adapter.rank
        run["adapter"]["shortcuts"] = kept.model_dump(mode="json") | {"modules": shortcuts, "rank": own}
    else:
        run["adapter"].pop("shortcuts", None)
    return run


def peft_pattern(run: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig for the linear layers of a chosen configuration. Shortcuts are not LoRA."""
    adapter = run["adapter"]
    names, rank = adapter["target_modules"], adapter["rank"]
    alpha = adapter.get("alpha", 32.0)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.get("dropout", 0.0),
        "target_modules": names,
        "rank_pattern": {re.escape(name): rank for name in names},
        "alpha_pattern": {re.escape(name): alpha for name in names},
    }


def on_frequency(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Per module, the share of events after which it was on. Skipped events do not count."""
    taken = [entry["on"] for entry in history if "on" in entry]
    return {name: sum(on[k] for on in taken) / max(len(taken), 1) for k, name in enumerate(names)}


@dataclass(frozen=True)
class SearchRecord:
    """What a search has found, event by event."""

    modules: tuple[str, ...]
    history: Sequence[Mapping[str, Any]]
    """One entry per event: step, proxy, and either scores and on/off by module, or why the event was skipped."""
    mode: str
    unit: str
    """What the budget counts: modules or params."""


def write_search(
    folder: Path,
    config: RunConfig,
    found: SearchRecord,
    rank: int | None = None,
    then: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write FILES to ``folder`` and return the chosen configuration; None if no event took place.

    After more than one event, on_frequency.png is written as well.

    Args:
        rank, then: rank and method of the configuration, see :func:`chosen_config`.
    """
    taken = [entry for entry in found.history if "on" in entry]
    if not taken:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    names, last = found.modules, taken[-1]
    on = [name for name, is_on in zip(names, last["on"], strict=True) if is_on]
    run = chosen_config(config, on, rank, then)
    head = f"# chosen by {last['proxy']} after step {last['step']}: {len(on)} of {len(names)} modules\n"
    (folder / "final.yaml").write_text(head + yaml.safe_dump(run, sort_keys=False))
    scores = dict(zip(names, last["scores"], strict=True))
    frequency = on_frequency(taken, names)
    summary = {"step": last["step"], "proxy": last["proxy"], "mode": found.mode, "budget": last["budget"],
               "spent": last["spent"], "unit": found.unit, "scores": scores, "on": on}  # fmt: skip
    _write(folder / "rank_pattern.json", peft_pattern(run))
    _write(folder / "scores.json", summary)
    _write(folder / "history.json", {"modules": list(names), "events": list(found.history)})
    _write(folder / "on_frequency.json", frequency)
    title = f"{last['proxy']} after step {last['step']}"
    save_module_map(scores, on, folder / "modules.png", title, "score", log=True)
    if len(taken) > 1:
        title = f"How often a module was on ({len(taken)} events)"
        save_module_map(frequency, on, folder / "on_frequency.png", title, "share of events")
    return run


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
