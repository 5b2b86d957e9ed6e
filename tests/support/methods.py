"""Options of every built-in method with as few of them set as there may be."""

from __future__ import annotations

from salient_ds.heterolora.options import HeteroLoRAConfig
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.salientlora.options import SalientLoRAConfig
from salient_ds.methods.spectral.options import SpectralConfig

OPTIONS: dict[str, MethodConfig] = {
    "salientlora": SalientLoRAConfig(target_rank=2),
    "adalora": AdaLoRAConfig(target_rank=2),
    "lora": LoRAConfig(),
    "lora2": LoRA2Config(target_rank=2),
    "increlora": IncreLoRAConfig(target_rank=2, top_h=1),
    "heterolora": HeteroLoRAConfig(),
    "spectral": SpectralConfig(target_rank=2, score="curvature"),
}
