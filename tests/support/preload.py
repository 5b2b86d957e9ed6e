"""What test processes need, imported once in the server that they are forked from (spawn.py). Starts no thread."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path

for name in (
    "deepspeed",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # it brings torch's compiler, at every first engine
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "peft",  # transformers imports it with every model that it loads
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "salient_ds.run.export",
    "salient_ds.methods.table",
    "salient_ds.models.loading",
    "salient_ds.engine.build",
    "salient_ds.engine.checkpoint",
    "salient_ds.engine.engine",
):
    importlib.import_module(name)
assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose the other threads"
gc.freeze()  # collections in the forked processes pass over what is here
