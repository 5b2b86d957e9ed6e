"""Write the sweep files of the evidence runs: every task with the same arms, learning rates and seeds.

    python eval/evidence/arms.py OUT --task spanish --rank 1

All arms have the scaling 2. Except where their name says otherwise they end with as many parameters as uniform LoRA of
the given rank; LoRA^2's outer factors come on top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

WIDE = 8
"""Rank that pruning methods begin with."""
BASES = {"spanish": "smollm2", "describe": "smollm2", "sarcasm": "smollm2", "headlines": "minilm", "topics": "minilm"}
"""Task -> the model that it is run with unless ``--model`` names another base run."""
LABELS = {
    "headlines": ["plain", "sarcastic"],
    "topics": [
        "Arts", "Biology and health sciences", "Everyday life", "Geography", "History", "Mathematics", "People",
        "Philosophy and religion", "Physical sciences", "Society and social sciences", "Technology",
    ],
}  # fmt: skip

Overrides = dict[str, Any]


def arms(rank: int, wide: int, found: list[Path]) -> dict[str, Overrides]:
    """Name -> overrides of the base run. ``found``: files of ranks that LoRA is trained with."""

    def arm(rank: int, name: str, **method: Any) -> Overrides:
        return {"adapter.rank": rank, "adapter.alpha": 2 * rank, "method": {"name": name} | method}

    def retrained(path: Path) -> Overrides:
        return arm(1, "lora") | {"adapter.rank_pattern": str(path)}

    def pruned(name: str, **options: Any) -> Overrides:
        return arm(wide, name, target_rank=rank, budget_unit="parameters", **options)

    windows = {"window_initial": 5, "window_final": 30}  # for runs of a few hundred steps
    often = [round(0.1 + 0.05 * k, 2) for k in range(11)]  # eleven events from 0.1 to 0.6
    grown = {"interval": 10, "top_h": 15, "add": 1, "target_rank": rank}
    return {
        "lora": arm(rank, "lora"),
        "rslora": arm(rank, "lora", rslora=True),
        "lora-plus": arm(rank, "lora") | {"adapter.alpha": 8 * rank},  # with Adam: B learns 4 times as fast as A
        "lora-wide": arm(wide, "lora"),
        "svd-lora": arm(rank, "lora", form="svd"),
        "spectral": pruned("spectral"),
        "spectral-curvature": pruned("spectral", score="curvature", prune_at=0.1),
        "spectral-energy": pruned("spectral", score="energy", prune_at=0.4),
        "spectral-late": pruned("spectral", prune_at=0.4),
        "spectral-5": pruned("spectral", prune_at=often[::2][:5]),
        "spectral-11": pruned("spectral", prune_at=often),
        "spectral-gate": pruned("spectral", score="gate_fisher", window=15, prune_at=0.12),
        "spectral-gate-5": pruned("spectral", score="gate_fisher", window=25, prune_at=often[::2][:5]),
        "spectral-gate-11": pruned("spectral", score="gate_fisher", window=14, prune_at=often),
        "spectral-random": pruned("spectral", score="random"),
        "spectral-uniform": pruned("spectral", compete="in_matrix"),
        "salientlora": pruned("salientlora", **windows),
        "salientlora-magnitude": pruned("salientlora", **windows, **{"lambda": 1.0}),
        "salientlora-influence": pruned("salientlora", **windows, **{"lambda": 0.0}),
        "salientlora-paper": pruned("salientlora", **windows, preset="paper"),
        "salientlora-gate": pruned("salientlora", score="gate_fisher", **windows),
        "adalora": pruned("adalora"),
        "adalora-gate": pruned("adalora", score="gate_fisher"),
        "lora2": pruned("lora2"),
        "increlora": arm(wide, "increlora", **grown),
        "heterolora": arm(
            wide, "heterolora", keep=rank / wide, budget_unit="params", interval=30, interval_unit="steps",
            probe_batches=8, search_end=0.6,
        ),
    } | {f"lora-ranks-of-{path.stem.removeprefix('ranks-')}": retrained(path) for path in found}  # fmt: skip


def task_of(name: str) -> Overrides:
    """Section ``data.task`` of a classifier; nothing for instruction data."""
    if name not in LABELS:
        return {}
    return {"data.task": {"kind": "classification", "columns": ["text"], "labels": LABELS[name]}}


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write TASK-MODEL-rRANK.yaml into.")],
    task: Annotated[str, typer.Option(help="spanish, describe, sarcasm, headlines or topics.")],
    model: Annotated[str, typer.Option(help="Base run beside this file: smollm2, smollm2-classifier, minilm.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Rank of uniform LoRA: the budget of all arms.")] = 1,
    seeds: Annotated[int, typer.Option(min=2, help="Number of fresh seeds.")] = 5,
    per_gpu: Annotated[int, typer.Option(min=1, help="Runs that share a GPU.")] = 9,
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
    base = model or BASES[task]
    name = f"{task}-{base}-r{rank}"
    spec = {
        "run": str(Path(__file__).with_name(f"{base}.yaml")),
        "output_dir": str(runs / name),
        "overrides": {
            "data.train": str(data / f"{task}-train.jsonl"),
            "data.eval": str(data / f"{task}-validation.jsonl"),
        }
        | task_of(task),
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
