"""Cuts of adapters with more than linear factors: biases, embeddings, transposed weights, paths that end alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salient_ds.salience.spectral_cut import Cut
from tests.support.verify import logits_of, probe_inputs, verify_peft
from tests.unit.export.builders import VOCAB, build
from tests.unit.export.peft_adapters import INPUTS, config_of, logits_with, save_adapter, shrink, truncated

pytest.importorskip("peft", reason="the adapters are written and read by real PEFT")
EXACT = 1e-5
"""Tolerance of logits, as in test_shrink."""


def test_biases_of_base_layers_stay(tmp_path: Path) -> None:
    """bias="all" trains them; a layer that is no longer adapted gets its bias without PEFT's wrapper."""
    source = save_adapter(build("bert"), tmp_path / "source", r=4, target_modules=["query", "value"], bias="all",
                          task_type="SEQ_CLS", modules_to_save=["classifier"])  # fmt: skip
    shrinkage = shrink(source, tmp_path / "out", Cut("rank", 0.5))
    assert 0 in shrinkage.ranks.values()
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    gone = next(name for name, rank in shrinkage.ranks.items() if not rank)
    assert f"base_model.model.{gone}.bias" in written and f"base_model.model.{gone}.base_layer.bias" not in written
    inputs, full = probe_inputs(VOCAB, "SEQ_CLS"), tmp_path / "full"
    shrink(source, full, Cut("energy", 1))
    assert (logits_with(full, "bert", inputs) - logits_with(source, "bert", inputs)).abs().max() < EXACT
    from peft import PeftModel

    model = PeftModel.from_pretrained(build("bert"), str(tmp_path / "out")).base_model.model
    assert torch.equal(model.get_submodule(gone).bias, written[f"base_model.model.{gone}.bias"])
    assert written[f"base_model.model.{gone}.bias"].abs().max() > 0.01


def test_embeddings_and_the_head(tmp_path: Path) -> None:
    source = save_adapter(build("llama"), tmp_path / "source", r=5, lora_alpha=7,
                          target_modules=["embed_tokens", "lm_head", "q_proj"])  # fmt: skip
    shrink(source, tmp_path / "full", Cut("rank", 9))
    assert verify_peft(tmp_path / "full", build("llama"), INPUTS, logits_with(source)) < EXACT
    shrinkage = shrink(source, tmp_path / "cut", Cut("rank", 2, uniform=True))
    assert shrinkage.ranks["model.embed_tokens"] == 2
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "cut"))
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    expected = truncated(7 / 5 * before[f"{key}B"].double() @ before[f"{key}A"].double(), 2)
    assert (after[f"{key}B"] @ after[f"{key}A"] - expected).abs().max() < 1e-6
    logits_with(tmp_path / "cut")


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D (fan_in_fan_out): factors are as for any other layer."""
    import transformers as hf
    from peft import PeftModel

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)).eval()

    source = save_adapter(model(), tmp_path / "source", r=5, target_modules=["c_attn"], fan_in_fan_out=True)
    shrink(source, tmp_path / "full", Cut("energy", 1))
    assert config_of(tmp_path / "full")["fan_in_fan_out"] is True
    merged = [PeftModel.from_pretrained(model(), str(tmp_path / n)).merge_and_unload() for n in ("source", "full")]
    with torch.no_grad():
        wanted, found = (logits_of(each(**INPUTS)) for each in merged)
    assert (wanted - found).abs().max() < EXACT


class Nested(torch.nn.Module):
    """The path of one module is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
        self.vision = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(32, 32)])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vision["layers"][0](self.layers[0](x))


@pytest.mark.parametrize("excluded", [None, ["other"], "other|.*more"])
def test_a_module_cut_to_nothing_is_not_adapted_again(tmp_path: Path, excluded: list[str] | str | None) -> None:
    """vision.layers.0 is left out of the file, and its path ends with that of layers.0, which is in it."""
    from peft import PeftModel

    source = save_adapter(Nested(), tmp_path / "source", r=3, target_modules=["layers.0"], exclude_modules=excluded,
                          task_type=None)  # fmt: skip
    tensors = load_file(source / "adapter_model.safetensors")
    key = "base_model.model.vision.layers.0.lora_B.weight"
    save_file(tensors | {key: tensors[key] * 1e-3}, source / "adapter_model.safetensors")
    shrinkage = shrink(source, tmp_path / "out", Cut("rank", 1.5))
    assert shrinkage.ranks == {"layers.0": 3, "vision.layers.0": 0}
    loaded = PeftModel.from_pretrained(Nested(), str(tmp_path / "out"))
    assert [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")] == [
        "base_model.model.layers.0"
    ]
    assert config_of(tmp_path / "out")["task_type"] is None
