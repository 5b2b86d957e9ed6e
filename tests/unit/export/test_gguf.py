"""The GGUF form, read back with the gguf package. llama.cpp itself reads it in tests/clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from salient_ds.export.api import export_adapter
from salient_ds.export.gguf_format import FAMILIES, _names
from tests.support.tiny_architectures import tiny_config
from tests.unit.export.builders import Case

gguf = pytest.importorskip("gguf")
HEADS = {"q_proj": 4, "k_proj": 2}


def rows_of_llama_cpp(update_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """One row after the other: of every head, first half and second half take turns."""
    size = len(update_OI) // heads
    order = [h * size + half * (size // 2) + k for h in range(heads) for k in range(size // 2) for half in (0, 1)]
    return update_OI[order]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_tensors(llama: Case, out: Path, dtype: torch.dtype, error: float) -> None:
    export_adapter(llama.factors, llama.meta, out, "gguf", llama.base, dtype)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter.gguf", "salient_ds.json"]
    reader = gguf.GGUFReader(out / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    found = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    theirs = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}  # fmt: skip
    assert len(found) == 2 * sum(f.rank > 0 for f in llama.factors)
    for factors in (f for f in llama.factors if f.rank):
        _, _, layer, *path = factors.name.split(".")
        name = f"blk.{layer}.{theirs['.'.join(path)]}.weight"
        A_rI, B_Or = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        assert len(A_rI) == factors.rank, "every matrix keeps its own rank"
        E_R = factors.E * factors.mask  # type: ignore[operator]
        wanted = (factors.scaling * factors.B @ torch.diag(E_R) @ factors.A).detach()
        if path[-1] in HEADS:
            wanted = rows_of_llama_cpp(wanted, HEADS[path[-1]])
        update = fields["adapter.lora.alpha"] / len(A_rI) * B_Or @ A_rI
        assert (update - wanted).abs().max() < error * max(wanted.abs().max(), 1)


def test_what_the_format_cannot_hold(llama: Case, case_of, out: Path) -> None:
    with pytest.raises(ValueError, match=r"lm_head.weight were trained in full.*export as merged"):
        export_adapter(llama.factors, llama.meta, out, "gguf", llama.base, trained={"lm_head.weight": torch.ones(2, 2)})
    bert = case_of("bert")
    with pytest.raises(ValueError, match="is of family 'bert', and adapters as GGUF are tested for gemma, "):
        export_adapter(bert.factors, bert.meta, out, "gguf", bert.base)
    odd = [replace(llama.factors[-1], name="model.layers.0.extra")]
    with pytest.raises(ValueError, match=r"llama.cpp has no matrix of its own for model\.layers\.0\.extra"):
        export_adapter(odd, llama.meta, out, "gguf", llama.base)
    with pytest.raises(ValueError, match="names a file: give a folder"):
        export_adapter(llama.factors, llama.meta, out / "a.gguf", "gguf", llama.base)
    with pytest.raises(ValueError, match="pad_to=8 belongs to the padded form"):
        export_adapter(llama.factors, llama.meta, out, "gguf", llama.base, pad_to=8)
    assert not out.exists()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_linear_layer_of_a_family_has_a_name(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and ".layers." in name]  # fmt: skip
    pairs = [SimpleNamespace(name=name) for name in layers]
    names = _names(gguf, pairs, FAMILIES[kind], config.to_dict())  # type: ignore[arg-type]
    assert len(set(names.values())) == len(layers) >= 8
    assert all(theirs.startswith("blk.") and theirs.endswith(".weight") for theirs in names.values())
