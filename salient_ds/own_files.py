"""Files of our own in a run directory: written whole with a checksum, read with the name of what is wrong. No torch.

``run.json`` and ``summary.json`` hold the sha256 of the rest of the file under "sha256"; ``run.yaml`` has it in a last
comment, which its first line announces, so that a file that was cut off is known. Lines of ``metrics.jsonl`` and
``allocations.jsonl`` hold a CRC-32 under "crc". Files and lines without one are of older versions, and are read as they
are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from salient_ds.strict import Reported, extreme

_SUM = re.compile(r"^# sha256 ([0-9a-f]{64})\n\Z", re.MULTILINE)
_HEAD = "# settings of a run of salient_ds; the last line has the sha256 of all others\n"
_BROKEN_SUM = re.compile(r"sha256|[0-9a-f]{60}")
_LARGEST = 2**28


class OwnFileError(ValueError):
    """A file of a run directory is damaged. The message names the file, the line if there is one, and the remedy."""


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()


def write_whole(path: Path, text: str) -> None:
    """Write a file all or nothing, to the disk and not only to the system's cache."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with its sha256, all or nothing. ``values`` hold plain data."""
    plain = json.loads(json.dumps(values))
    plain["sha256"] = hashlib.sha256(_canonical({k: v for k, v in plain.items() if k != "sha256"})).hexdigest()
    write_whole(path, json.dumps(plain, indent=2) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read what :func:`write_object` wrote, without the sha256.

    Raises:
        OSError: the file is missing, or cannot be read.
        OwnFileError: it is damaged.
    """
    try:
        values = json.loads(_text(path))
    except ValueError as error:
        raise _damaged(path, error) from error
    except RecursionError as error:
        raise _damaged(path, "nested too deeply") from error
    problem = extreme(values)
    if problem is not None or not isinstance(values, dict):
        raise _damaged(path, problem or "it holds no JSON object")
    stated = values.pop("sha256", None)
    if stated is not None and stated != hashlib.sha256(_canonical(values)).hexdigest():
        raise _damaged(path, "it does not have the sha256 that it states")
    return values


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write YAML with its sha256 in a last comment, all or nothing."""
    import yaml

    text = _HEAD + yaml.safe_dump(dict(settings), sort_keys=False)
    write_whole(path, f"{text}# sha256 {hashlib.sha256(text.encode()).hexdigest()}\n")


def read_settings(path: Path) -> dict[str, Any]:
    """Read what :func:`write_settings` wrote.

    Raises:
        OSError: the file is missing, or cannot be read.
        OwnFileError: it is damaged.
    """
    import yaml

    text = _text(path)
    found = _SUM.search(text)
    if found is not None:
        if hashlib.sha256(text[: found.start()].encode()).hexdigest() != found[1]:
            raise _damaged(
                path,
                "it does not have the sha256 in its last line; if you have changed it on purpose, remove that line and "
                "the first one",
            )
    elif text.startswith(_HEAD):
        raise _damaged(
            path,
            "its last line, with the sha256, is missing: it was cut off; if you have changed it on purpose, remove the "
            "first line too",
        )
    elif _BROKEN_SUM.search(text[-80:]):
        raise _damaged(path, "its last line is no sha256")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error) or "nested too deeply") from error
    problem = extreme(settings)
    if problem is not None or not isinstance(settings, dict):
        raise _damaged(path, problem or "it holds no sections")
    return settings


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the block takes out of the file at ``path`` is there and of the right type, or that is an error of the file.

    Raises:
        OwnFileError: a key is missing, or a value has another type.
    """
    try:
        yield
    except OwnFileError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise _damaged(path, f"it lacks something: {type(error).__name__} {error}") from error
    except RuntimeError as error:  # torch's, about shapes and sizes that the file states
        if isinstance(error, Reported):
            raise
        raise _damaged(path, f"it states something impossible: {str(error).partition(chr(10))[0][:200]}") from error


def sealed_line(values: Mapping[str, Any]) -> str:
    """One line of a .jsonl file, with its CRC-32 and a newline."""
    return json.dumps({**values, "crc": _crc(values)}) + "\n"


def parse_line(line: bytes | str) -> dict[str, Any]:
    """A line of :func:`sealed_line`, without its CRC-32.

    Raises:
        ValueError: the line is damaged; the message is a clause without a subject.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(values, dict) or not _is_step(values.get("step")) or extreme(values) is not None:
        raise ValueError("is no JSON object with a step")
    stated = values.pop("crc", None)
    if stated is not None and stated != _crc(values):
        raise ValueError("does not have the CRC-32 that it states")
    return values


def split_lines(
    path: Path, check: Callable[[dict[str, Any]], None] = lambda values: None
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """The complete lines of a .jsonl file, and the numbers of the damaged ones with what is wrong with each.

    A last line without a newline was torn by a crash, and belongs to neither, unless it holds zero bytes: then the end
    of the file is lost, as after a power failure. A file that does not exist has no lines.

    Args:
        check: raises ValueError if a line does not hold what it should.
    """
    content = path.read_bytes() if path.exists() else b""
    whole, broken = [], []
    *lines, torn = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_line(line)
            check(values)
        except ValueError as error:
            broken.append((number, str(error)))
        else:
            whole.append(values)
    if b"\0" in torn:
        broken.append((len(lines) + 1, "holds zero bytes to the end of the file, where lines may have been"))
    return whole, broken


def read_lines(path: Path, check: Callable[[dict[str, Any]], None] = lambda values: None) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file.

    Raises:
        OSError: the file cannot be read.
        OwnFileError: a line is damaged; the message names it.
    """
    whole, broken = split_lines(path, check)
    if broken:
        raise OwnFileError(f"{path}, line {broken[0][0]} {broken[0][1]}: restore the file, or remove the line")
    return whole


def mend_lines(path: Path, check: Callable[[dict[str, Any]], None] = lambda values: None) -> list[str]:
    """Take damaged lines out of a .jsonl file. As it was, it is kept beside, with ``.damaged`` at the end of its name.

    Returns:
        A sentence for each damaged line. Nothing is written if there is none.
    """
    whole, broken = split_lines(path, check)
    if not broken:
        return []
    kept = path.with_name(f"{path.name}.damaged")
    kept.write_bytes(path.read_bytes())
    write_whole(path, "".join(map(sealed_line, whole)))
    end = f"it is left out, and the file is kept as {kept.name}"
    return [f"{path}, line {number} {problem}: {end}" for number, problem in broken]


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _crc(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(_canonical(values)):08x}"


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > _LARGEST:
        raise _damaged(path, f"it has {size:,} bytes")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, problem: Any) -> OwnFileError:
    return OwnFileError(
        f"{path} is damaged ({problem}): restore it, or run the training command again with --resume auto, which "
        "writes it anew"
    )
