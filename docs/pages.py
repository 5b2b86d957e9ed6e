"""Assembles the pages of the documentation site in build/docs/pages. Needs only Python.

A page is a file of this folder, or a README that lives beside the code it explains. Links between pages become links
of the site. Links to other files of the repository become plain text, because the site does not hold them.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "docs" / "pages"
PAGES = {
    "index.md": "README.md",
    "quickstart.md": "docs/quickstart.md",
    "features.md": "docs/features.md",
    "troubleshooting.md": "docs/troubleshooting.md",
    "options.md": "docs/options.md",
    "data.md": "docs/data.md",
    "tasks.md": "salient_ds/data/tasks/README.md",
    "methods.md": "salient_ds/methods/README.md",
    "zero.md": "docs/zero.md",
    "speed.md": "docs/speed.md",
    "models.md": "salient_ds/models/README.md",
    "launch.md": "launch/README.md",
    "communication.md": "docs/communication.md",
    "clients.md": "docs/clients.md",
    "mt_bench.md": "eval/mt_bench/README.md",
    "adding_methods.md": "salient_ds/methods/ADDING.md",
    "design.md": "salient_ds/DESIGN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the repository."""
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def broken_links(source: str) -> list[str]:
    """Links of a file that lead to nothing in the repository."""
    path, broken = ROOT / source, []
    for _, link in _LINK.findall(_prose(path.read_text(encoding="utf-8"))):
        place, _, _ = link.partition("#")
        if not re.match(r"[a-z]+:", link) and place and not (path.parent / place).exists():
            broken.append(f"{source}: {link}")
    return broken


def page_text(source: str) -> str:
    """The text of a page, with the links of the site."""
    path = ROOT / source
    pages = {os.path.normpath(ROOT / file): page for page, file in PAGES.items()}

    def replaced(found: re.Match[str]) -> str:
        text, link = found[1], found[2]
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link) or not place:
            return found[0]
        there = os.path.normpath(path.parent / place)
        if there in pages:
            return f"[{text}]({pages[there]}{'#' + anchor if anchor else ''})"
        name = os.path.relpath(there, ROOT)
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return _LINK.sub(replaced, path.read_text(encoding="utf-8"))


def assemble(target: Path = TARGET) -> None:
    """Write all pages to ``target``, which is emptied before.

    Raises:
        SystemExit: a link leads to nothing.
    """
    broken = [item for source in PAGES.values() for item in broken_links(source)]
    if broken:
        raise SystemExit("links that lead to nothing:\n" + "\n".join(broken))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for page, source in PAGES.items():
        (target / page).write_text(page_text(source), encoding="utf-8")


def _prose(text: str) -> str:
    """Without code, where brackets are no links."""
    return re.sub(r"```.*?```|^(?: {4}|\t).*$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    assemble()
