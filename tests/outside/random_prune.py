"""A method that lives outside of the package: one event, after which random rows are left. ADDING.md explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from salient_ds.methods.base import BaseMethod
from salient_ds.methods.options import TargetConfig
from salient_ds.ranks import Event, RankDecision, RankLayout

if TYPE_CHECKING:
    from torch import Tensor


class RandomPruneConfig(TargetConfig):
    """Section ``method`` of a run file: ``{name: random_prune, target_rank: 2, prune_at: 100}``."""

    name: Literal["random_prune"] = "random_prune"
    prune_at: int = Field(ge=1)
    """Step after which the rows are drawn."""
    draw_seed: int = 0
    """Seed of the draw."""

    implementation: ClassVar[str] = "tests.outside.random_prune:RandomPrune"
    packable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "last"

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """One event.

        Raises:
            ValueError: it would come after the last step.
        """
        if self.prune_at > total_steps:
            raise ValueError(
                f"method.prune_at={self.prune_at} is after the last of {total_steps} steps: lower it, or train longer"
            )
        return [Event(self.prune_at, self.wanted_total(len(layout.ranks)), window_start=self.prune_at, window=1)]

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.wanted_total(len(layout.ranks))


class RandomPrune(BaseMethod):
    """Draws the rows that stay; pruned rows are zeroed everywhere and can be dropped (BaseMethod's policy)."""

    def __init__(self, config: RandomPruneConfig, layout: RankLayout, total_steps: int) -> None:
        super().__init__(config, layout, total_steps)
        self.draw_seed = config.draw_seed

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """The same draw on every process: it depends on the options alone."""
        import torch

        order_N = torch.randperm(self.layout.total, generator=torch.Generator().manual_seed(self.draw_seed))
        mask_N = torch.zeros(self.layout.total, dtype=torch.bool)
        mask_N[order_N[: event.total_rank]] = True
        return RankDecision(event.step, event.total_rank, mask_N)
