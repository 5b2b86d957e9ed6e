"""A run directory may come from somebody else: it cannot allow code to run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from generate_helpers import generate
from salient_eval.mt_bench.sources import find_source


def prepared_run(folder: Path) -> Path:
    """A run whose base comes with code that leaves a mark when it is imported."""
    base, run = folder / "base", folder / "run"
    base.mkdir()
    mark = folder / "code-was-run"
    (base / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass EvilConfig: pass\n")
    auto = {"AutoConfig": "configuration_evil.EvilConfig", "AutoTokenizer": ["configuration_evil.EvilConfig", None]}
    (base / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "EvilConfig"}))
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    (run / "run.json").write_text("{}")
    (run / "run.yaml").write_text(yaml.safe_dump({"model": {"path": str(base), "trust_remote_code": True}}))
    return run


def test_a_run_directory_cannot_allow_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = prepared_run(tmp_path)
    output = generate(tmp_path / "data", str(run), "--template", "alpaca", fails=True)
    assert "add --trust-remote-code" in output and not (tmp_path / "code-was-run").exists()
    with pytest.raises(ValueError, match="--trust-remote-code"):
        find_source(str(run))
    assert find_source(str(run), trust_remote_code=True).trust_remote_code
    (run / "run.yaml").write_text(yaml.safe_dump({"model": {"path": str(tmp_path / "base")}}))
    assert not find_source(str(run)).trust_remote_code
