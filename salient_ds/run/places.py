"""What a name on the command line may be: a folder here, or a model on the hub. No torch."""

from __future__ import annotations

from pathlib import Path

from salient_ds.strict import did_you_mean


def missing_folder(place: str) -> str | None:
    """Why ``place`` is no folder, in one sentence; None if it is one, or can be a model's name on the hub.

    A name on the hub is "owner/name" or "name". What is longer, begins with ".", "/" or "~", or lies in a folder that
    exists here, was meant as a path.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        return f"{place} is a file, not a folder"
    parts = Path(place).parts
    inside = len(parts) == 2 and Path(parts[0]).is_dir()
    if not (place.startswith((".", "/", "~")) or place.count("/") > 1 or inside):
        return None
    parent = path.parent
    hint = did_you_mean(path.name, [item.name for item in parent.iterdir()], "; ") if parent.is_dir() else ""
    where = "" if parent.is_dir() else f" (nor is there {str(parent)!r})"
    return f"there is no folder {place!r}{where}{hint}"


def not_on_the_hub(place: str, reason: str) -> str:
    """What to say if ``place`` is no folder, and loading it from the hub fails with ``reason``."""
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return f"there is no folder {place!r} here, and no model of this name could be loaded from the hub ({first[:200]})"
