"""Which modules are trained in full beside the adapters: heads, and those that ``adapter.also_train`` names. No torch.

``salient-ds check`` and injection ask the same functions, so both name the same modules. The exported adapter has these
modules as PEFT's ``modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.targets import is_suffix
from salient_ds.strict import nearest

if TYPE_CHECKING:
    from torch import nn

_WITH_HEAD = ("ForSequenceClassification", "ForQuestionAnswering")
"""Endings of the class names of models whose head is not a language model's."""
_BACKBONE = ("shared", "encoder", "decoder")
"""Children of a model that has its backbone not in one child, but in these (T5ForQuestionAnswering)."""


@dataclass(frozen=True)
class Parts:
    """What of a model can be trained in full."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Path of every module that holds parameters itself -> their number, in model order. A shared one counts once."""
    head: tuple[str, ...] = ()
    """Paths of the modules that make up the head; empty for a language model."""

    def trained(self, adapter: AdapterConfig, fresh: Iterable[str] = ()) -> list[str]:
        """Paths of the modules that a run trains in full: outermost ones, in model order.

        Args:
            fresh: paths of parameters or modules that the checkpoint lacks. Those in the head are trained by default.

        Raises:
            ValueError: ``adapter.also_train`` names something that is not there, or there is no head to train.
        """
        chosen = [path for name in adapter.also_train for path in self._matching(name)]
        if adapter.train_head is True and not self.head:
            raise ValueError(
                "adapter.train_head=true, but the model has no head beside its language model's: set it to auto, or "
                "name the output layer in adapter.also_train"
            )
        if adapter.train_head is True:
            chosen += self.head
        elif adapter.train_head == "auto":
            names = list(fresh)
            chosen += [path for path in self.head if any(is_inside(name, path) for name in names)]
        kept = [path for path in dict.fromkeys(chosen) if not any(is_inside(path, o) and path != o for o in chosen)]
        order = list(self.sizes)
        return sorted(kept, key=lambda path: next(i for i, part in enumerate(order) if is_inside(part, path)))

    def fresh(self, names: Iterable[str]) -> list[str]:
        """Paths of the head's modules of which a checkpoint with tensors ``names`` holds nothing.

        Names on disk may lack the first part of a path.
        """
        there = list(names)

        def held(path: str) -> bool:
            starts = tuple(f"{start}." for start in (path, path.partition(".")[2]) if start)
            return any(name.startswith(starts) for name in there)

        return [path for path in self.head if not held(path)]

    def elements(self, trained: Iterable[str]) -> int:
        """Number of parameters (elements) in the modules ``trained``."""
        modules = list(trained)
        return sum(n for path, n in self.sizes.items() if any(is_inside(path, module) for module in modules))

    def _matching(self, name: str) -> list[str]:
        known = dict.fromkeys(prefix for path in self.sizes for prefix in _prefixes(path))
        found = [path for path in known if is_suffix(path, name)]
        if not found:
            leaves = dict.fromkeys(path.rpartition(".")[2] for path in known)
            close = nearest(name.rpartition(".")[2], leaves)
            hint = f"did you mean {close!r}?" if close else f"modules are called {', '.join(list(leaves)[:12])}, ..."
            raise ValueError(f"adapter.also_train: {name!r} is no module of the model with parameters: {hint}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Parts:
        """Read what :meth:`to_json` made."""
        return cls(dict(data["sizes"]), tuple(data["head"]))


def parts(model: nn.Module, shape_of: Callable[[nn.Parameter], tuple[int, ...]]) -> Parts:
    """Look through ``model``, which may be without weights (on the meta device).

    Args:
        shape_of: gives the shape of a whole parameter, if ZeRO-3 may have partitioned it.
    """
    from math import prod

    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if path and own:
            sizes[path] = sum(prod(shape_of(parameter)) for parameter in own if id(parameter) not in seen)
            seen |= {id(parameter) for parameter in own}
    return Parts(sizes, head_modules(model))


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that make up the head of a classifier, a regression or a question-answering model.

    They are what lies beside the backbone, and the backbone's pooler where a classifier reads it. Empty for language
    models and for models that are not of transformers.
    """
    kind = type(model).__name__
    if not kind.endswith(_WITH_HEAD):
        return ()
    prefix = getattr(model, "base_model_prefix", "")
    beside = [name for name, child in model.named_children()
              if name != prefix and name not in _BACKBONE and any(True for _ in child.parameters())]  # fmt: skip
    backbone = getattr(model, prefix, None) if prefix else None
    pooler = getattr(backbone, "pooler", None)
    return tuple([f"{prefix}.pooler"] * (pooler is not None and kind.endswith(_WITH_HEAD[0])) + beside)


def is_inside(path: str, module: str) -> bool:
    """Whether ``path`` is ``module`` or lies in it."""
    return path == module or path.startswith(f"{module}.")


def _prefixes(path: str) -> Sequence[str]:
    words = path.split(".")
    return [".".join(words[: end + 1]) for end in range(len(words))]
