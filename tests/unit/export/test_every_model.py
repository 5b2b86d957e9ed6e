"""Every causal language model of transformers: what check names, injection adapts, PEFT's file lists and a merge holds.

Tiny models with random weights in fp32. Logits of the merged model equal those of base and adapter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.adapters.adaptable import Adaptable
from salient_ds.adapters.inject import inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.check.built_model import describe
from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.methods.lora.options import LoRAConfig
from tests.support.tiny_architectures import MULTIMODAL, NOT_BUILT, causal_model_types, tiny_model

USUAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe",
    "gpt_oss", "granitemoe", "deepseek_v3", "opt", "bloom", "falcon", "gpt_neox", "phi3", "mamba2", "qwen3_5", "llama4",
)  # fmt: skip
"""Tested in every run of the suite; the others are marked slow."""
NOTHING_TO_ADAPT = ("gpt-sw3", "gpt2", "openai-gpt")
"""Built from Conv1D; check refuses them."""
NO_MERGE = {
    "hrm_text": "only a part of a tensor",
    "lara_mini": "only a part of a tensor",
    "sarvam_moe": "only a part of a tensor",
    "zamba": "share their weight",
    "zamba2": "share their weight",
}
NO_BACKWARD = {
    "reformer": "its reversible layers return no gradient if the embedding is frozen",
    "rwkv": "its recurrence writes over what the backward pass needs",
}
WITHOUT_GRADIENT = {
    "deepseek_v4": r"\.compressor\.",  # compresses 128 tokens at a time, and there are fewer here
    "doge": r"\.dt_proj$",  # multiplied by a parameter that starts at zero
    "gemma3n_text": r"\.per_layer_",  # so is this
    "zamba2": r"_adapter_list\.",  # each shared layer uses its own of these only
    "zaya": r"\.qkv_proj\.[qk]_proj$",  # a convolution behind it starts at zero
}
"""Adapters that get no gradient here, for reasons that do not hold for a trained model on longer texts."""
TOKENS = torch.randint(8, 90, (2, 48), generator=torch.Generator().manual_seed(0))


def test_every_model_type_is_here() -> None:
    known = set(causal_model_types())
    named = {*NOT_BUILT, *USUAL, *NOTHING_TO_ADAPT, *NO_MERGE, *NO_BACKWARD, *WITHOUT_GRADIENT, *MULTIMODAL}
    assert named <= known


def kinds() -> list[Any]:
    return [
        pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow)
        for kind in causal_model_types()
        if kind not in NOT_BUILT and kind not in NOTHING_TO_ADAPT
    ]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def adapted(model: Any, targets: str | list[str]) -> list[AdapterFactors]:
    """Inject adapters that matter, and return their factors."""
    options = AdapterConfig(rank=2, alpha=8, target_modules=targets, init_std=0.3)
    injected = inject(model, options, LoRAConfig(name="lora"), 0, torch.float32)
    draw = torch.Generator().manual_seed(1)
    for adapter in injected.adapters.values():
        adapter.lora_B.data.normal_(std=0.05, generator=draw)  # type: ignore[operator]
    mask = torch.ones(2, dtype=torch.bool)
    return [
        AdapterFactors(name, adapter.lora_A, None, adapter.lora_B, mask, adapter.scaling)  # type: ignore[arg-type]
        for name, adapter in injected.adapters.items()
    ]


@pytest.mark.parametrize("kind", kinds())
def test_one_list_of_matrices(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(kind).save_pretrained(base)
    named = Adaptable.from_json(describe(str(base), "AutoModelForCausalLM")["adaptable"]).select("all-linear")
    model = loaded(base)
    before = logits(model)
    factors = adapted(model, "all-linear")
    assert [item.name for item in factors] == named
    if kind not in NO_BACKWARD:
        model(input_ids=TOKENS).logits.float().square().sum().backward()
        idle = [item.name for item in factors if item.B.grad is None or not item.B.grad.any()]
        expected = re.compile(WITHOUT_GRADIENT.get(kind, r"(?!)"))
        assert [name for name in idle if not expected.search(name)] == []
    meta = ExportMeta("lora", "CAUSAL_LM", str(tmp_path / "run"))
    export_adapter(factors, meta, tmp_path / "peft", "peft", base)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["target_modules"] == named
    if kind in NO_MERGE:
        with pytest.raises(ValueError, match=NO_MERGE[kind]):
            export_adapter(factors, meta, tmp_path / "merged", "merged", base)
        return
    export_adapter(factors, meta, tmp_path / "merged", "merged", base)
    reference, merged = logits(model), logits(loaded(tmp_path / "merged"))
    size = float(reference.abs().max())
    assert (reference - before).abs().max() > 0.02 * size, "the adapter must matter"
    assert (merged - reference).abs().max() < 1e-4 * size


@pytest.mark.parametrize("kind", kinds())
def test_peft_loads_it_or_the_export_warns(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    tiny_model(kind).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base")
    factors = adapted(model, "all-linear")
    meta = ExportMeta("lora", "CAUSAL_LM", str(tmp_path / "run"))
    export_adapter(factors, meta, tmp_path / "peft", "peft", tmp_path / "base")
    warned = "warning: PEFT takes the names of" in capsys.readouterr().err
    again = PeftModel.from_pretrained(loaded(tmp_path / "base"), str(tmp_path / "peft"))
    wrapped = [name for name, module in again.named_modules() if hasattr(module, "lora_A")]
    names = [name.removeprefix("base_model.model.") for name in wrapped]
    reference = logits(model)
    near = bool((logits(again) - reference).abs().max() < 1e-4 * reference.abs().max())
    assert warned != (near and names == [item.name for item in factors])


def test_a_tower_that_is_named_is_merged_too(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "base")
    factors = adapted(loaded(tmp_path / "base"), r"re:model\.(vision_tower|language_model)\..*\.q_proj")
    assert len(factors) == 4
    meta = ExportMeta("lora", "CAUSAL_LM", str(tmp_path / "run"))
    merged = loaded(export_adapter(factors, meta, tmp_path / "merged", "merged", tmp_path / "base"))
    plain = loaded(tmp_path / "base")
    for item in factors:
        delta = item.scaling * item.B @ item.A
        expected = plain.get_submodule(item.name).weight + delta
        assert torch.allclose(merged.get_submodule(item.name).weight, expected, atol=1e-6)
