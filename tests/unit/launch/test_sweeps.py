"""The sweep files of launch/ are valid, and so is the run file of every arm."""

from __future__ import annotations

from pathlib import Path

import pytest

from salient_ds.config.run import parse_config
from salient_ds.sweep.arms import arm_runs, job_run
from salient_ds.sweep.spec import load_spec

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_is_a_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    spec = load_spec(path)
    for name, run in arm_runs(spec, path).items():
        config = parse_config(job_run(run, spec.rates(name)[0], 0, tmp_path))
        assert config.method.name == name and config.data.eval
