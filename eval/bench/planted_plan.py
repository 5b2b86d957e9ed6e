"""Which ranks are planted, which students look for them, and how they are trained. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods
from salient_ds.salience.learning_rate import RatePlan

Regime = Literal["equal_energy", "equal_singular_value", "power_law"]
REGIMES: tuple[Regime, ...] = ("equal_energy", "equal_singular_value", "power_law")
NORMALISATIONS = ("printed", "released", "robust")


@dataclass(frozen=True)
class ProblemSize:
    """Size of the problem. Each block has two matrices (up, down), so ``planted`` needs an even length."""

    planted: tuple[int, ...] = (0, 1, 1, 2, 4, 4, 8, 12)
    """Ranks of the teacher's updates. Every seed assigns them to the matrices in another order."""
    width: int = 64
    hidden: int = 96
    update_scale: float = 1.0
    """Root mean square of all planted singular values. Those of the frozen matrices go up to about 2."""
    noise: float = 0.1
    """Standard deviation of the target noise, relative to the teacher's RMS difference from the frozen network."""
    train_examples: int = 16384
    test_examples: int = 4096

    def __post_init__(self) -> None:
        smallest = min(self.width, self.hidden)
        if len(self.planted) % 2 or not any(self.planted) or min(self.planted) < 0 or max(self.planted) > smallest:
            raise ValueError(
                f"planted ranks {self.planted}: an even number of ranks between 0 and {smallest} is needed, not all 0"
            )
        if self.total % len(self.planted):
            raise ValueError(
                f"planted ranks {self.planted}: their sum {self.total} has to be a multiple of the {len(self.planted)} "
                "matrices, so that a uniform student has the same budget"
            )

    @property
    def total(self) -> int:
        """Sum of the planted ranks: the budget of every student."""
        return sum(self.planted)

    @property
    def uniform_rank(self) -> int:
        """Rank of every matrix if the budget is distributed evenly."""
        return self.total // len(self.planted)


@dataclass(frozen=True)
class Training:
    """Training settings that all students share."""

    steps: int = 1200
    batch: int = 128
    initial_rank: int = 16
    """Rank per matrix with which pruning methods start, and maximum rank of a matrix for methods that grow."""
    initial_warmup: float = 0.1
    final_warmup: float = 0.4
    """Fractions of all steps before and after the allocation phase."""
    window_initial: int = 10
    window_final: int = 100
    """SalientLoRA's first and last window (steps).

    The paper ends at 200, in an allocation phase of at least 1000 steps.
    """
    interval: int = 10
    """Steps between two events of AdaLoRA and LoRA^2."""
    orthogonality: float = 0.1
    """Coefficient of the orthogonality penalty in its released form, for all methods that have one."""
    clip: float = 1.0
    sigma_lr: float | Literal["auto"] = "auto"
    """Learning rate of singular values, as in section train of a run file."""
    lr_warmup: float = 0.05
    """Fraction of all steps. After it the learning rate falls linearly to 0."""

    @property
    def rates(self) -> RatePlan:
        """The learning-rate schedule and AdamW's settings."""
        return RatePlan("linear", round(self.lr_warmup * self.steps), self.steps, betas=(0.9, 0.999), weight_decay=0.0)

    @property
    def phase(self) -> tuple[int, int]:
        """(last step before the allocation phase, last step of it)."""
        return round(self.initial_warmup * self.steps), self.steps - round(self.final_warmup * self.steps)

    def growth_interval(self, rows: int, top_h: int) -> int:
        """Steps between growth events so that adding ``rows`` rows, ``top_h`` per event, fills the allocation phase."""
        first, last = self.phase
        return max(1, (last - first) // -(-rows // top_h))


@dataclass(frozen=True)
class Arm:
    """One student: a method with its options."""

    name: str
    method: str
    start: Literal["planted", "uniform", "prune", "grow"]
    """Initial ranks: the planted ones (oracle), the budget distributed evenly, or what the method starts with."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def oracle(self) -> bool:
        return self.start == "planted"


ORACLE, UNIFORM = "true-ranks", "lora"
"""Arms with which the others are compared: the planted ranks in SVD form, and the budget distributed evenly."""
ORACLES = (ORACLE, "true-ranks-plain")

ARMS: tuple[Arm, ...] = (
    Arm(ORACLE, "lora", "planted", {"form": "svd"}),
    Arm(ORACLES[1], "lora", "planted", {"form": "plain"}),
    Arm(UNIFORM, "lora", "uniform", {"form": "plain"}),
    Arm("svd-lora", "lora", "uniform", {"form": "svd"}),
    Arm("adalora", "adalora", "prune"),
    Arm("lora2", "lora2", "prune"),
    Arm("increlora", "increlora", "grow"),
    *(
        Arm(f"spectral-{name}", "spectral", "prune", {"score": score})
        for name, score in (("energy", "energy"), ("curvature", "curvature"), ("gate", "gate_fisher"))
    ),
    Arm("salientlora", "salientlora", "prune"),
    Arm("salientlora-salience", "salientlora", "prune", {"score": "salience"}),
    *(
        Arm(f"salientlora-paper-{how}", "salientlora", "prune", {"preset": "paper", "normalisation": how})
        for how in NORMALISATIONS
    ),
    *(
        Arm(
            f"salientlora-reference-{how}", "salientlora", "prune",
            {"preset": "reference", "normalisation": how, "final_prune": True},
        )
        for how in NORMALISATIONS
    ),
    Arm("salientlora-reference-as-is", "salientlora", "prune", {"preset": "reference"}),
)  # fmt: skip


def method_config(arm: Arm, size: ProblemSize, training: Training) -> MethodConfig:
    """Build the arm's method configuration. Its budget is the planted total.

    Raises:
        ValueError: this version of salient_ds has no such method, or the options contradict each other.
    """
    known = methods().get(arm.method)
    if known is None:
        raise ValueError(f"no method {arm.method!r} in this version (known: {', '.join(methods())})")
    matrices = len(size.planted)
    top_h = max(1, matrices // 4)
    common: dict[str, Any] = {
        "target_total": size.total,
        "initial_warmup": training.initial_warmup,
        "final_warmup": training.final_warmup,
        "window_initial": training.window_initial,
        "window_final": training.window_final,
        "interval": training.growth_interval(size.total - matrices, top_h)
        if arm.start == "grow"
        else training.interval,
        "top_h": top_h,
        "add": 1,
        "inner_width": training.initial_rank,  # wide enough for every rank that LoRA^2 can keep
    }
    given = {name: value for name, value in common.items() if name in known.model_fields} | arm.options
    config: MethodConfig = known.model_validate(given)
    return config
