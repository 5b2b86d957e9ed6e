"""The run file as strict typed models: one YAML file plus ``key=value`` overrides.

Imports no torch, so that ``salient-ds check`` and the launcher's pre-flight read it in well under a second.
Every number has one owner. Batch sizes, precision, learning rate and clipping are set here and written into the
``"auto"`` fields of the ZeRO JSON (see :mod:`salient_ds.zero.ds_json`). A JSON that sets another value is refused with
an error that names both places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.rank_pattern import RankFileError, with_ranks_of_file
from salient_ds.config.data import DataConfig, metric_problems, task_problems
from salient_ds.config.speed import SpeedConfig, SpeedPlan, replaced_weights_problems, speed_plan
from salient_ds.data.tasks.table import kind_of
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods, unknown_method
from salient_ds.ranks import RankLayout
from salient_ds.strict import ConfigError, Strict, did_you_mean


class ModelConfig(Strict):
    """Section ``model`` of a run file."""

    path: str
    """Checkpoint directory in Hugging Face format, or the name of a model on the Hub."""
    tokenizer: str | None = None
    """Tokenizer directory or Hub name. Default: the model's own tokenizer."""
    revision: str | None = None
    """Revision of the model on the Hub, such as a branch, tag or commit. Not used for `tokenizer`, if that is set."""
    task: Literal["causal-lm", "sequence-classification", "regression", "seq2seq-lm", "question-answering"] = (
        "causal-lm"
    )
    """Model head to load: causal-lm, sequence-classification, regression, seq2seq-lm or question-answering. It also
    decides the task type that an exported adapter states. What the checkpoint lacks of a head begins at random values
    that follow from `train.seed`, and is trained in full (`adapter.train_head`)."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Allow transformers to run Python code that comes with the checkpoint."""
    random_weights: bool = False
    """Build the model from its config.json with random weights. Only for speed measurements."""


class TrainConfig(Strict):
    """Section ``train`` of a run file."""

    max_steps: int | None = Field(None, gt=0)
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
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon in the denominator of AdamW's update."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global norm of the gradients to this value. 0: no clipping."""
    activation_checkpointing: Literal["none", "selective", "all"] = "none"
    """none: keep all activations for the backward pass. all: recompute decoder layers in the backward pass
    (non-reentrant). selective: keep the results of matrix products and attention, and recompute only what is cheap."""
    seed: int = 0
    """Seed of the adapters' initial values, the order of the data, the held-out rows and dropout."""
    log_every: int = Field(10, gt=0)
    """Optimizer steps between two lines of metrics. Steps with an allocation event and the last step get one too."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between two evaluations on held-out data. 0: evaluate only at the end."""
    save_every: int = Field(0, ge=0)
    """Optimizer steps between two checkpoints. 0: save only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep. Older ones are deleted."""
    best_metric: str | None = None
    """Keep the checkpoint with the best value of this metric too, and export it instead of the last one: "auto" (the
    task's own metric), one of `data.task.metrics`, or "loss". Only checkpoints that have reached the method's final sum
    of ranks count. Evaluations are every `eval_every` steps."""
    patience: int | None = Field(None, gt=0)
    """Stop after this many evaluations in a row without a better value of `best_metric`."""
    max_skipped_steps: int = Field(30, gt=0)
    """Stop the run after this many skipped steps in a row. A step is skipped when its gradients are not finite."""
    timeout_minutes: float = Field(30.0, gt=0)
    """How long a process waits for the others in a collective before it gives up."""

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


class RunConfig(Strict):
    """A training run: everything that a run file may set."""

    output_dir: str
    """Run directory. A run that is already in it is replaced only with --overwrite, and continued only with
    --resume."""
    deepspeed: str
    """Path of a plain DeepSpeed JSON (see ds_configs/). A relative path is looked for in the working directory, then in
    the folder of the run file."""
    model: ModelConfig
    """Base model and tokenizer."""
    adapter: AdapterConfig
    """Adapters: which layers, initial rank, scaling."""
    method: SerializeAsAny[MethodConfig]
    """The rank-allocation method, chosen by `name`, and its options."""
    data: DataConfig
    """Training and held-out data, and how rows become tokens."""
    train: TrainConfig
    """Length of the run, batch sizes, precision, optimizer, logging and checkpoints."""
    speed: SpeedConfig = SpeedConfig()
    """How parameters are stored and which kernels compute."""

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        """Validate the section with the options class of its method, which may come from another package."""
        if not isinstance(value, Mapping):
            return value
        name = value.get("name")
        options = methods().get(name) if isinstance(name, str) else None
        if options is None:
            raise PydanticCustomError("unknown_method", "{problem}", {"problem": unknown_method(name)})
        return options.model_validate(value)

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = self.method.problems(self.adapter) + replaced_weights_problems(self.speed, self.method)
        if self.adapter.shortcuts is not None and not self.method.takes_shortcuts:
            problems.append(
                "adapter.shortcuts works with method.name=heterolora and lora (form plain), not with "
                f"{self.method.name!r}: remove the section or choose one of them"
            )
        if self.speed.compaction == "every" and self.method.compactable == "every":
            problem = self.method.compaction_problem("every")
            problems += [problem] if problem else []
        if self.train.sigma_lr != "auto" and not self.has_singular_values:
            problems.append(f"train.sigma_lr is for singular values, method {self.method.name} has none: remove it")
        if self.adapter.rank_pattern and self.method.grows:
            why = f"adapter.rank_pattern gives initial ranks, but method {self.method.name} grows all from the same one"
            problems.append(f"{why}: remove the pattern, or use method.name=lora")
        problems += task_problems(self.data, self.model.task)
        problems += metric_problems(self.train.best_metric, self.data)
        if self.speed.liger != "none" and self.model.task != "causal-lm":
            problems.append(
                f"speed.liger={self.speed.liger} has a loss for causal language models only, and model.task="
                f"{self.model.task}: use none"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_singular_values(self) -> bool:
        """Whether the method's adapters have a vector of singular values."""
        return self.method.adapter_form(1, self.adapter.rank, False).penalty_terms > 0

    def sigma_ratio(self, layout: RankLayout) -> float:
        """``train.sigma_lr`` as a number, for adapters of ``layout``."""
        chosen = self.train.sigma_lr
        return self.method.sigma_ratio(layout, self.adapter.init_std) if chosen == "auto" else chosen

    def speed_plan(self, stage: int) -> SpeedPlan:
        """Section ``speed``, resolved for this ZeRO stage."""
        return speed_plan(self.speed, self.method, stage, self.adapter.shortcuts is not None)


def _fields_at(loc: tuple[Any, ...], data: Any, root: type[BaseModel]) -> list[str]:
    """Field names of the section that holds the unknown key at ``loc`` (union tags in ``loc`` are skipped)."""
    if loc[:2] == ("data", "task"):
        return [*kind_of(data["data"]["task"]).model_fields, "like"]
    model: Any = root
    for part in loc[:-1]:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        if part in model.model_fields:
            model = model.model_fields[part].annotation
            inside = [part for part in get_args(model) if isinstance(part, type) and issubclass(part, BaseModel)]
            model = inside[0] if len(inside) == 1 else model  # ... | None
            if model is MethodConfig:
                model = methods().get(data.get("method", {}).get("name"), None)
    return list(getattr(model, "model_fields", []))


def describe_errors(error: ValidationError, data: dict[str, Any], root: type[BaseModel] = RunConfig) -> list[str]:
    """One sentence per pydantic error, with the dotted key, the value and the remedy. ``root``: the validated model."""
    problems: list[str] = []
    for item in error.errors():
        loc = item["loc"]
        key = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc, data, root)
            hint = did_you_mean(str(loc[-1]), known) or f"known keys: {', '.join(sorted(known))}"
            problems.append(f"unknown key {key!r}: {hint}")
        elif item["type"] == "unknown_method":
            problems.append(item["msg"])
        elif item["type"] in ("model_type", "model_attributes_type"):
            problems.append(f"{key}={item['input']!r}: must be a section of keys, as in {key}: {{...}}")
        elif loc and isinstance(loc[-1], int):
            problems.append(f"{key.rpartition('.')[0]}: element {loc[-1] + 1}: {item['msg']}")
        elif item["type"] == "missing":
            problems.append(f"missing key {key!r}: it has no default, set it in the YAML or as {key}=VALUE")
        elif item["type"] == "value_error":
            problems += str(item["ctx"]["error"]).splitlines()
        else:
            problems.append(f"{key}={item['input']!r}: {item['msg']}")
    return problems


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file (YAML) and apply dotted ``key=value`` overrides such as ``train.lr=1e-4``.

    Raises:
        ConfigError: lists every problem found, not only the first.
    """
    return parse_config(read_yaml(path, overrides), base=Path(path).parent)


def read_yaml(path: str | Path, overrides: list[str] | None = None, what: str = "run file") -> dict[str, Any]:
    """Read a YAML file of sections and apply dotted overrides, unvalidated. Messages call the file ``what``.

    Raises:
        ConfigError: the file cannot be read, or an override is not of the form key=value.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"{what} {str(path)!r} does not exist (working directory: {Path.cwd()})"])
    wrong = [item for item in overrides or [] if not re.match(r"[^=\s]+=", item)]
    if wrong:
        raise ConfigError([f"override {item!r} is not of the form key=value" for item in wrong])
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError([f"{path} holds no mapping of sections (model:, adapter:, ...) at its top level"])
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, TypeError) as error:
        raise ConfigError([f"cannot read {path}: {error}"]) from error


def parse_config(data: dict[str, Any], base: Path | None = None) -> RunConfig:
    """Validate a plain mapping of sections.

    Args:
        base: folder in which relative paths are looked for, if they are not in the working directory.

    Raises:
        ConfigError: lists every problem found.
    """
    try:
        config = RunConfig.model_validate(with_ranks_of_file(data, base))
    except ValidationError as error:
        raise ConfigError(describe_errors(error, data)) from error
    except RankFileError as error:
        raise ConfigError([str(error)]) from error
    found = Path(config.deepspeed)
    if not found.is_file() and base is not None and (base / found).is_file():
        config = config.model_copy(update={"deepspeed": str((base / found).resolve())})
    return config
