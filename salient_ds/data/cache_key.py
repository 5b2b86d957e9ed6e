"""The name of a cache entry: a digest of everything that decides on tokenised rows."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salient_ds.data.record import template_record
from salient_ds.data.template_base import Template
from salient_ds.host import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = (
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "jinja2",
    "fschat",
    "pyarrow",
    "numpy",
    "datasets",
)
_HERE = Path(__file__).resolve().parent
_CODE = (*sorted(_HERE.glob("*.py")), _HERE.parent / "strict.py")


def entry_key(
    source: Path | str, template: Template, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> str:
    """sha256 over the content of ``source``, the template, the tokenizer, our code, and versions of libraries.

    Args:
        source: a file; or the fingerprint that `datasets` has for the rows of a data set loaded by name.
        options: settings that decide on the rows, as plain data.
    """
    parts = {
        "file": file_sha256(source) if isinstance(source, Path) else source,
        "template": template_record(template, tokenizer).sha256,
        "tokenizer": tokenizer_digest(tokenizer),
        "options": dict(options),
        "code": [file_sha256(path) for path in _CODE],
        "versions": [platform.python_version(), *map(_version, _PACKAGES)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the tokenizer's class and everything that it saves, its chat template included."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}:{file_sha256(path)};".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
