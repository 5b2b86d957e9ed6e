"""Body of the command ``push``: an exported adapter or merged model goes to the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from salient_ds.run.exits import RUN_ERROR, USAGE_ERROR, print_problems
from salient_ds.run.places import missing_folder
from salient_ds.strict import ConfigError

CONFIG, CARD, RECORD = "adapter_config.json", "README.md", "salient_ds.json"


def push(place: str, name: str, *, private: bool, base: str | None, message: str | None) -> int:
    """Upload a folder as a model repository, which is made if it is not there.

    Args:
        place: a finished run (its ``adapter`` is uploaded), an exported adapter, or a merged model.
        name: "owner/name", or "name" for one's own.
        private: make a new repository private. One that exists stays as it is.
        base: name of the base model on the hub, if it was trained from a folder.

    Returns:
        0; 2 after printing why this cannot be uploaded; 1 after printing what the hub said.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        folder = folder_of(place)
        stated = _base_of(folder)
        if stated is not None and base is None and Path(stated).is_absolute():
            raise ConfigError(
                [
                    f"{folder} names the base model by a folder of this machine ({stated}), where nobody else finds it:"
                    " give its name on the hub with --base owner/name"
                ]
            )
    except ConfigError as error:
        print_problems(error.problems)
        return USAGE_ERROR
    try:
        with tempfile.TemporaryDirectory() as place_of_copy:
            source = _with_base(folder, Path(place_of_copy) / "copy", stated, base) if base is not None else folder
            api = HfApi()
            url = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
            done = api.upload_folder(
                repo_id=url.repo_id,
                folder_path=source,
                commit_message=message or f"Upload of {folder.name} by salient_ds",
            )
    except HFValidationError as error:
        print_problems([f"{name!r} is no name of a repository: {error}"])
        return USAGE_ERROR
    except LocalTokenNotFoundError:
        print_problems(["the hub asks who you are: log in with `hf auth login`, or set HF_TOKEN"])
        return RUN_ERROR
    except HfHubHTTPError as error:
        print_problems([_said(error, name)])
        return RUN_ERROR
    except OSError as error:  # the network, a file that cannot be read
        print_problems([f"the upload to {name} failed: {error}"])
        return RUN_ERROR
    print(done.commit_url)
    return 0


def folder_of(place: str) -> Path:
    """The folder to upload.

    Raises:
        ConfigError: it is not there, or holds neither an adapter nor a model.
    """
    problem = missing_folder(place)
    folder = Path(place).expanduser()
    if problem is not None or not folder.is_dir():
        raise ConfigError([f"{problem or f'there is no folder {place!r}'}: give a run or an exported folder"])
    if (folder / "run.yaml").is_file():
        folder = folder / "adapter"
        if not folder.is_dir():
            raise ConfigError([f"{place} has no adapter yet: finish it, or export one of its checkpoints"])
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if not weights or not any((folder / name).is_file() for name in (CONFIG, "config.json", RECORD)):
        raise ConfigError([f"{folder} holds neither an adapter nor a merged model: give what salient-ds export wrote"])
    return folder


def _base_of(folder: Path) -> str | None:
    for name in (CONFIG, RECORD):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            return str(found) if found else None
    return None


def _with_base(folder: Path, copy: Path, stated: str | None, base: str) -> Path:
    """A copy of the folder that names another base model. Weights are linked where the file system can."""
    shutil.copytree(folder, copy, copy_function=_link)
    for name in (CONFIG, RECORD):
        path = copy / name
        if path.is_file():
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
            path.unlink()
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = copy / CARD
    if card.is_file() and stated is not None:
        text = card.read_text(encoding="utf-8").replace(stated, base)
        if "\nbase_model:" not in text:
            text = text.replace("library_name: peft\n", f"library_name: peft\nbase_model: {base}\n", 1)
        card.unlink()
        card.write_text(text, encoding="utf-8")
    return copy


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _said(error: Any, name: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return (
            f"the hub does not let you write to {name} (status {status}): log in with `hf auth login` and a token that "
            "may write, or set HF_TOKEN"
        )
    return f"the upload to {name} failed: {str(error).strip().splitlines()[0]}"
