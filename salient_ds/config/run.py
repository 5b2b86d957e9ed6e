"""The run file as strict typed models: one YAML file plus ``key=value`` overrides.

Imports no torch, so that ``salient-ds check`` and the launcher's pre-flight read it in well under a second.
Every number has one owner. Batch sizes, precision, learning rate and clipping are set here and written into the
``"auto"`` fields of the ZeRO JSON (see :mod:`salient_ds.zero.ds_json`). A JSON that sets another value is refused with
an error that names both places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.rank_pattern import RankFileError, with_ranks_of_file
from salient_ds.config.data import DataConfig, metric_problems, task_problems
from salient_ds.config.speed import SpeedConfig, SpeedPlan, activation_problems, replaced_weights_problems, speed_plan
from salient_ds.config.train import TrainConfig
from salient_ds.config.yaml_files import read_yaml
from salient_ds.data.tasks.table import kind_of
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods, unknown_method
from salient_ds.ranks import RankLayout
from salient_ds.strict import ConfigError, Strict, did_you_mean, expanded, extreme


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

    @field_validator("path", "tokenizer")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return None if path is None else expanded(path)


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

    @field_validator("output_dir", "deepspeed")
    @classmethod
    def _home(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("output_dir and deepspeed are paths, which are not empty")
        return expanded(path)

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
        problems += activation_problems(self.train, self.speed, self.method)
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
        if self.train.neftune_alpha and self.model.task == "seq2seq-lm":
            problems.append(
                f"train.neftune_alpha={self.train.neftune_alpha:g} is for models with one input, not for "
                "model.task=seq2seq-lm: remove it"
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


def parse_config(data: dict[str, Any], base: Path | None = None) -> RunConfig:
    """Validate a plain mapping of sections.

    Args:
        base: folder in which relative paths are looked for, if they are not in the working directory.

    Raises:
        ConfigError: lists every problem found.
    """
    problem = extreme(data)
    if problem is not None:
        raise ConfigError([f"the run file cannot be used: {problem}"])
    try:
        config = RunConfig.model_validate(with_ranks_of_file(data, base))
    except ValidationError as error:
        raise ConfigError(describe_errors(error, data)) from error
    except RankFileError as error:
        raise ConfigError([str(error)]) from error
    except OSError as error:
        raise ConfigError([_unusable_name("adapter.rank_pattern", error)]) from error
    found = Path(config.deepspeed)
    try:
        if not found.is_file() and base is not None and (base / found).is_file():
            config = config.model_copy(update={"deepspeed": str((base / found).resolve())})
    except OSError as error:
        raise ConfigError([_unusable_name("deepspeed", error)]) from error
    return config


def _unusable_name(key: str, error: OSError) -> str:
    """A path that cannot even be looked for, such as one of 5000 letters."""
    return f"{key}={str(error.filename)[:80]!r}: {error.strerror}"
