"""On GPUs: a layer is read only once it is there, and overwritten only when nobody reads it any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.sharded_gpu_worker import WAYS
from tests.support.spawn import ROOT, free_port

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_sharded_bases_train_as_whole_ones(tmp_path: Path) -> None:
    """On two GPUs through NCCL; on one only the offloaded base is sharded at all."""
    gpus = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus), "--no_local_rank"]
    command += ["--master_port", str(free_port()), "--module", "tests.dist.sharded_gpu_worker", str(tmp_path), "2048"]
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for global_rank in range(gpus):
        losses = json.loads((tmp_path / f"losses-{global_rank}.json").read_text())
        assert set(losses) == set(WAYS)
        for way, found in losses.items():
            assert found[0] == pytest.approx(losses["whole"][0], rel=1e-5), way
            assert found == pytest.approx(losses["whole"], rel=1e-3 if "compiled" in way else 1e-5), way
