"""Baselines: LoRA and AdaLoRA of the PEFT library, in the same loop and the same engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.config.run import RunConfig
from salient_ds.models.kernels import apply_kernels
from salient_ds.models.loading import DTYPES
from salient_ds.ranks import RankLayout

from .models import ds_config, load_base, model_directory, run_config
from .own_arms import STEADY_STEPS, make_engine
from .peer_arm import PeerArm
from .plan import PLAIN, ArmSpec
from .timing import Stopwatch


@dataclass
class PeftArm(PeerArm):
    """A PEFT model in its engine.

    AdaLoRA's ``update_and_allocate`` reads gradients. In the plain loop it is called after the optimizer step, where
    PEFT's documentation puts it. Under DeepSpeed, gradients can only be read between backward pass and step, and only
    while an HfDeepSpeedConfig is alive. So it is called there. From ZeRO-1 on, the masks that it sets are lost, because
    the fp32 masters overwrite them.
    """

    spec: ArmSpec
    adapter_model: Any
    keep_alive: Any
    count: int = 0

    @classmethod
    def build(cls, spec: ArmSpec, device: torch.device) -> PeftArm:
        with model_directory(spec.settings.config) as folder:
            run = run_config(spec, folder, {"name": "lora"})
            ds = ds_config(spec, run, STEADY_STEPS)
            base = load_base(run, ds, device)
        apply_kernels(base, run.speed, device)
        model = with_adapters(base, spec, run, device)
        if spec.compiled:
            compile_decoder_layers(base, spec.graphs)
        nothing = RankLayout((), (), (), ())
        low = spec.loop == PLAIN and run.train.precision != "fp32"
        engine = make_engine(spec, AdaptedModel(model, {}, nothing, None), run, ds, device, autocast=low)
        return cls(engine, Stopwatch(device), spec, model.base_model, hf_deepspeed_config(spec, ds))

    def step(self, tokens_BS: Tensor) -> Tensor:
        """Run one optimizer step and return its loss (device tensor)."""
        self.count += 1
        if self.spec.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.forward_backward(tokens_BS)
        plain, adaptive = self.spec.loop == PLAIN, self.spec.arm == "peft_adalora"
        if not adaptive:
            with self.watch.part("step"):
                self.engine.step()
        elif plain:
            with self.watch.part("step"):
                self.engine.update()
            self.allocate()
            self.engine.basic_optimizer.zero_grad(set_to_none=True)
        else:
            self.allocate()
            with self.watch.part("step"):
                self.engine.step()
        return loss

    def allocate(self) -> None:
        with self.watch.part("allocate"):
            self.adapter_model.update_and_allocate(self.count)


def compile_decoder_layers(base: Any, graphs: bool = False) -> int:
    """Compile the forward pass of each decoder layer of a LLaMA-like model, as a user of PEFT does in one loop.

    Args:
        graphs: launch them as CUDA graphs (the compiler's mode "reduce-overhead").

    Returns:
        How many layers there are.
    """
    for layer in base.model.layers:
        layer.forward = torch.compile(layer.forward, mode="reduce-overhead" if graphs else None)
    return len(base.model.layers)


def with_adapters(base: nn.Module, spec: ArmSpec, run: RunConfig, device: torch.device) -> Any:
    """Wrap ``base`` with PEFT's adapters.

    The adapters are fp32 in the plain loop (PEFT's default, together with autocast). Under DeepSpeed, which keeps fp32
    masters itself, they are in training precision.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    common: dict[str, Any] = {"target_modules": run.adapter.target_modules, "task_type": "CAUSAL_LM"}
    settings = spec.settings
    if spec.arm == "peft_lora":
        config: Any = LoraConfig(r=spec.rank, lora_alpha=spec.rank, **common)
    else:
        timed = settings.warmup + settings.steps + settings.part_steps
        target = min(settings.target_rank, max(1, spec.rank // 2))
        config = AdaLoraConfig(
            init_r=spec.rank, target_r=target, lora_alpha=spec.rank, tinit=0, tfinal=2, deltaT=settings.delta_t,
            total_step=max(100, 4 * timed), **common,
        )  # fmt: skip
    plain = spec.loop == PLAIN
    with device:
        model = get_peft_model(base, config, autocast_adapter_dtype=plain)
    if not plain:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[run.train.precision])
    model.train()
    return model


def hf_deepspeed_config(spec: ArmSpec, ds: dict[str, Any]) -> Any:
    """While this object is alive, PEFT's AdaLoRA reads its gradients from DeepSpeed. None for the other arms."""
    if spec.loop == PLAIN or spec.arm != "peft_adalora":
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds)
