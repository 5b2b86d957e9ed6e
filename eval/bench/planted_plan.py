"""What is planted, which students look for it, and how they are trained. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods
from salient_ds.salience.learning_rate import RatePlan

Regime = Literal["equal_energy", "equal_singular_value"]
REGIMES: tuple[Regime, ...] = ("equal_energy", "equal_singular_value")
NORMALISATIONS = ("printed", "released", "robust")


@dataclass(frozen=True)
class ProblemSize:
    """What is planted where. Two matrices (up, down) per block, so that ``planted`` has an even length."""

    planted: tuple[int, ...] = (0, 1, 1, 2, 4, 4, 8, 12)
    """Ranks of the teacher's updates; every seed deals them to the matrices in another order."""
    width: int = 64
    hidden: int = 96
    update_scale: float = 1.0
    """Root mean square of all planted singular values; those of the frozen matrices reach about 2."""
    noise: float = 0.1
    """Deviation of the training targets' noise, relative to the teacher's difference from the frozen network."""
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
        """Rank of every matrix if the budget is spread evenly."""
        return self.total // len(self.planted)


@dataclass(frozen=True)
class Training:
    """What all students have in common."""

    steps: int = 1200
    batch: int = 128
    initial_rank: int = 16
    """Rank per matrix that pruning methods start with, and the most that a matrix may grow to."""
    initial_warmup: float = 0.1
    final_warmup: float = 0.4
    """Shares of all steps before and after allocation."""
    window_initial: int = 10
    window_final: int = 100
    """SalientLoRA's windows; its paper ends at 200, in an allocation phase of at least 1000 steps."""
    interval: int = 10
    """Steps between two allocations of AdaLoRA and LoRA^2."""
    orthogonality: float = 0.1
    """Coefficient of the penalty in the released form, for all methods that have one."""
    clip: float = 1.0
    lr_warmup: float = 0.05
    """Share of all steps; the learning rate then falls linearly to 0."""

    @property
    def rates(self) -> RatePlan:
        """The learning rate as numbers."""
        return RatePlan("linear", round(self.lr_warmup * self.steps), self.steps, betas=(0.9, 0.999), weight_decay=0.0)

    @property
    def phase(self) -> tuple[int, int]:
        """Last step before and of the allocation phase."""
        return round(self.initial_warmup * self.steps), self.steps - round(self.final_warmup * self.steps)

    def growth_interval(self, rows: int, top_h: int) -> int:
        """Steps between growth events such that ``rows`` rows, ``top_h`` at a time, fill the allocation phase."""
        first, last = self.phase
        return max(1, (last - first) // -(-rows // top_h))


@dataclass(frozen=True)
class Arm:
    """One student: a method with its options."""

    name: str
    method: str
    start: Literal["planted", "uniform", "prune", "grow"]
    """Ranks at the start: the planted ones (oracle), the budget spread evenly, or what the method begins with."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def oracle(self) -> bool:
        return self.start == "planted"


ORACLE, UNIFORM = "true-ranks", "lora"
"""Arms that the others are compared with: the planted ranks given in SVD form, and the budget spread evenly."""
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
    """The arm's configuration; its budget is the planted total.

    Raises:
        ValueError: this version has no such method, or the options contradict each other.
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
