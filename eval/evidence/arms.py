"""Write the sweep files of the evidence runs: every task with the same arms, learning rates and seeds.

    python eval/evidence/arms.py OUT --task spanish --rank 1

All arms have the scaling 2 and end with as many parameters as uniform LoRA of the given rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

WIDE = 8
"""Rank that pruning methods begin with."""


def arms(rank: int, wide: int, found: list[Path]) -> dict[str, Any]:
    """Name -> overrides of the base run. ``found``: files of ranks that LoRA is trained with."""

    def uniform(rank: int, **method: Any) -> dict[str, Any]:
        return {"adapter": {"rank": rank, "alpha": 2 * rank}, "method": {"name": "lora"} | method}

    def retrained(path: Path) -> dict[str, Any]:
        return {"adapter": {"rank": 1, "alpha": 2, "rank_pattern": str(path)}, "method": {"name": "lora"}}

    def pruned(name: str, **options: Any) -> dict[str, Any]:
        budget = {"name": name, "target_rank": rank, "budget_unit": "parameters"}
        return {"adapter": {"rank": wide, "alpha": 2 * wide}, "method": budget | options}

    windows = {"window_initial": 5, "window_final": 30}  # for runs of a few hundred steps
    often = [round(0.1 + 0.05 * k, 2) for k in range(11)]  # eleven events from 0.1 to 0.6
    return {
        "lora": uniform(rank),
        "lora-wide": uniform(wide),
        "svd-lora": uniform(rank, form="svd"),
        "spectral-energy": pruned("spectral", score="energy"),
        "spectral-curvature": pruned("spectral", score="curvature"),
        "spectral-curvature-5": pruned("spectral", score="curvature", prune_at=often[::2][:5]),
        "spectral-curvature-11": pruned("spectral", score="curvature", prune_at=often),
        "spectral-gate-5": pruned("spectral", score="gate_fisher", window=10, prune_at=often[::2][:5]),
        "spectral-curvature-early": pruned("spectral", score="curvature", prune_at=0.1),
        "spectral-curvature-at-0.2": pruned("spectral", score="curvature", prune_at=0.2),
        "spectral-gate-early": pruned("spectral", score="gate_fisher", window=15, prune_at=0.12),
        "salientlora": pruned("salientlora", **windows),
        "salientlora-gate": pruned("salientlora", score="gate_fisher", **windows),
        "adalora": pruned("adalora"),
        "adalora-gate": pruned("adalora", score="gate_fisher"),
    } | {f"lora-ranks-of-{path.stem.removeprefix('ranks-')}": retrained(path) for path in found}


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write TASK-rRANK.yaml into.")],
    task: Annotated[str, typer.Option(help="spanish, describe or sarcasm.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of uniform LoRA: the budget of all arms.")] = 1,
    seeds: Annotated[int, typer.Option(min=2, help="Number of fresh seeds.")] = 5,
    per_gpu: Annotated[int, typer.Option(min=1, help="Runs that share a GPU.")] = 10,
    only: Annotated[str, typer.Option(help="Arms, separated by commas; default: all.")] = "",
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "1e-3,2e-3,4e-3,8e-3",
    widen: Annotated[int, typer.Option(help="Further rates on either side.")] = 2,
    ranks: Annotated[list[Path] | None, typer.Option(help="Files of ranks to train LoRA with.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("/tmp/runs"),
) -> None:
    """Write one sweep file."""
    chosen = arms(rank, WIDE, [path.resolve() for path in ranks or []])
    if only:
        chosen = {name: chosen[name] for name in only.split(",")}
    data = Path("evid/data").resolve()
    for overrides in chosen.values():
        overrides["data.train"] = str(data / f"{task}-train.jsonl")
        overrides["data.eval"] = str(data / f"{task}-validation.jsonl")
    name = f"{task}-r{rank}"
    spec = {
        "run": str(Path(__file__).with_name("smollm2.yaml")),
        "output_dir": str(runs / name),
        "arms": chosen,
        "baseline": "lora",
        "lr": [float(lr) for lr in lrs.split(",")],
        "widen": widen,
        "stop": {"after": 0.25, "factor": 1.3},
        "seeds": {"tune": [100], "fresh": list(range(1, seeds + 1))},
        "fresh_eval": str(data / f"{task}-test.jsonl"),
        "per_gpu": per_gpu,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    print(path)


if __name__ == "__main__":
    typer.run(main)
