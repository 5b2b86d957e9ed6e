"""`salient-ds push` against a hub that is played by a server of this test."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from salient_ds.run.push import push


class Hub(BaseHTTPRequestHandler):
    """Answers what the hub answers, and keeps what it is given."""

    asked: list[tuple[str, dict[str, Any]]] = []
    files: dict[str, bytes] = {}
    refuse: int = 0

    def do_POST(self) -> None:  # noqa: N802 (the library's name)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuse:
            self._answer({"error": "no"}, self.refuse)
        elif self.path == "/api/repos/create":
            self.asked.append((self.path, json.loads(body)))
            self._answer({"url": f"https://huggingface.co/me/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            listed = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in listed]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {"commitOid": "abc", "commitUrl": "https://huggingface.co/me/mine/commit/abc", "hookOutput": ""}
            )
        else:
            self._answer({"warnings": [], "errors": []})

    def do_GET(self) -> None:  # noqa: N802
        self._answer({"id": "me/mine", "sha": "0", "siblings": []})

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("ThisHub", (Hub,), {"asked": [], "files": {}, "refuse": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api

    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, trained from a folder."""
    adapter = tmp_path / "my-run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "my-run" / "run.yaml").write_text("")
    stated = {"base_model_name_or_path": "/models/llama", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    (adapter / "salient_ds.json").write_text(json.dumps(stated))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "README.md").write_text('---\nlibrary_name: peft\n---\nfrom_pretrained("/models/llama")\n')
    return tmp_path / "my-run"


def test_the_adapter_of_a_run_is_uploaded_whole(hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(str(run), "me/mine", private=True, base="org/llama", message=None) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/mine/commit/abc\n"
    ((_, asked),) = hub.asked
    assert asked["name"] == "mine" and asked.get("visibility", "private" if asked.get("private") else "") == "private"
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "salient_ds.json"]
    assert hub.files["adapter_model.safetensors"] == b"weights"
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/llama"
    card = hub.files["README.md"].decode()
    assert "base_model: org/llama\n" in card and "/models/llama" not in card
    here = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert here["base_model_name_or_path"] == "/models/llama", "the run itself is not changed"


def test_a_base_that_nobody_else_has(hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(str(run), "me/mine", private=False, base=None, message=None) == 2
    assert "give its name on the hub with --base owner/name" in capsys.readouterr().err
    assert not hub.asked


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_hub_refuses(hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str], status: int) -> None:
    hub.refuse = status
    assert push(str(run), "me/mine", private=False, base="org/llama", message=None) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("hf auth login" in error) == (status != 500)


def test_what_cannot_be_uploaded(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.yaml").write_text("")
    for place, message in (
        (tmp_path / "nothing", "there is no folder"),
        (tmp_path / "half", "has no adapter yet"),
        (tmp_path, "neither an adapter nor a merged model"),
    ):
        assert push(str(place), "me/mine", private=False, base=None, message=None) == 2
        assert message in capsys.readouterr().err
    assert not hub.asked
