"""The sweep file: base run, arms, learning rates, seeds. Strict like the run file; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from salient_ds.config.run import RunConfig, describe_errors
from salient_ds.config.yaml_files import read_yaml
from salient_ds.strict import ConfigError, Strict, did_you_mean

OWNED = {
    "train.lr": "give it as lr: of the sweep or of the arm",
    "train.seed": "give it under seeds:",
    "output_dir": "every run gets a directory of its own under the sweep's output_dir",
}
"""Keys of a run file that the sweep sets itself, and what to write instead."""

LOWER_IS_BETTER = ("loss", "perplexity")
WIDEN = 3
"""Further learning rates on either side of an arm's grid with ``widen: true``."""

Rates = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,79}")


class Arm(Strict):
    """One thing to compare: the base run with some settings replaced."""

    overrides: dict[str, Any] = {}
    """Dotted keys of the run file with their values, or whole sections (a mapping), which replace those of the base.
    `method.name` with another name than the base's drops the base's other options of `method`."""
    lr: Rates | None = None
    """Learning rates of this arm. Default: `lr` of the sweep."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        """A mapping of overrides, or a list of key=value, either with `lr` among them."""
        if value is None:
            return {}
        if isinstance(value, list):
            value = _pairs(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"an arm is a mapping of overrides or a list of key=value, not {value!r}")
        given = dict(value)
        rates = {"lr": given.pop("lr")} if "lr" in given else {}
        return {"overrides": given} | rates

    @field_validator("overrides")
    @classmethod
    def _keys_of_a_run(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        problems = [problem for key, value in overrides.items() if (problem := _key_problem(key, value))]
        if problems:
            raise ValueError("\n".join(problems))
        return overrides


def _pairs(items: list[Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found: dict[str, Any] = {}
    for item in items:
        key, equals, _ = str(item).partition("=")
        if not isinstance(item, str) or not equals or not key.strip():
            raise ValueError(f"override {item!r} is not of the form key=value")
        if key in found:
            raise ValueError(f"override {key!r} is given twice: remove one")
        found[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{item[len(key) :]}"]))["value"]  # type: ignore[call-overload,index]
    return found


def _key_problem(key: str, value: Any) -> str | None:
    section = key.partition(".")[0]
    if section not in RunConfig.model_fields:
        known = [*RunConfig.model_fields, "lr"]
        hint = did_you_mean(section, known) or f"known sections: {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    inside = [f"{key}.{name}" for name in value] if isinstance(value, Mapping) else []
    owned = next((name for name in (key, *inside) if name in OWNED), None)
    return f"{owned} is set by the sweep: {OWNED[owned]}" if owned else None


class Seeds(Strict):
    """Section ``seeds``."""

    tune: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Seeds on which learning rates are chosen, by the mean over them."""
    fresh: list[Annotated[int, Field(ge=0)]] = [1, 2, 3, 4, 5]
    """Seeds on which every arm runs at its chosen learning rate. None of them is a tuning seed."""

    @model_validator(mode="after")
    def _apart(self) -> Seeds:
        for name, seeds in (("tune", self.tune), ("fresh", self.fresh)):
            twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
            if twice:
                raise ValueError(f"seeds.{name} holds {twice[0]} twice: remove one")
        both = sorted(set(self.tune) & set(self.fresh))
        if both:
            raise ValueError(
                f"seed {both[0]} is in seeds.tune and in seeds.fresh: a seed that chose the learning rate cannot judge "
                "it, take another"
            )
        return self


class Stop(Strict):
    """Section ``stop``: hopeless learning rates end early. Only while tuning, never on fresh seeds."""

    after: float = Field(0.25, gt=0, lt=1)
    """Fraction of the steps after which the training loss is looked at, and again after every further such part."""
    factor: float = Field(1.5, gt=1)
    """A run ends if its loss there is above this many times the lowest of the same arm and seed at the same step."""


class Metric(Strict):
    """Section ``metric``: the held-out number that decides."""

    name: str = "loss"
    """`NAME` stands for `eval_NAME` in a run's metrics.jsonl, as logged after the last step."""
    better: Literal["lower", "higher"]
    """Which values are better. loss and perplexity need not say it."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and "better" not in value:
            if value.get("name", "loss") not in LOWER_IS_BETTER:
                raise ValueError(
                    f"metric {value.get('name')!r}: say whether lower or higher is better, as in "
                    f"metric: {{name: {value.get('name')}, better: higher}}"
                )
            value = dict(value) | {"better": "lower"}
        return value

    @property
    def sign(self) -> int:
        """1 if lower is better, -1 if higher is. Times a value, it gives something to minimise."""
        return 1 if self.better == "lower" else -1


class SweepSpec(Strict):
    """Everything that a sweep file may set."""

    run: str
    """Run file that all arms share. A relative path is looked for in the working directory, then in the folder of the
    sweep file."""
    output_dir: str
    """Folder for everything that the sweep writes."""
    overrides: Arm = Arm()
    """What all arms replace in the run file, such as its length or its held-out data. Written like an arm."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Name of an arm -> what it replaces in the run file."""
    lr: Rates | None = None
    """Learning rates of every arm that gives none itself."""
    seeds: Seeds = Seeds()
    """Seeds for tuning, and fresh ones for the comparison."""
    fresh_eval: str | None = None
    """Held-out data of the runs on fresh seeds: test rows that chose no learning rate. Default: `data.eval` of the run
    file, which then judges what it has chosen."""
    metric: Metric = Metric(name="loss", better="lower")
    """Name of the held-out metric; or its `name` and what is `better`: lower or higher."""
    baseline: str | None = None
    """The arm that the others are compared with, seed by seed. Default: the first arm."""
    jobs: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes at once on this machine. auto: GPUs x per_gpu, or the number of cores without a GPU. 0: none here, all
    runs are left to `salient-ds sweep SPEC.yaml --worker`, on any host that shares output_dir."""
    per_gpu: int = Field(1, ge=1)
    """Processes that share one GPU, with `jobs: auto`."""
    stop: Stop | None = None
    """Stop hopeless learning rates early. Default: run all to the end."""
    widen: int = Field(0, ge=0, le=20)
    """Add learning rates to an arm whose best one lies at an edge of its grid: this many on either side at the most
    (true: 3)."""

    @field_validator("widen", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return (WIDEN if value else 0) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _agree(self) -> SweepSpec:
        problems = []
        if self.overrides.lr is not None:
            problems.append("overrides.lr: learning rates of all arms are the sweep's own lr, move them there")
        for name, arm in self.arms.items():
            if not _NAME.fullmatch(name):
                problems.append(
                    f"arm {name!r}: a name is part of paths, so it has letters, digits and . _ + = - only, begins with "
                    "a letter or digit and has at most 80 characters"
                )
            rates = arm.lr or self.lr
            if rates is None:
                problems.append(f"arm {name!r} has no learning rates: set lr for all arms or in this one")
            elif len({lr_text(lr) for lr in rates}) < len(rates):
                problems.append(f"arm {name!r}: lr={rates} holds a value twice (to 6 digits): remove one")
        folded = [name.casefold() for name in self.arms]
        problems += [f"arm {name!r}: another name differs only in case, choose another one"
                     for name in self.arms if folded.count(name.casefold()) > 1]  # fmt: skip
        if self.baseline is not None and self.baseline not in self.arms:
            hint = did_you_mean(self.baseline, self.arms) or f"arms are {', '.join(self.arms)}"
            problems.append(f"baseline={self.baseline!r} is no arm: {hint}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def compared_with(self) -> str:
        """Name of the baseline."""
        return self.baseline if self.baseline is not None else next(iter(self.arms))

    def rates(self, arm: str) -> list[float]:
        """The arm's learning rates in ascending order, as the sweep file gives them."""
        return sorted(self.arms[arm].lr or self.lr or [])


def lr_text(lr: float) -> str:
    """A learning rate as names of folders and messages show it, such as 0.002."""
    assert math.isfinite(lr)
    return f"{lr:.6g}"


def load_spec(path: str | Path) -> SweepSpec:
    """Read a sweep file (YAML).

    Raises:
        ConfigError: lists every problem found.
    """
    data = read_yaml(path, what="sweep file")
    try:
        return SweepSpec.model_validate(data)
    except ValidationError as error:
        raise ConfigError([_as_written(problem) for problem in describe_errors(error, data, SweepSpec)]) from error


def _as_written(problem: str) -> str:
    """The problem with keys as the file has them: an arm's overrides, for example, stand right in the arm there."""
    problem = re.sub(r"^(\w+)\.(?:constrained-int|literal\[[^]]*\])=", r"\1=", problem)  # names of a union's members
    return problem.replace(".overrides", "", 1) if problem.startswith(("arms.", "overrides.")) else problem
