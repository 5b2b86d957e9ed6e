"""The pages of the documentation site: all are there, in the navigation, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
_SPEC = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
assert _SPEC is not None and _SPEC.loader is not None
pages: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pages)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())
    listed = [page for section in config["nav"] for part in section.values() for page in part]
    assert sorted(listed) == sorted(pages.PAGES)


def test_every_file_of_docs_is_a_page() -> None:
    here = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert here <= set(pages.PAGES.values())


@pytest.mark.parametrize("source", pages.PAGES.values())
def test_links_lead_somewhere(source: str) -> None:
    assert pages.broken_links(source) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("[x](b.md) `[y](c.md)`\n\n    [z](d.md)\n\n[w](https://example.org) [v](#here)\n")
    assert pages.broken_links("a.md") == ["a.md: b.md"]


def test_links_of_the_site(tmp_path: Path) -> None:
    pages.assemble(tmp_path / "pages")
    assert {path.name for path in (tmp_path / "pages").iterdir()} == set(pages.PAGES)
    start = (tmp_path / "pages" / "index.md").read_text()
    assert "(clients.md)" in start and "(docs/clients.md)" not in start
    for path in (tmp_path / "pages").iterdir():
        for _, link in pages._LINK.findall(pages._prose(path.read_text())):
            assert re.match(r"https?:|#", link) or link.partition("#")[0] in pages.PAGES, (path.name, link)


@pytest.mark.clients
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Installs mkdocs-material from a package index."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    subprocess.run([binaries / "pip", "install", "-q", "mkdocs-material>=9.6,<10"], check=True)
    subprocess.run([sys.executable, ROOT / "docs" / "pages.py"], check=True)
    command = [binaries / "mkdocs", "build", "--strict", "--config-file", ROOT / "docs" / "mkdocs.yml"]
    done = subprocess.run([*command, "--site-dir", tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "quickstart.html").is_file()
