"""What is fuzzed: each kind of input, what reads it, and which errors are right."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, load_config, parse_config
from salient_ds.data.formats import check_file
from salient_ds.engine.shard_files import MANIFEST, MANIFEST_SUM, CheckpointError, damage, manifest_sum
from salient_ds.export.lora_config import read_lora_config
from salient_ds.heterolora.released_toml import convert, to_yaml
from salient_ds.monitor.events import read_records
from salient_ds.monitor.metrics import read_metrics, truncate_metrics
from salient_ds.run.export import CheckpointFactors, best_checkpoint, checkpoint_facts, read_factors, read_in_full
from salient_ds.run.targets import EvaluateOptions, adapter_facts, target_of
from salient_ds.strict import ConfigError
from salient_ds.sweep.spec import load_spec
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config
from tests.support import hostile

Reader = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of input: a sound example, what reads it, and the errors that readers may raise."""

    name: str
    file: str
    """Where the input goes, inside the folder of the fuzz."""
    sound: Any
    """Plain data for JSON or YAML; bytes for anything else."""
    read: Reader
    allowed: tuple[type[Exception], ...]
    form: str = "json"
    names_file: bool = False
    """Whether every message names the file."""
    seal: Callable[[Path], None] = lambda path: None

    def variant(self, draw: random.Random) -> bytes:
        """An absurd variant."""
        if isinstance(self.sound, bytes):
            return hostile.damaged(self.sound, draw)
        write = hostile.as_json if self.form == "json" else hostile.as_yaml
        if draw.random() < 0.35:
            return hostile.damaged(write(self.sound), draw)
        return write(hostile.changed(self.sound, draw))

    def write_sound(self, folder: Path) -> None:
        """Write the sound example."""
        write = hostile.as_json if self.form == "json" else hostile.as_yaml
        (folder / self.file).write_bytes(self.sound if isinstance(self.sound, bytes) else write(self.sound))


def try_one(kind: Kind, folder: Path, content: bytes) -> str | None:
    """Let the reader read ``content``. Returns what is wrong with how it reacts; None if it is right."""
    place = folder / kind.file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    kind.seal(place)
    try:
        kind.read(folder)
    except kind.allowed as error:
        if isinstance(error, RecursionError):
            return "RecursionError"
        text = "\n".join(error.problems) if isinstance(error, ConfigError) else str(error)
        if kind.names_file and place.name not in text:
            return f"does not name {place.name}: {text[:200]}"
        return f"a message of {len(text)} characters" if len(text) > 100_000 else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def run_data(model: Path, data: Path, method: dict[str, Any]) -> dict[str, Any]:
    """A sound run file."""
    return {
        "output_dir": "out", "deepspeed": "ds.json", "model": {"path": str(model), "task": "causal-lm"},
        "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16.0, "init_std": 0.02, "dropout": 0.1,
                    "rank_pattern": {}, "orthogonality": {"coefficient": 0.1, "form": "squared"}},
        "method": method,
        "data": {"train": str(data), "eval_size": 8, "max_length": 160, "template": "alpaca", "packing": False},
        "train": {"max_steps": 24, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "lr": 0.01,
                  "lr_schedule": "linear", "lr_warmup": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
                  "save_every": "30min", "eval_every": 0, "keep_checkpoints": 2, "timeout_minutes": 5.0},
        "speed": {"packing": "auto", "compaction": "auto"},
    }  # fmt: skip


METHODS: tuple[dict[str, Any], ...] = (
    {"name": "salientlora", "target_rank": 3, "initial_warmup": 3, "final_warmup": 4, "window_initial": 3,
     "window_final": 6, "beta": 0.9, "gamma": 2.0, "lambda": 0.7},
    {"name": "adalora", "target_rank": 3, "initial_warmup": 2, "final_warmup": 2, "interval": 2},
    {"name": "increlora", "target_rank": 3, "start_rank": 1, "top_h": 2, "interval": 2, "initial_warmup": 2},
    {"name": "lora2", "target_rank": 3}, {"name": "spectral", "target_rank": 3}, {"name": "lora"},
    {"name": "heterolora", "keep": 0.5, "interval": 4, "interval_unit": "steps", "constant_epochs": 0},
)  # fmt: skip
DS = {
    "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "steps_per_print": 100,
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "allgather_bucket_size": 5e8,
                          "offload_optimizer": {"device": "cpu", "pin_memory": True}, "round_robin_gradients": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "tensorboard": {"enabled": True}, "flops_profiler": {"enabled": False, "profile_step": 3},
}  # fmt: skip
SWEEP = {
    "run": "run.yaml", "output_dir": "sweep", "lr": [0.001, 0.01], "arms": {"lora": {"method.name": "lora"}, "b": None},
    "seeds": {"tune": [0], "fresh": [1, 2]}, "stop": {"after": 0.25, "factor": 1.5}, "metric": "loss",
}  # fmt: skip
TOML = b"""granularity = "layer"
[all_layers]
r = 8
lora_alpha = 16.0
lora_dropout = 0.1
lora = true
[all_layers.q_proj]
r = 4
"""
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"a.q_proj": 4},
        "alpha_pattern": {}, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}  # fmt: skip
ROWS = [{"instruction": "Say a", "input": "", "output": "a"}, {"instruction": "Say b", "input": "b", "output": "b"}]


OWN: tuple[type[Exception], ...] = (ValueError, OSError, CheckpointError)


def check(folder: Path) -> None:
    """What ``salient-ds check`` does, without starting other processes."""
    preflight(load_config(folder / "run.yaml"), 2, quick=True)


def check_zero(folder: Path, run: RunConfig) -> None:
    resolve_ds_config(load_ds_config(folder / "ds.json"), run, 2, 24, hidden_size=32)


def check_ranks(folder: Path, sound: dict[str, Any]) -> None:
    adapter = sound["adapter"] | {"rank_pattern": str(folder / "ranks.json")}
    parse_config(sound | {"adapter": adapter, "method": {"name": "lora"}})


def read_all(checkpoint: Path) -> None:
    """Verify a checkpoint, and read what an export needs."""
    damage(checkpoint, contents=True)
    read_factors(checkpoint)
    read_in_full(checkpoint)


def reseal(path: Path) -> None:
    """Let the manifest's own sha256 fit, so that only its content is absurd."""
    (path.parent / MANIFEST_SUM).write_bytes(manifest_sum(path.read_bytes()))


def users_kinds(folder: Path, model: Path, data: Path) -> list[Kind]:
    """The kinds of files that users write."""
    (folder / "ds.json").write_bytes(hostile.as_json(DS))
    sound = run_data(model, data, METHODS[0])
    config = parse_config(sound | {"deepspeed": str(folder / "ds.json")})
    user: tuple[type[Exception], ...] = (ConfigError,)
    found = [Kind(f"run file, {method['name']}", "run.yaml", run_data(model, data, method), check, user, "yaml")
             for method in METHODS]  # fmt: skip
    found += [
        Kind("ZeRO JSON", "ds.json", DS, lambda at: check_zero(at, config), user),
        Kind("ranks", "ranks.json", {"rank_pattern": {"q_proj": 4}, "r": 8, "target_modules": ["v_proj"]},
             lambda at: check_ranks(at, sound), user),
        Kind("sweep file", "sweep.yaml", SWEEP, lambda at: load_spec(at / "sweep.yaml"), user, "yaml"),
        Kind("TOML", "x.toml", TOML, lambda at: to_yaml(convert(at / "x.toml", None, "opt", 2, "none")),
             (ValueError, OSError)),
        Kind("rows", "rows.json", ROWS, lambda at: check_file(str(at / "rows.json"), "auto", "error", "error"), OWN),
        Kind("PEFT's configuration", "adapter_config.json", LORA, read_lora_config, OWN, names_file=True),
    ]  # fmt: skip
    return found


def kinds(folder: Path, model: Path, data: Path, run: Path) -> list[Kind]:
    """All kinds. ``run`` is the directory of a real run, which is copied to ``folder``."""
    shutil.copytree(run, folder / "run")
    step = max((folder / "run" / "checkpoints").iterdir())
    where = str(step.relative_to(folder))
    own = OWN

    def jsonl(name: str) -> bytes:
        """Lines without their CRC-32, as of an older version, so that absurd values get past it."""
        rows = [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
        return b"".join(hostile.as_json({key: row[key] for key in row if key != "crc"}) + b"\n" for row in rows)

    def plain(name: str) -> Any:
        """Values without their sha256, as of an older version."""
        values = json.loads((folder / "run" / name).read_text())
        return {key: value for key, value in values.items() if key != "sha256"}

    return users_kinds(folder, model, data) + [
        Kind("run.yaml", "run/run.yaml", yaml.safe_load((run / "run.yaml").read_text()),
             lambda at: (checkpoint_facts(at / "run", step), target_of(str(at / "run"), EvaluateOptions("glue/rte"))),
             own, "yaml"),
        Kind("run.json", "run/run.json", plain("run.json"), lambda at: checkpoint_facts(at / "run", step), own,
             names_file=True),
        Kind("summary.json", "run/summary.json", plain("summary.json"),
             lambda at: best_checkpoint(at / "run", str), own),
        Kind("salient_ds.json", "run/adapter/salient_ds.json", plain("adapter/salient_ds.json"),
             lambda at: adapter_facts(at / "run" / "adapter"), own, names_file=True),
        Kind("metrics.jsonl", "run/metrics.jsonl", jsonl("metrics.jsonl"),
             lambda at: (read_metrics(at / "run/metrics.jsonl"), truncate_metrics(at / "run/metrics.jsonl", 3)), own,
             names_file=True),
        Kind("allocations.jsonl", "run/allocations.jsonl", jsonl("allocations.jsonl"),
             lambda at: read_records(at / "run/allocations.jsonl"), own, names_file=True),
        Kind("manifest", f"{where}/{MANIFEST}", json.loads((step / MANIFEST).read_text()),
             lambda at: read_all(at / where), (CheckpointError, ValueError), seal=reseal),
        Kind("shared.pt", f"{where}/shared.pt", (step / "shared.pt").read_bytes(),
             lambda at: CheckpointFactors(at / where), (CheckpointError,)),
    ]  # fmt: skip
