"""Reads YAML files of sections and applies overrides, unvalidated. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from salient_ds.strict import ConfigError, extreme

_LARGEST_FILE = 2**20
_INSIDE = re.compile(r"\$\{[\w.\[\]-]*\}")
"""An interpolation that names another key of the file."""


def read_yaml(path: str | Path, overrides: list[str] | None = None, what: str = "run file") -> dict[str, Any]:
    """Read a YAML file of sections and apply dotted overrides. Messages call the file ``what``.

    ``${section.key}`` stands for another key of the file. Resolvers such as ``${oc.env:NAME}`` are refused: what they
    find would be printed by ``check``, and written to run.yaml.

    Raises:
        ConfigError: the file cannot be read, or an override is not of the form key=value.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"{what} {str(path)!r} does not exist (working directory: {Path.cwd()})"])
    wrong = [item for item in overrides or [] if not re.match(r"[^=\s]+=", item)]
    if wrong:
        raise ConfigError([f"override {item!r} is not of the form key=value" for item in wrong])
    try:
        _refuse_bombs(path)
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError([f"{path} holds no mapping of sections (model:, adapter:, ...) at its top level"])
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        _refuse_resolvers(OmegaConf.to_container(merged, resolve=False), path)
        found: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError([f"cannot read {path}: {error}"]) from error
    except RecursionError as error:
        raise ConfigError([f"cannot read {path}: it is nested too deeply, or a key refers to itself"]) from error
    problem = extreme(found)
    if problem is not None:
        raise ConfigError([f"{path} is no {what}: {problem}"])
    return found


def _refuse_bombs(path: Path) -> None:
    """Refuse a file whose aliases stand for more values than a run file can have.

    Raises:
        ConfigError: there are too many, or the file is too large.
    """
    import yaml

    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise ConfigError([f"{path} has {size:,} bytes, which is no run file (at most {_LARGEST_FILE:,})"])
    text = path.read_text(encoding="utf-8-sig")
    if "*" not in text:
        return  # no aliases
    sizes: dict[int, int] = {}

    def count(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 10**9  # inside of itself
            children = node.value if isinstance(node.value, list) else []
            sizes[id(node)] = 1 + sum(
                count(c) for child in children for c in (child if type(child) is tuple else [child])
            )
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and count(root) > 10**5:
        raise ConfigError([f"cannot read {path}: its aliases (*name) stand for too many values, or for themselves"])


def _refuse_resolvers(data: Any, path: Path) -> None:
    queue = [data]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += [*value, *value.values()]
        elif isinstance(value, list):
            queue += value
        elif isinstance(value, str) and "${" in _INSIDE.sub("", value):
            raise ConfigError(
                [
                    f"{path}: {value[:80]!r} calls a resolver, and what it finds (a secret of the environment, for "
                    'example) would be printed and stored: write the value itself, give it as key="$NAME" on the '
                    "command line, or name another key of the file as ${section.key}"
                ]
            )
