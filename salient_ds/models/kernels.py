"""Triton kernels of liger-kernel (option ``speed.liger``): which models have them, and how a loaded model gets them.

The fused loss (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training") multiplies hidden states by
the output layer in chunks, and computes loss and gradient of each chunk before the next. So no more than one chunk of
the logits (tokens x vocabulary) ever exists. Like transformers' loss, it is the mean over targets that are not -100. It
returns no logits.

Nothing here imports torch before :func:`apply_kernels` is called: the checks before a run read the library's source.
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
"""The argument of these functions that switches the fused loss on. Its default is False where there is no such loss."""


def kernel_problems(speed: SpeedConfig, model_type: str | None) -> list[str]:
    """Why this model cannot have the kernels that ``speed.liger`` asks for: at most one sentence.

    A missing GPU is not a reason, because runs are checked on machines without one.

    Args:
        model_type: from config.json; None: unknown, so only the installation is checked.
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
    """The library's file of patches. It is found without an import, which would also import torch and triton."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return next((path for path in (Path(place) / _PATCHES for place in places) if path.is_file()), None)


@functools.cache
def model_types(source: Path) -> list[str]:
    """The model types for which the library has a fused loss, sorted.

    Args:
        source: the library's file of patches.

    Raises:
        ValueError: the file does not hold the expected table, as in a version of the library that is not known here.
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
    """Give ``model`` the kernels that ``speed.liger`` asks for. Does nothing for "none".

    "loss" changes only this object. "all" also replaces functions in transformers' module of the model type (rotary
    embedding), for the rest of the process. Adapters may be injected before or after: the kernels call the model's
    modules and do not replace them.

    Raises:
        ValueError: there is no CUDA device, the library is not installed, or it has no fused loss for this model.
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
    """Arguments of the patch: the fused loss on, and all else off, or with ``everything`` at the library's defaults."""
    for name, parameter in inspect.signature(patch).parameters.items():
        if name == _LOSS:
            yield name, True
        elif isinstance(parameter.default, bool) and not everything:
            yield name, False


def has_fused_loss(model: nn.Module) -> bool:
    """Whether ``model`` has the library's forward pass: only that one takes an argument for returning no logits."""
    return "skip_logits" in inspect.signature(model.forward).parameters


def loss_only(speed: SpeedConfig) -> dict[str, Any]:
    """Arguments for a forward pass in evaluation mode if only its loss is needed.

    In training mode the fused loss is used whenever there are labels. In evaluation mode it must be requested.
    """
    return {} if speed.liger == "none" else {"skip_logits": True}
