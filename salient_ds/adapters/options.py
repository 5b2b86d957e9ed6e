"""Section ``adapter`` of a run file. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from salient_ds.adapters.presets import PREFIX, PRESETS, preset_names
from salient_ds.strict import Strict

LLAMA_MODULES = PRESETS["llama"]


class OrthogonalityConfig(Strict):
    coefficient: float = Field(0.1, ge=0)
    """Weight of the orthogonality penalty in the objective. 0 switches it off; methods that need the penalty's value
    still measure it."""
    form: Literal["mean_norm", "squared"] = "mean_norm"
    """mean_norm: the mean of ||A A^T - I||_F over all factors (released code). squared: the sum of the squared norms
    (papers)."""


class ShortcutConfig(Strict):
    """LoRA-adapted shortcut connections beside the adapted layers (HeteroLoRA)."""

    modules: list[str] = ["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"]
    """Shortcuts to add: kinds, or single ones by path such as "model.layers.3.residual_1". residual_1 and residual_2
    adapt the residual connections around attention and FFN. shortcut_sa bypasses both. shortcut_ffn leads from the
    FFN input of the previous layer to the FFN input of this one."""
    rank: int | None = Field(None, gt=0)
    """Rank of every shortcut (default: adapter.rank)."""
    alpha: float = Field(4.0, gt=0)
    """Numerator of the shortcuts' scaling alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of a shortcut."""
    norm_after_shortcut: Literal["none", "reuse"] = "none"
    """none: fresh or disabled shortcuts do not change the output. reuse: the layer's norms run again after a shortcut
    (released code)."""


class AdapterConfig(Strict):
    target_modules: str | list[str] = LLAMA_MODULES
    """The layers to adapt: names (the ends of module paths), "preset:NAME" for the list that papers adapt of a family
    (deberta, roberta, bert, bart, t5, flan-t5, opt, gemma, llama, mistral, qwen, phi3), one regular expression as
    "re:...", or "all-linear"."""
    rank: int = Field(gt=0)
    """Initial rank r of every adapted matrix. With IncreLoRA: the largest rank that a matrix may grow to."""
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Initial ranks of single matrices, by the end of their module path, such as {"q_proj": 4, "layers.0.mlp.up_proj":
    16}. The longest name counts, "*" means all others (default: `rank`), and rank 0 leaves a matrix out. In a run file
    also a path: a finished run, an adapter, PEFT's adapter_config.json or a search's rank_pattern.json, whose ranks a
    LoRA is then trained with."""
    alpha: float = Field(32.0, gt=0)
    """Numerator of the scaling: the update is (alpha / r) B diag(E) A. r is `rank`, for every matrix of `rank_pattern`
    and after rows are pruned. With IncreLoRA, r is the current rank."""
    shortcuts: ShortcutConfig | None = None
    """Trainable shortcut connections (methods heterolora and lora). Default: none."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    init_std: float = Field(0.02, ge=1e-6, le=10)
    """Standard deviation of the normal distribution that A and B start from (0.02 in AdaLoRA and SalientLoRA). It is
    between 1e-6, below which products of A and B round to 0, and 10."""
    orthogonality: OrthogonalityConfig = OrthogonalityConfig()  # type: ignore[call-arg]
    train_head: bool | Literal["auto"] = "auto"
    """Train the head of a classifier, a regression or a question-answering model in full, beside the adapters. auto:
    what of it the checkpoint lacks, so that it begins at random values. No adapter ever goes on a head."""
    also_train: list[str] = []
    """Further modules to train in full, embeddings included: names (the ends of module paths), as PEFT's
    modules_to_save. They are exported as such. Example: ["embed_tokens", "lm_head"]."""

    @field_validator("target_modules")
    @classmethod
    def _known_preset(cls, chosen: str | list[str]) -> str | list[str]:
        if isinstance(chosen, str) and chosen.startswith(PREFIX):
            preset_names(chosen)
        return chosen
