"""Options of LoRA^2. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from salient_ds.adapters.forms import AdapterForm, TwoScaleForm
from salient_ds.methods.adalora.options import SensitivityConfig
from salient_ds.ranks import RankLayout


class LoRA2Config(SensitivityConfig):
    name: Literal["lora2"] = "lora2"
    inner_width: int = Field(8, ge=1)
    """Width k of the two outer factors, which all ranks share. An update has at most rank k (released code: 8)."""

    implementation: ClassVar[str] = "salient_ds.methods.lora2.method:LoRA2"
    compilable: ClassVar[bool] = True

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """bb aa diag(E) B A."""
        return TwoScaleForm(inner_width=self.inner_width)

    def scored_elements(self, layout: RankLayout) -> int:
        """All elements except those of the outer factors, which all ranks share."""
        sides = zip(layout.in_features, layout.out_features, strict=True)
        outer = sum(self.inner_width * (wide + tall) for wide, tall in sides)
        return self.adapter_parameters(layout) - outer
