"""Options of LoRA. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from salient_ds.adapters.forms import AdapterForm, PlainForm, SVDForm
from salient_ds.methods.options import MethodConfig
from salient_ds.ranks import RankLayout


class LoRAConfig(MethodConfig):
    name: Literal["lora"] = "lora"
    form: Literal["plain", "svd"] = "plain"
    """plain: B A with B = 0 at the start (LoRA). svd: B diag(E) A with E = 0 at the start, as in adaptive methods."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA) instead of alpha / r."""

    implementation: ClassVar[str] = "salient_ds.methods.lora.method:LoRA"
    packable: ClassVar[bool] = True
    compilable: ClassVar[bool] = True

    @property
    def takes_shortcuts(self) -> bool:
        """Only beside plain adapters."""
        return self.form == "plain"

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """No events."""
        return 0

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """B A, or B diag(E) A with ``form: svd``."""
        return PlainForm(self.rslora) if self.form == "plain" else SVDForm(self.rslora)
