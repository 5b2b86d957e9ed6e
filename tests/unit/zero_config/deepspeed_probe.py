"""Run as a script: asks the installed DeepSpeed about configurations and about the keys it reads; JSON on stdout.

A process of its own, because importing deepspeed takes seconds and changes global state. It starts no engine.
"""

from __future__ import annotations

import collections.abc
import json
import sys
from typing import Any

READ: set[str] = set()


class Recorder(dict[str, Any]):
    """A dict that remembers which keys were asked for; survives ``copy.copy``."""

    def get(self, key: str, default: Any = None) -> Any:
        READ.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        READ.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        READ.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return collections.abc.KeysView(self)


def accepts(configs: list[tuple[str, int, dict[str, Any]]]) -> dict[str, Any]:
    """ "name@processes" -> stage, batch sizes and clipping as DeepSpeed understands them, or its error."""
    import deepspeed.comm
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.comm.get_rank = lambda *args, **kwargs: 0
    understood: dict[str, Any] = {}
    for name, processes, ds in configs:
        deepspeed.comm.get_world_size = lambda *args, size=processes, **kwargs: size
        try:
            config = DeepSpeedConfig(ds)
        except Exception as error:  # whatever it raises is the answer
            understood[f"{name}@{processes}"] = repr(error)
            continue
        understood[f"{name}@{processes}"] = {
            "stage": int(config.zero_optimization_stage),
            "batch": [
                config.train_batch_size,
                config.train_micro_batch_size_per_gpu,
                config.gradient_accumulation_steps,
            ],
            "clipping": config.gradient_clipping,
            "bf16": config.bfloat16_config.enabled,
        }
    return understood


def keys() -> dict[str, list[str]]:
    """Keys that DeepSpeed reads, by section ("" = top level)."""
    import deepspeed.comm
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        _REMOVED_ZERO_CONFIG_KEYS,
        DeepSpeedConfig,
    )
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    deepspeed.comm.get_world_size = lambda *args, **kwargs: 1
    DeepSpeedConfig(
        Recorder(train_batch_size=1, optimizer={"type": "AdamW", "params": {}}, scheduler={"type": "WarmupLR"})
    )
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": monitor.TensorBoardConfig,
        "csv_monitor": monitor.CSVConfig,
        "wandb": monitor.WandbConfig,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    found = {
        section: sorted({*model.model_fields, *(f.alias for f in model.model_fields.values() if f.alias)})
        for section, model in models.items()
    }
    found[""] = sorted(READ - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS))
    found["removed"] = sorted(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    found["removed zero"] = sorted(_REMOVED_ZERO_CONFIG_KEYS)
    return found


if __name__ == "__main__":
    configs = json.load(sys.stdin)
    answer = {"accepts": accepts(configs), "keys": keys()}
    print("\n" + json.dumps(answer))
