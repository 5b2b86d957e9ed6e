"""The one table of methods: every valid value of ``method.name``. No torch.

A method of another package is found through its entry point in the group "salient_ds.methods"; see ADDING.md.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from salient_ds.methods.options import MethodConfig
from salient_ds.strict import ConfigError, did_you_mean

BUILT_IN = (
    "salient_ds.methods.salientlora.options:SalientLoRAConfig",
    "salient_ds.methods.adalora.options:AdaLoRAConfig",
    "salient_ds.methods.lora2.options:LoRA2Config",
    "salient_ds.methods.increlora.options:IncreLoRAConfig",
    "salient_ds.heterolora.options:HeteroLoRAConfig",
    "salient_ds.methods.spectral.options:SpectralConfig",
    "salient_ds.methods.lora.options:LoRAConfig",
)
ENTRY_POINTS = "salient_ds.methods"
_registered: dict[str, type[MethodConfig]] = {}


def register(options: type[MethodConfig]) -> type[MethodConfig]:
    """Register a method of another package in this process; usable as a class decorator.

    Processes that a launcher starts do not see it. For them, declare an entry point.

    Raises:
        ValueError: the name is taken by another method, or the class has no default name.
    """
    name = options.model_fields["name"].default
    if not isinstance(name, str):
        raise ValueError(f'{options.__name__} has no name: declare name: Literal["my_method"] = "my_method"')
    other = methods().get(name)
    if other is not None and other is not options:
        raise ValueError(f"method name {name!r} is taken by {other.__module__}.{other.__name__}: choose another one")
    _registered[name] = options
    return options


def methods() -> dict[str, type[MethodConfig]]:
    """Options class of every method by name: built in, from entry points, and registered.

    Raises:
        ConfigError: an entry point cannot be loaded, is no subclass of MethodConfig, or takes the name of another
            method.
    """
    return {**_installed(), **_registered}


@cache
def _installed() -> dict[str, type[MethodConfig]]:
    found: dict[str, type[MethodConfig]] = {}
    for place in BUILT_IN:
        module, _, name = place.partition(":")
        options = getattr(import_module(module), name)
        found[options.model_fields["name"].default] = options
    for point in entry_points(group=ENTRY_POINTS):
        try:
            options = point.load()
        except Exception as error:
            raise ConfigError([
                f"method {point.name!r} of an installed package cannot be loaded from {point.value!r}: {error}; mend "
                "or uninstall that package"
            ]) from error  # fmt: skip
        if not (isinstance(options, type) and issubclass(options, MethodConfig)):
            raise ConfigError([f"entry point {point.value!r} in {ENTRY_POINTS} is no subclass of MethodConfig"])
        if found.get(point.name, options) is not options:
            raise ConfigError([f"entry point {point.value!r} takes the name of another method, {point.name!r}"])
        found[point.name] = options
    return found


def unknown_method(name: object) -> str:
    """Error message for a ``method`` section without a name (None), or with an unknown one."""
    known = list(methods())
    if name is None:
        return f"missing key 'method.name': choose one of {', '.join(known)}"
    hint = did_you_mean(str(name), known) or f"known keys: {', '.join(sorted(known))}"
    return f"method.name={name!r} is unknown: {hint} (known: {', '.join(known)})"
