"""An adapter with shortcuts: saved in our own format, loaded by one call, refused by every other form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.targets import is_shortcut
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.heterolora.export import WEIGHTS, load_shortcuts, refuse_shortcuts, shortcuts_act, write_shortcuts
from tests.unit.heterolora import shortcut_models as models

META = ExportMeta(method="heterolora", task_type="CAUSAL_LM", source_run="test")


def half_on(adapted: AdaptedModel) -> list[AdapterFactors]:
    """Every second module off; what an export reads from a checkpoint of this moment."""
    mask_M = torch.arange(len(adapted.adapters)) % 2 == 0
    adapted.set_mask(mask_M[adapted.layout.module_of_row_N], True)
    return [
        AdapterFactors(
            name, adapter.factors()["A"].parameter, None, adapter.factors()["B"].parameter, adapter.rank_mask_R.clone(),
            adapter.scaling,
        )
        for name, adapter in adapted.adapters.items()
    ]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    inputs = {key: value for key, value in models.batch().items() if key != "labels"}
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("norm", ["none", "reuse"])
@pytest.mark.parametrize("name", ["llama", "opt-post", "roberta", "gemma"])
def test_a_fresh_model_with_the_loaded_adapter_is_the_trained_one(name: str, norm: str, tmp_path: Path) -> None:
    adapted = models.adapt(models.make(name), name, norm, warm=True)
    adapted.model.eval()
    target = write_shortcuts(tmp_path / "out", half_on(adapted), META, "base", norm_after_shortcut=norm)
    expected = logits(adapted.model)
    loaded = load_shortcuts(models.make(name), target)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    assert (expected - logits(models.make(name))).abs().max() > 1e-3
    assert not any(p.requires_grad for p in loaded.parameters())


def test_modules_that_are_off_are_left_out(tmp_path: Path) -> None:
    adapted = models.adapt(models.make("llama"), "llama", warm=True)
    factors = half_on(adapted)
    write_shortcuts(tmp_path / "out", factors, META, "base", norm_after_shortcut="none", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "out" / WEIGHTS)
    live = {f.name for f in factors if f.rank}
    assert {key.rpartition(".lora_")[0] for key in saved} == live and 0 < len(live) < len(factors)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    record = json.loads((tmp_path / "out" / "salient_ds.json").read_text())
    assert record["form"] == "shortcuts" and record["total_rank"] == 2 * len(live)


def test_a_loaded_model_generates_with_and_without_cache(tmp_path: Path) -> None:
    adapted = models.adapt(models.make("llama"), "llama", warm=True)
    target = write_shortcuts(tmp_path / "out", half_on(adapted), META, "base", norm_after_shortcut="none")
    model: Any = load_shortcuts(models.make("llama"), target)
    prompt = models.batch()["input_ids"][:1]
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **common)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **common)) and cached.shape[1] > 7


def test_other_forms_are_refused_with_the_way_out() -> None:
    factors = half_on(models.adapt(models.make("llama"), "llama"))
    assert shortcuts_act(factors, "none")
    with pytest.raises(ValueError, match=r"--form shortcuts.*without adapter.shortcuts"):
        refuse_shortcuts(factors, "peft", "none")
    off = [f for f in factors if not is_shortcut(f.name)]
    refuse_shortcuts(off, "peft", "none")
    refuse_shortcuts(off, "peft", None)
    with pytest.raises(ValueError, match="norm_after_shortcut=reuse changes every layer"):
        refuse_shortcuts(off, "merged", "reuse")


def test_wrong_directories_and_models(tmp_path: Path) -> None:
    factors = half_on(models.adapt(models.make("llama"), "llama"))
    target = write_shortcuts(tmp_path / "out", factors, META, "base", norm_after_shortcut="none")
    with pytest.raises(ValueError, match="made for another model.*model.layers.0.self_attn.q_proj"):
        load_shortcuts(models.make("opt-post"), target)
    with pytest.raises(ValueError, match="--form shortcuts"):
        load_shortcuts(models.make("llama"), tmp_path)
