"""Triton kernels of liger-kernel (option ``speed.liger``): which models have them, and their way into a loaded model.

The fused loss (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training") multiplies hidden states by
the output layer in chunks, and takes loss and gradient of a chunk before the next: of the logits (tokens x vocabulary)
never more than one chunk exists. It is the mean over targets that are not -100, as transformers' is, and returns no
logits.

No torch here until :func:`apply_kernels` is called: the checks before a run read the library's source.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salient_ds.config.speed import SpeedConfig
from salient_ds.strict import nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGE = "liger_kernel"
_PATCHES = "transformers/monkey_patch.py"
_TABLE = "MODEL_TYPE_TO_APPLY_LIGER_FN"
"""The library's table from transformers' model types to the functions that patch them."""
_LOSS = "fused_linear_cross_entropy"
"""The switch of the fused loss in each of them; off by default where the model has none."""


def kernel_problems(speed: SpeedConfig, model_type: str | None) -> list[str]:
    """Why this model cannot have the kernels that ``speed.liger`` asks for: at most one sentence.

    A missing GPU is none of them: runs are checked on machines without one.

    Args:
        model_type: of config.json; None: unknown, only the installation is checked.
    """
    if speed.liger == "none":
        return []
    source = _patches()
    if source is None:
        return [
            f"speed.liger={speed.liger} needs liger-kernel, which is not installed here: "
            "pip install 'salient-ds[liger]', or use none"
        ]
    supported = model_types(source)
    if model_type is None or model_type in supported:
        return []
    close = nearest(model_type, supported)
    hint = f" (nearest name: {close})" if close else ""
    return [
        f"speed.liger={speed.liger}: liger-kernel has no fused loss for model type {model_type!r}{hint}, use none; it "
        f"has one for {', '.join(supported)}"
    ]


def _patches() -> Path | None:
    """The library's file of patches, found without importing it (that would import torch and triton)."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return next((path for path in (Path(place) / _PATCHES for place in places) if path.is_file()), None)


@functools.cache
def model_types(source: Path) -> list[str]:
    """Model types with a fused loss by the library's own table, sorted.

    Raises:
        ValueError: the file holds no such table: a version of the library that is not known here.
    """
    tree = ast.parse(source.read_text())
    table = next((node.value for node in tree.body if isinstance(node, ast.Assign) and _names(node) == [_TABLE]), None)
    if not isinstance(table, ast.Dict):
        raise ValueError(f"liger-kernel has no {_TABLE} any more: pip install 'salient-ds[liger]' brings one that has")
    able = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _has_loss(node)}
    pairs = zip(table.keys, table.values, strict=True)
    return sorted(ast.literal_eval(key) for key, value in pairs if key is not None and ast.unparse(value) in able)


def _names(node: ast.Assign) -> list[str]:
    return [ast.unparse(target) for target in node.targets]


def _has_loss(function: ast.FunctionDef) -> bool:
    arguments = function.args
    defaults = dict(zip([a.arg for a in arguments.args][::-1], arguments.defaults[::-1], strict=False))
    defaults |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None}
    default = defaults.get(_LOSS)
    return isinstance(default, ast.Constant) and default.value is True


def apply_kernels(model: nn.Module, speed: SpeedConfig, device: torch.device) -> None:
    """Give ``model`` the kernels that ``speed.liger`` asks for; nothing to do for "none".

    "loss" changes this object only. "all" also exchanges functions in transformers' module of the model type (rotary
    embedding), for the rest of the process. Adapters may come before or after it: modules are called, not replaced.

    Raises:
        ValueError: no CUDA device, library not installed, or no fused loss for this model.
    """
    if speed.liger == "none":
        return
    if device.type != "cuda":
        raise ValueError(
            f"speed.liger={speed.liger} needs a CUDA device (its kernels are written in Triton), and this run is on "
            f"{device.type}: set it to none"
        )
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    problems = kernel_problems(speed, model_type)
    if problems:
        raise ValueError(problems[0])
    patch = _patch_function(model_type)
    patch(model=model, **dict(_switches(patch, speed.liger == "all")))
    if not has_fused_loss(model):
        raise ValueError(
            f"speed.liger={speed.liger}: liger-kernel left the loss of {type(model).__name__} as it was: use none"
        )


def _patch_function(model_type: str) -> Callable[..., None]:
    from liger_kernel.transformers import monkey_patch

    table: dict[str, Callable[..., None]] = getattr(monkey_patch, _TABLE)
    return table[model_type]


def _switches(patch: Callable[..., None], everything: bool) -> Iterator[tuple[str, bool]]:
    """The fused loss on; everything else off, or what the library turns on itself."""
    for name, parameter in inspect.signature(patch).parameters.items():
        if name == _LOSS:
            yield name, True
        elif isinstance(parameter.default, bool) and not everything:
            yield name, False


def has_fused_loss(model: nn.Module) -> bool:
    """Whether ``model``'s forward pass is the library's: only that one can be told to return no logits."""
    return "skip_logits" in inspect.signature(model.forward).parameters


def loss_only(speed: SpeedConfig) -> dict[str, Any]:
    """Arguments of a forward pass in evaluation mode of which nothing but the loss is wanted.

    In training mode the fused loss is taken whenever there are labels, in evaluation mode it must be asked for.
    """
    return {} if speed.liger == "none" else {"skip_logits": True}
