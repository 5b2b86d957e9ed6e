"""Models that can answer: a base model, a merged model, an adapter directory, or a run directory.

The kind is recognised by the files. A directory with ``adapter_config.json`` (or our own ``shortcut_adapter.json``) is
an adapter. One with ``run.yaml``, or with a checkpoint's ``manifest.json``, is a run. One with ``config.json`` is a
model. A name that is not a directory is a hub name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from salient_ds.data.record import TemplateRecord, check_record, template_record
from salient_ds.data.template_base import Template
from salient_ds.data.templates import get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["model", "adapter", "run"]
RECORD_FILE = "salient_ds.json"
SHORTCUT_FILE = "shortcut_adapter.json"
_GENERIC = ("adapter", "checkpoints", "export-peft", "export-ragged", "export-padded", "export-merged")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class ModelSource:
    """A model and its origin. ``base`` is the model to load, ``update`` the adapter directory or checkpoint on top."""

    kind: Kind
    base: str
    update: Path | None
    tokenizer: str
    record: TemplateRecord | None
    revision: str | None = None
    trust_remote_code: bool = False

    def identity(self) -> dict[str, str]:
        """Return fingerprints of the weights. They are the same for the same files, wherever these are stored."""
        found = {"kind": self.kind, "base": _fingerprint(self.base, self.revision)}
        if self.update is not None:
            own = ("adapter_config.json", "adapter_model.*", "shortcut_adapter.*")
            names = own if self.kind == "adapter" else ("*",)
            files = [path for name in names for path in self.update.glob(name) if path.is_file()]
            found["update"] = _sampled_hash(files)
        return found


def origin_of(source: ModelSource) -> dict[str, Any]:
    """What a report says of a model made here: method, ranks, the checkpoint it came from, and the code's version.

    Empty for other models. Paths of the machine are left out: only the run's name and the step are kept.
    """
    file = None if source.update is None else source.update / RECORD_FILE
    found: dict[str, Any] = {}
    if file is not None and file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        ranks = record.get("ranks") or {}
        method = record.get("method")
        name = method.get("name") if isinstance(method, dict) else method
        found = {"method": name, "total_rank": record.get("total_rank"), "matrices": len(ranks)}
        if isinstance(record.get("source_run"), str):
            run, _, step = record["source_run"].partition("/checkpoints/")
            found["run"] = "/".join([Path(run).name, step]).rstrip("/")
        found["versions"] = record.get("versions")
    return {name: value for name, value in found.items() if value}


def find_source(
    model: str, base: str | None = None, tokenizer: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find out what ``model`` is, and locate its base, adapter, tokenizer and template record.

    Args:
        model: directory or hub name.
        base: base model of an adapter or run, if it has moved since training.
        tokenizer: directory or hub name, if the tokenizer of the adapter or base is not to be used.
        trust_remote_code: run Python code that comes with the base model. A run directory cannot allow this: it may
            come from somebody else.

    Raises:
        ValueError: it is not a model, adapter or run; the base of an adapter is unknown; or the run was trained with
            the model's own code, and ``trust_remote_code`` does not allow it.
    """
    source = _find(model, base, tokenizer)
    if source.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"{model} was trained with model.trust_remote_code=true: Python code that comes with {source.base} would "
            "run here. Look at it, then add --trust-remote-code"
        )
    return replace(source, trust_remote_code=trust_remote_code)


def _find(model: str, base: str | None, tokenizer: str | None) -> ModelSource:
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() or (folder / SHORTCUT_FILE).is_file():
        return _adapter(folder, base, tokenizer)
    if (folder / "run.yaml").is_file() or (folder / "manifest.json").is_file():
        return _run(folder, base, tokenizer)
    if base is not None:
        raise ValueError(f"--base goes with an adapter or a run directory, and {model} is neither")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{model} holds no model (config.json), adapter (adapter_config.json) or run (run.yaml): give one of "
            "these, or a hub name"
        )
    if folder.exists():
        return ModelSource("model", model, None, tokenizer or model, _record(_read(folder / RECORD_FILE)))
    return _on_hub(model, tokenizer)


def _on_hub(name: str, tokenizer: str | None) -> ModelSource:
    """Return a model on the hub. Our merged models have a template record there. Unreachable files count as missing."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetched(file: str) -> dict[str, Any]:
        try:
            return _read(Path(hf_hub_download(name, file)))
        except (OSError, ValueError, EntryNotFoundError):
            return {}

    if fetched("adapter_config.json"):
        raise ValueError(
            f"{name} is an adapter on the hub: fetch it with `hf download {name} --local-dir FOLDER`, then give the "
            "folder"
        )
    return ModelSource("model", name, None, tokenizer or name, _record(fetched(RECORD_FILE)))


def _adapter(folder: Path, base: str | None, tokenizer: str | None) -> ModelSource:
    written = RECORD_FILE if (folder / SHORTCUT_FILE).is_file() else "adapter_config.json"
    stated = _read(folder / written)
    chosen = base or stated.get("base_model_name_or_path")
    if not chosen:
        raise ValueError(f"{folder / written} does not name its base model: give --base")
    if Path(chosen).is_absolute() and not Path(chosen).is_dir():
        raise ValueError(f"the base model of {folder} is no longer at {chosen}: give --base")
    own_tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else chosen
    record, revision = _record(_read(folder / RECORD_FILE)), stated.get("revision") if base is None else None
    return ModelSource("adapter", chosen, folder, tokenizer or own_tokenizer, record, revision)


def _run(folder: Path, base: str | None, tokenizer: str | None) -> ModelSource:
    from salient_ds.engine.shard_files import CheckpointError
    from salient_ds.own_files import read_object, read_settings, reading
    from salient_ds.run.export import newest_checkpoint

    try:
        checkpoint = newest_checkpoint(folder)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    root = folder if (folder / "run.yaml").is_file() else checkpoint.parent.parent
    if not (root / "run.yaml").is_file():
        raise ValueError(f"{folder} is a checkpoint without its run: run.yaml is not in {root}")
    settings = read_settings(root / "run.yaml")
    with reading(root / "run.yaml"):
        model = dict(settings["model"])
        model["path"] = str(model["path"])
    chosen = base or model["path"]
    return ModelSource(
        kind="run",
        base=chosen,
        update=checkpoint,
        tokenizer=tokenizer or model.get("tokenizer") or chosen,
        record=_record(read_object(root / "run.json") if (root / "run.json").is_file() else {}),
        revision=model.get("revision") if base is None else None,
        trust_remote_code=bool(model.get("trust_remote_code")),
    )


def context_window(source: ModelSource) -> int | None:
    """Return the maximum tokens of prompt plus answer in the model's configuration, or None without one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def default_name(model: str) -> str:
    """Return the name of a model's answers: the last part of its path that identifies it ("adapter" does not)."""
    parts = [part for part in Path(model).resolve().parts if part != "/"] if Path(model).exists() else model.split("/")
    telling = [part for part in parts if part not in _GENERIC and not part.startswith("step-")]
    return telling[-1] if telling else parts[-1]


def choose_template(
    record: TemplateRecord | None, wanted: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Template, TemplateRecord]:
    """Return the prompt template and its record.

    It is the template of training. For a model without a record it is the one named by ``wanted``.

    Raises:
        ValueError: there is neither a record nor a wanted template; ``wanted`` is not the template of training; or the
            template renders differently than in training (another tokenizer or version).
    """
    name = wanted or (record.name if record else None)
    if name is None:
        raise ValueError(
            "nothing says which prompt template this model was trained with: give --template (alpaca, vicuna_v1.1, "
            "llama-2, tokenizer or fastchat:NAME)"
        )
    template = get_template(name)
    if record is not None:
        check_record(record, template, tokenizer)
    return template, record or template_record(template, tokenizer)


def _record(content: dict[str, Any]) -> TemplateRecord | None:
    found = content.get("template")
    return TemplateRecord.from_dict(found) if found else None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _fingerprint(name: str, revision: str | None) -> str:
    """Return a hash of a model's config and samples of its weight files, or the name and revision of a hub model."""
    folder = Path(name)
    if not folder.is_dir():
        return name + (f"@{revision}" if revision else "")
    return _sampled_hash([folder / "config.json", *(path for pattern in _WEIGHTS for path in folder.glob(pattern))])


def _sampled_hash(paths: Iterable[Path]) -> str:
    """Hash names, sizes and 16 pieces of 64 KiB of each file. A 13 GB model in full would take half a minute."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(16):
                file.seek(size * piece // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]
