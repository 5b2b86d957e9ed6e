"""Section ``train`` of a run file: length, batches, precision, optimizer, logging and checkpoints. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from salient_ds.steps import MOST_STEPS
from salient_ds.strict import Strict


def seconds_of(duration: str) -> float | None:
    """A time such as 90s, 30min or 2h in seconds; None if it is none."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", duration)
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else None


def _duration(value: str) -> str:
    if not seconds_of(value):
        raise ValueError(
            f"train.save_every={value!r} is neither a number of steps nor a time above 0: write 500, 90s, 30min or 2h"
        )
    return value


class TrainConfig(Strict):
    """Section ``train`` of a run file."""

    max_steps: int | None = Field(None, gt=0, le=MOST_STEPS)
    """Number of applied optimizer steps. Takes precedence over `epochs`; one of the two must be set."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, rounded up to whole optimizer steps."""
    global_batch_size: int = Field(gt=0)
    """Examples per optimizer step over all processes: micro_batch_size x gradient accumulation steps x processes."""
    micro_batch_size: int = Field(gt=0)
    """Examples per forward pass on one process. The number of gradient accumulation steps follows from it and from the
    number of processes."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Training precision of base model and adapters. With bf16 and fp16 the optimizer steps fp32 master copies."""
    lr: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    sigma_lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Learning rate of singular values, as a multiple of `lr`. auto: so that the first step changes a matrix as much as
    LoRA's does at the same `lr`, about sqrt(out_features / 3); 1 with `preset: reference`. Without it, singular values
    learn far too slowly at the learning rates that LoRA is used with. Methods with plain factors have none."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: linear or cosine decay to 0, or constant."""
    lr_warmup: float = Field(0, ge=0)
    """Warm-up steps, or a fraction of all steps if below 1."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay (AdamW) of the adapter factors A and B. Singular values are never decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment, from 0 to below 1."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon in the denominator of AdamW's update."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global norm of the gradients to this value. 0: no clipping."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Strength of NEFTune: uniform noise on the input embeddings of training batches, at most
    neftune_alpha / sqrt(tokens x width). The paper uses 5 to 15. Evaluations, generation and the exported adapter know
    no noise. 0: none."""
    activation_checkpointing: Literal["none", "selective", "all"] = "none"
    """none: keep all activations for the backward pass. all: recompute decoder layers in the backward pass
    (non-reentrant). selective: keep the results of matrix products and attention, and recompute only what is cheap;
    with compiled layers use `activation_memory` instead, because they recompute these products too."""
    activation_memory: float = Field(1.0, ge=0, le=1)
    """Share of their activations that compiled layers keep for the backward pass. The compiler recomputes the rest,
    what is cheap per byte first. 1: keep all. 0: keep only the input of every layer. Example: 0.5 when 1 does not fit.
    Needs compiled layers (see `speed.compile_layers`). Where `auto` does not compile, as on CPUs, any share below 1
    means `activation_checkpointing: all`, and the log says so. Results are the same to rounding."""
    seed: int = 0
    """Seed of the adapters' initial values, the order of the data, the held-out rows and dropout."""
    log_every: int = Field(10, gt=0)
    """Optimizer steps between two lines of metrics. Steps with an allocation event and the last step get one too."""
    log: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] = []
    """Where to log besides metrics.jsonl, over steps: losses, gradient norm, learning rate, tokens/s, MFU, memory,
    ranks, events and the run file. csv and tensorboard write into the run directory. wandb and mlflow go by their own
    environment variables, such as WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI. A resumed run goes on in the same
    CSV, or as the same run. The sections of the ZeRO JSON are DeepSpeed's own; they count samples instead of steps."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in the run's precision, in TFLOP/s of dense matrix products, for MFU in the log: the share of
    it that a step's matrix products and attention reach. Common GPUs are known in bf16 and fp16. For other devices, and
    in fp32, there is no MFU unless the peak is stated here."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between two evaluations on held-out data. 0: evaluate only at the end."""
    save_every: Annotated[int, Field(ge=0)] | Annotated[str, AfterValidator(_duration)] = "30min"
    """Time between two checkpoints, such as 90s, 30min or 2h, or the number of optimizer steps between them. 0: save
    only at the end. Checkpoints are written while training goes on."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep, whatever `save_every` counts. Older ones are deleted once a new one is
    whole, so that the disk holds one more for a moment. The one of `best_metric` is kept besides."""
    best_metric: str | None = None
    """Keep the checkpoint with the best value of this metric too, and export it instead of the last one: "auto" (the
    task's own metric), one of `data.task.metrics`, or "loss". Only checkpoints that have reached the method's final sum
    of ranks count. Evaluations are every `eval_every` steps."""
    patience: int | None = Field(None, gt=0)
    """Stop after this many evaluations in a row without a better value of `best_metric`."""
    max_skipped_steps: int = Field(30, gt=0)
    """Stop the run after this many skipped steps in a row. A step is skipped when its gradients are not finite."""
    stop_after: float | None = Field(None, gt=0)
    """Seconds after which the run saves a checkpoint and ends with status 75, to be started again with `--resume auto`.
    They count from the start of the main process, loading included."""
    timeout_minutes: float = Field(30.0, gt=0)
    """How long a process waits for the others in a collective before it gives up."""

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints; 0: steps do not decide."""
        return self.save_every if isinstance(self.save_every, int) else 0

    @property
    def save_seconds(self) -> float | None:
        """Seconds between two checkpoints; None: time does not decide."""
        return seconds_of(self.save_every) if isinstance(self.save_every, str) else None

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("train.max_steps and train.epochs are both missing: set one of them")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={self.micro_batch_size}: change one of them"
            )
        if self.best_metric is not None and not self.eval_every:
            raise ValueError(
                f"train.best_metric={self.best_metric} chooses among evaluations, and there is only one at the end: "
                "set train.eval_every"
            )
        if self.patience is not None and self.best_metric is None:
            raise ValueError(f"train.patience={self.patience} waits for a better train.best_metric: set that too")
        return self
