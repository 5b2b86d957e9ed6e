"""What a name on the command line may be: a folder here, or a model on the hub. No torch."""

from __future__ import annotations

from pathlib import Path

from salient_ds.strict import did_you_mean

_SECONDS = 10.0
"""How long the hub may take to answer whether it has a model."""


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


def unreachable(place: str, revision: str | None = None) -> str | None:
    """Why ``place`` cannot be loaded from the hub, if the hub does not answer at all; None if it may be possible.

    One request with a short limit, instead of all the retries of every file. What is a folder, or in the cache, asks
    nobody. An answer of the hub, such as that there is no such model, is left to whoever loads it.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(place).expanduser().is_dir() or constants.HF_HUB_OFFLINE:
        return None
    try:
        if isinstance(try_to_load_from_cache(place, "config.json", revision=revision), str):
            return None
        HfApi().model_info(place, revision=revision, timeout=_SECONDS)
    except (HfHubHTTPError, ValueError):  # ValueError: no possible name, which the loader explains
        return None
    except Exception as error:  # of the HTTP library: no network, no name server, a proxy
        return not_on_the_hub(place, f"it does not answer: {error}")
    return None


def not_on_the_hub(place: str, reason: str) -> str:
    """What to say if ``place`` is no folder, and loading it from the hub fails with ``reason``."""
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return f"there is no folder {place!r} here, and no model of this name could be loaded from the hub ({first[:200]})"
