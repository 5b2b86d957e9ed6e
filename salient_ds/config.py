"""The whole run as strict typed models: one YAML file plus ``key=value`` overrides.

Imports no torch: ``salient-ds check`` and the launcher's pre-flight read it in well under a second.
One owner per number: batch sizes, precision, learning rate and clipping live here and are written into the
``"auto"`` fields of the ZeRO JSON (see :mod:`salient_ds.zero.config`); a conflict is an error naming both places.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from salient_ds.method_config import MethodConfig
from salient_ds.speed_config import SpeedConfig, SpeedPlan, compaction_problem, speed_plan

LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ConfigError(ValueError):
    """One or more problems in a run configuration, each a full sentence with value, bound and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Strict(BaseModel):
    """Base of all configuration models: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


class OrthogonalityConfig(Strict):
    coefficient: float = Field(0.1, ge=0)
    """Weight of the penalty in the objective (0 = off; its value is still measured if the method needs it)."""
    form: Literal["mean_norm", "squared"] = "mean_norm"
    """mean_norm: mean of ||A A^T - I||_F over all factors (released code); squared: sum of squared norms (papers)."""


class ShortcutConfig(Strict):
    """LoRA-adapted shortcut connections beside the adapted layers (HeteroLoRA)."""

    modules: list[str] = ["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"]
    """Kinds (residual_1/2 around attention and FFN, shortcut_sa around both, shortcut_ffn from the FFN input of the
    layer before), or single ones by path, as "model.layers.3.residual_1"."""
    rank: int | None = Field(None, gt=0)
    """Rank of every shortcut (default: adapter.rank)."""
    alpha: float = Field(4.0, gt=0)
    """Scaling numerator of shortcuts."""
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_after_shortcut: Literal["none", "reuse"] = "none"
    """none: fresh or disabled shortcuts change no output; reuse: the layer's norms run again (released code)."""


class AdapterConfig(Strict):
    target_modules: str | list[str] = LLAMA_MODULES
    """Names (suffixes of module paths), one regular expression as "re:...", or "all-linear"."""
    rank: int = Field(gt=0)
    """Initial rank r of every adapted matrix (IncreLoRA: the most it may grow to)."""
    alpha: float = Field(32.0, gt=0)
    """Scaling numerator: the update is (alpha / r) B diag(E) A, with r the initial rank throughout (IncreLoRA: the
    current one)."""
    shortcuts: ShortcutConfig | None = None
    """Trainable shortcut connections (methods heterolora and lora); none by default."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of A's and B's normal initialisation (AdaLoRA, SalientLoRA: 0.02)."""
    orthogonality: OrthogonalityConfig = OrthogonalityConfig()  # type: ignore[call-arg]


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
    method: Annotated[MethodConfig, Field(discriminator="name")]
    data: DataConfig
    train: TrainConfig
    speed: SpeedConfig = SpeedConfig()

    @model_validator(mode="after")
    def _ranks(self) -> RunConfig:
        target = getattr(self.method, "target_rank", None)
        if target is not None and target > self.adapter.rank:
            raise ValueError(
                f"method.target_rank={target:g} is above adapter.rank={self.adapter.rank}: "
                "no more rows than that are allocated, so lower the target or raise it"
            )
        plain = self.method.name == "heterolora" or (self.method.name == "lora" and self.method.form == "plain")
        if self.adapter.shortcuts is not None and not plain:
            raise ValueError(
                f"adapter.shortcuts works with method.name=heterolora and lora (form plain), not with "
                f"{self.method.name!r}: remove the section or choose one of them"
            )
        if self.method.name == "heterolora" and self.method.proxy == "synflow" and self.speed.compile_layers is True:
            raise ValueError(
                "method.proxy=synflow replaces weights while the model runs, which compiled layers would not see: set "
                "speed.compile_layers to false, or choose another proxy"
            )
        if self.method.name == "heterolora" and self.method.proxy == "synflow" and self.speed.liger == "all":
            raise ValueError(
                "method.proxy=synflow replaces weights while the model runs, which the norms of speed.liger=all would "
                "not see: use liger: loss, or choose another proxy"
            )
        if self.speed.compaction == "every" and self.method.name == "salientlora":
            problem = compaction_problem(self.method.options())
            if problem is not None:
                raise ValueError(problem)
        return self

    def speed_plan(self, stage: int) -> SpeedPlan:
        """What section ``speed`` comes to at this ZeRO stage."""
        return speed_plan(self.speed, self.method.name, stage, self.adapter.shortcuts is not None)


def _nearest(key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(names))}"


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
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                model = _methods().get(data.get("method", {}).get("name"), None)
    return list(model.model_fields) if model is not None else []


def describe_errors(error: ValidationError, data: dict[str, Any]) -> list[str]:
    """One sentence per pydantic error, with the dotted key, the value and the remedy."""
    problems = []
    for item in error.errors():
        loc = item["loc"]
        key = ".".join(str(part) for part in loc if part not in _methods())
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}: {_nearest(str(loc[-1]), _fields_at(loc, data))}")
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            problems.append(_unknown_method(item["input"]))
        elif item["type"] in ("model_type", "model_attributes_type"):
            problems.append(f"{key}={item['input']!r}: must be a section of keys, as in {key}: {{...}}")
        elif loc and isinstance(loc[-1], int):
            problems.append(f"{key.rpartition('.')[0]}: element {loc[-1] + 1}: {item['msg']}")
        elif item["type"] == "missing":
            problems.append(f"missing key {key!r}: it has no default, set it in the YAML or as {key}=VALUE")
        elif item["type"] == "value_error":
            problems.append(str(item["ctx"]["error"]))
        else:
            problems.append(f"{key}={item['input']!r}: {item['msg']}")
    return problems


def _methods() -> dict[str, type[BaseModel]]:
    """Configuration model of every method by its name."""
    return {variant.model_fields["name"].default: variant for variant in get_args(MethodConfig)}


def _unknown_method(given: Any) -> str:
    """Message for a ``method`` section without a name, or with one that no method has."""
    known = ", ".join(_methods())
    name = given.get("name") if isinstance(given, dict) else None
    if name is None:
        return f"missing key 'method.name': choose one of {known}"
    return f"method.name={name!r} is unknown: {_nearest(str(name), list(_methods()))} (known: {known})"


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
