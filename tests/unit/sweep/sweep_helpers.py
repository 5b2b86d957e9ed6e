"""Sweeps without runs: specs from dictionaries, outcomes by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_ds.sweep.plan import Job, Outcome, Phase, Status
from salient_ds.sweep.spec import SweepSpec


def make_spec(**changes: Any) -> SweepSpec:
    given: dict[str, Any] = {
        "run": "run.yaml", "output_dir": "out", "arms": {"lora": {}, "other": {}}, "lr": [1e-3, 2e-3, 4e-3],
        "seeds": {"tune": [0], "fresh": [1, 2]},
    }  # fmt: skip
    return SweepSpec.model_validate(given | changes)


def ended(
    arm: str, lr: float, seed: int, loss: float | None = None, phase: Phase = "tune", status: Status = "finished"
) -> Outcome:
    metrics = {} if loss is None else {"loss": loss}
    return Outcome(arm, lr, seed, phase, status, metrics=metrics, steps=10, trainable=100, total_rank=12, seconds=2.0)


def by_key(*outcomes: Outcome) -> dict[str, Outcome]:
    return {outcome.key: outcome for outcome in outcomes}


def keys(jobs: list[Job]) -> list[str]:
    return [job.key for job in jobs]


def write_run(folder: Path, model: Path, data: Path, **train: Any) -> Path:
    """A run file of 6 steps of SalientLoRA with a compaction, on CPU."""
    import yaml

    root = Path(__file__).resolve().parents[3]
    run = {
        "output_dir": "unused",
        "deepspeed": str(root / "ds_configs" / "cpu.json"),
        "model": {"path": str(model)},
        "adapter": {"rank": 6, "alpha": 12, "init_std": 0.1, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "method": {"name": "salientlora", "target_rank": 3, "initial_warmup": 1, "final_warmup": 1,
                   "window_initial": 2, "window_final": 2},
        "data": {"train": str(data), "eval_size": 8, "max_length": 96},
        "train": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
        | train,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path
