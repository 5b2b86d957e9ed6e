"""The whole run as strict typed models: one YAML file plus ``key=value`` overrides.

Imports no torch: ``salient-ds check`` and the launcher's pre-flight read it in well under a second.
One owner per number: batch sizes, precision, learning rate and clipping live here and are written into the
``"auto"`` fields of the ZeRO JSON (see :mod:`salient_ds.zero.ds_json`); a conflict is an error naming both places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from salient_ds.adapters.options import AdapterConfig, ShortcutConfig
from salient_ds.config.speed import SpeedConfig, SpeedPlan, replaced_weights_problems, speed_plan
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods, unknown_method
from salient_ds.strict import ConfigError, Strict, did_you_mean


class ModelConfig(Strict):
    path: str
    """Checkpoint directory in Hugging Face format, or a hub name."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name; the model's own by default."""
    revision: str | None = None
    """Hub revision."""
    task: Literal["causal-lm"] = "causal-lm"
    """Head to load; decides dataset, collator and metrics."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    random_weights: bool = False
    """Build the model from its config.json with random weights (speed measurements only)."""


class DataConfig(Strict):
    train: str
    """Training data: .json, .jsonl or .parquet file, or a `datasets` name ("name", "name:config", "name[split]")."""
    eval: str | None = None
    """Held-out data in the same form."""
    eval_size: float = Field(0, ge=0)
    """Without `eval`: hold out this many training rows (or this fraction, if below 1)."""
    format: Literal["auto", "alpaca", "messages", "sharegpt"] = "auto"
    template: str = "alpaca"
    """alpaca, vicuna_v1.1, llama-2, tokenizer (its own chat template), or fastchat:NAME."""
    max_length: int = Field(512, gt=1)
    """Tokens per example; longer ones are cut on the right and counted."""
    empty_answers: Literal["error", "skip"] = "error"
    """Rows whose answer is empty: refuse the file, or leave them out (the published Alpaca file holds 28)."""
    packing: bool = False
    """Fill sequences of max_length with several examples that do not attend to each other."""


class TrainConfig(Strict):
    max_steps: int | None = Field(None, gt=0)
    """Applied optimizer steps; overrides epochs."""
    epochs: float | None = Field(None, gt=0)
    global_batch_size: int = Field(gt=0)
    """Examples per optimizer step over all processes: micro_batch_size x accumulation x processes."""
    micro_batch_size: int = Field(gt=0)
    """Examples per forward pass on one process; accumulation follows from the number of processes."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    lr: float = Field(gt=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    lr_warmup: float = Field(0, ge=0)
    """Warm-up steps (or fraction of all steps, if below 1)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW decay of A and B; singular values are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping (0 = none)."""
    activation_checkpointing: Literal["none", "selective", "all"] = "none"
    """all: recompute decoder layers in the backward pass (non-reentrant); selective: keep the results of matrix
    products and attention and recompute only what is cheap."""
    seed: int = 0
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations (0 = at the end only)."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints (0 = at the end only)."""
    keep_checkpoints: int = Field(2, ge=1)
    max_skipped_steps: int = Field(30, gt=0)
    """Stop after this many steps in a row without an update (non-finite gradients)."""
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
        return self


class RunConfig(Strict):
    """A training run. Sections mirror the packages that read them."""

    output_dir: str
    """Run directory; never overwritten without --overwrite."""
    deepspeed: str
    """Path of a plain DeepSpeed JSON (see ds_configs/), relative to the working directory or to the YAML file."""
    model: ModelConfig
    adapter: AdapterConfig
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    train: TrainConfig
    speed: SpeedConfig = SpeedConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        """The section as the options class of its method, whatever package that comes from."""
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
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def speed_plan(self, stage: int) -> SpeedPlan:
        """What section ``speed`` comes to at this ZeRO stage."""
        return speed_plan(self.speed, self.method, stage, self.adapter.shortcuts is not None)


def _fields_at(loc: tuple[Any, ...], data: Any) -> list[str]:
    """Field names of the model that holds the unknown key at ``loc`` (union tags in ``loc`` are skipped)."""
    model: Any = RunConfig
    for part in loc[:-1]:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        if part in model.model_fields:
            model = model.model_fields[part].annotation
            if ShortcutConfig in get_args(model):  # ... | None
                model = ShortcutConfig
            if model is MethodConfig:
                model = methods().get(data.get("method", {}).get("name"), None)
    return list(model.model_fields) if model is not None else []


def describe_errors(error: ValidationError, data: dict[str, Any]) -> list[str]:
    """One sentence per pydantic error, with the dotted key, the value and the remedy."""
    problems: list[str] = []
    for item in error.errors():
        loc = item["loc"]
        key = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc, data)
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
    """Read a run YAML and apply dotted ``key=value`` overrides.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"run file {str(path)!r} does not exist (working directory: {Path.cwd()})"])
    wrong = [item for item in overrides or [] if not re.match(r"[^=\s]+=", item)]
    if wrong:
        raise ConfigError([f"override {item!r} is not of the form key=value" for item in wrong])
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError([f"{path} holds no mapping of sections (model:, adapter:, ...) at its top level"])
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        data = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError([f"cannot read {path}: {error}"]) from error
    return parse_config(data, base=path.parent)  # type: ignore[arg-type]


def parse_config(data: dict[str, Any], base: Path | None = None) -> RunConfig:
    """Validate a plain mapping. A relative DeepSpeed JSON is looked for in the working directory, then in ``base``.

    Raises:
        ConfigError: listing every problem found.
    """
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, data)) from error
    found = Path(config.deepspeed)
    if not found.is_file() and base is not None and (base / found).is_file():
        config = config.model_copy(update={"deepspeed": str((base / found).resolve())})
    return config
