"""Tiny real transformers models with SVD adapters put in by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from salient_ds.adapters.ranked_linear import SVDLinear
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from tests.support.verify import logits_of, probe_inputs

VOCAB, RANK, SCALING = 64, 6, 2.0
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "bert_qa": "QUESTION_ANS", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "intermediate.dense", "output.dense"),
    "bert_qa": ("query", "value"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random two-layer model; weights large enough for every layer to matter in the logits."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = hf.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, initializer_range=0.1)
    bert = hf.BertConfig(**sizes, intermediate_size=48, num_labels=3, initializer_range=0.1)
    t5 = hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    builders = {
        "llama": lambda: hf.LlamaForCausalLM(llama),
        "bert": lambda: hf.BertForSequenceClassification(bert),
        "bert_qa": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**bert.to_dict(), "num_labels": 2})),
        "t5": lambda: hf.T5ForConditionalGeneration(t5),
    }
    model: nn.Module = builders[kind]().eval().to(dtype)
    return model


def adapt(model: nn.Module, targets: tuple[str, ...], size: float = 0.3) -> list[AdapterFactors]:
    """Wrap the targeted layers in place by SVD adapters with random factors and uneven masks; return the factors.

    Module i keeps i mod (RANK + 1) rows, at random places: ranks from 0 to RANK all occur. Masked rows hold large
    values, which must not show; the first live row of a module of full rank has E exactly 0.
    """
    draw = torch.Generator().manual_seed(1)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(targets)}
    factors = []
    for index, (name, base) in enumerate(linears.items()):
        dtype = base.weight.dtype
        wrapped = SVDLinear(base, RANK, SCALING, init_std=0.2, generator=draw, dtype=dtype).eval()
        keep = torch.randperm(RANK, generator=draw)[: index % (RANK + 1)]
        mask_R = torch.zeros(RANK, dtype=torch.bool).index_fill_(0, keep, True)
        values_R = torch.randn(RANK, generator=draw) * size
        values_R[~mask_R] = 50.0
        if mask_R.all():
            values_R[0] = 0.0
        wrapped.lora_E.data.copy_(values_R)
        wrapped.rank_mask_R.copy_(mask_R)
        wrapped.gated = True
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped)
        factors.append(AdapterFactors(name, wrapped.lora_A, wrapped.lora_E, wrapped.lora_B, mask_R, SCALING))
    return factors


class Case:
    """One model kind: base checkpoint on disk, factors, inputs and the adapted model's logits."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.base, self.dtype = kind, folder / "base", dtype
        self.meta = ExportMeta("salientlora", TASKS[kind], str(folder / "run"), {"name": "alpaca", "hash": "abc"})
        self.inputs = probe_inputs(VOCAB, TASKS[kind])
        model = build(kind, dtype)
        model.save_pretrained(self.base)
        with torch.no_grad():
            self.base_logits = logits_of(model(**self.inputs))
            self.factors = adapt(model, TARGETS[kind])
            self.logits = logits_of(model(**self.inputs))
