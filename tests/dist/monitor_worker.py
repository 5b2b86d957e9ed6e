"""A run that drops rows after every event and logs everywhere, and that stops in between. Inside started processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import load_config
from salient_ds.run.training import Training


class Stop(Exception):
    """The run is left as a crash would leave it."""


def run(global_rank: int, world_size: int, path: Path, resume: str, until: int | None) -> dict[str, Any]:
    """Train to the end, or to a crash right after step ``until``. Returns learning rates as the optimizer had them."""
    rates: dict[int, float] = {}

    def after_step(training: Any, report: Any) -> None:
        if training.engine.step == until:
            training.keeper.wait()
            raise Stop

    training = Training(load_config(path), torch.device("cpu"), after_step=after_step)
    built = training._step

    def step(batches: Any, targets: int) -> Any:
        before = training.engine.engine
        rate = before.basic_optimizer.param_groups[0]["lr"]
        report = built(batches, targets)
        rates[training.engine.step] = rate
        engines.add(id(training.engine.engine))
        return report

    engines: set[int] = set()
    training._step = step  # type: ignore[method-assign]
    try:
        training.run(resume, overwrite=False)
    except Stop:
        training.directory.close()
    return {"rates": rates, "engines": len(engines)}
