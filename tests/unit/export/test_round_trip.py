"""What the training model computes, real PEFT and transformers compute from the export.

Tolerances, as largest absolute difference of logits that reach 2 to 5: fp32 1e-5 (measured 2e-6). bf16 0.05, three
units in the last place of the largest logits (measured 0.03): the same numbers are rounded at other places.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from salient_ds.export.api import export_adapter
from tests.support.verify import verify_merged, verify_peft
from tests.unit.export.builders import TASKS, Case

pytest.importorskip("peft", reason="the round trip is tested against real PEFT")
FP32, BF16 = 1e-5, 0.05


def difference(case: Case, folder: Path, form: str, dtype: torch.dtype = torch.float32) -> float:
    if form == "merged":
        return verify_merged(folder, case.inputs, case.logits, dtype)
    return verify_peft(folder, case.base, case.inputs, case.logits, dtype)


@pytest.mark.parametrize("form", ["peft", "padded", "merged"])
@pytest.mark.parametrize("kind", list(TASKS))
def test_logits_are_reproduced(case_of, out: Path, kind: str, form: str) -> None:
    case = case_of(kind)
    assert {f.rank for f in case.factors} >= ({0, 1, 2, 3} if kind == "bert_qa" else {0, 3, 6})
    export_adapter(case.factors, case.meta, out, form, case.base)
    assert (case.logits - case.base_logits).abs().max() > 0.05, "the adapter must matter for this test to mean anything"
    assert difference(case, out, form) < FP32


@pytest.mark.parametrize("form", ["peft", "padded"])
def test_wrong_scale_is_detected(llama: Case, out: Path, form: str) -> None:
    export_adapter(llama.factors, llama.meta, out, form, llama.base)
    config = json.loads((out / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert verify_peft(out, llama.base, llama.inputs, llama.logits) > 1000 * FP32


def test_wrong_scale_of_one_module_is_detected(llama: Case, out: Path) -> None:
    export_adapter(llama.factors, llama.meta, out, "peft", llama.base)
    config = json.loads((out / "adapter_config.json").read_text())
    module = min(config["rank_pattern"], key=config["rank_pattern"].get)
    config["alpha_pattern"] = {module: config["rank_pattern"][module]}  # what older exports wrote
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert verify_peft(out, llama.base, llama.inputs, llama.logits) > 100 * FP32


@pytest.mark.parametrize("form", ["peft", "padded", "merged"])
def test_bf16(case_of, out: Path, form: str) -> None:
    case = case_of("llama", torch.bfloat16)
    dtype = None if form == "merged" else torch.bfloat16
    export_adapter(case.factors, case.meta, out, form, case.base, dtype)
    effect = (case.logits - case.base_logits).abs().max().item()
    assert difference(case, out, form, torch.bfloat16) < BF16 < effect / 10


@pytest.mark.parametrize("form", ["peft", "padded"])
def test_vllm_rank_and_fp16_storage(llama: Case, out: Path, form: str) -> None:
    pad_to = "vllm" if form == "padded" else None
    export_adapter(llama.factors, llama.meta, out, form, llama.base, torch.float16, pad_to=pad_to)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (8 if form == "padded" else 6)
    assert verify_peft(out, llama.base, llama.inputs, llama.logits) < 0.005
