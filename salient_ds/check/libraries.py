"""Packages that a run asks for and this environment lacks. Their absence would end it after the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from salient_ds.config.run import RunConfig

MONITORS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "comet": ("comet_ml",)}
"""Section of the ZeRO JSON -> the package that DeepSpeed imports for it."""
_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def library_problems(run: RunConfig, ds_config: Mapping[str, Any] | None) -> list[str]:
    """One sentence for each missing package.

    Args:
        ds_config: the resolved ZeRO JSON; None if it could not be read.
    """
    found = []
    for section, (package,) in MONITORS.items():
        part = (ds_config or {}).get(section)
        if isinstance(part, Mapping) and part.get("enabled") and not _there(package):
            found.append(
                f'{run.deepspeed} has "{section}": {{"enabled": true}}, and {package} is not installed here: '
                f"pip install {package.replace('_', '-')}, or switch the section off"
            )
    for name in run.train.log:
        if name != "csv" and not _there(name):
            found.append(f"train.log has {name}, which is not installed here: pip install {name}, or take it out")
    wanted = run.model.attn_implementation
    module, package = _FLASH.get(wanted, ("", ""))
    if module and not _there(module) and not _there("kernels"):
        found.append(
            f"model.attn_implementation={wanted} needs the package {package}, which is not installed here: install it, "
            "or choose sdpa"
        )
    return found


def _there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a package that is being replaced in tests
        return False
