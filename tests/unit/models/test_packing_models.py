"""Every architecture that may pack: logits, losses and gradients of packed examples are those of single ones.

Each model is tiny, with random weights in fp32 and adapters on all linear layers. Windows and chunks are shorter than
the examples. A model that is not in the table of ``models/packing.py`` is not tested here, and packing refuses it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.data.collate import Collator
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.models.packed_masks import keep_examples_apart
from salient_ds.models.packing import GROUPS
from salient_ds.run.compiled import compile_layers
from tests.unit.models import flash_on_cpu
from tests.unit.models.packing_cases import LENGTHS, LONG, alone, difference, examples, packed, tiny, together

CPU = torch.device("cpu")
FLASH = "flash_attention_2"
CASES = [(kind, attention) for group in GROUPS for kind in group.names for attention in group.attention]
SHORT_SIGHTED = [name for group in GROUPS if group.layers != "full" for name in group.names]


def adapted(model: nn.Module, modules: str | list[str] = "all-linear") -> AdaptedModel:
    """With adapters that act: every trained value is drawn anew."""
    found = inject(model, AdapterConfig(rank=2, target_modules=modules), LoRAConfig(), 0, torch.float32, CPU)
    found.pack()
    draw = torch.Generator().manual_seed(1)
    for parameter in found.trained.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return found


@pytest.mark.parametrize(("kind", "attention"), [case for case in CASES if case[1] != FLASH])
def test_packed_logits_are_those_of_single_examples(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    keep_examples_apart(model)
    trained = adapted(model).trained
    batch, expected = packed(attention), alone(trained)
    assert "attention_mask" not in batch and len(batch["input_ids"]) > 1
    assert difference(together(trained, batch), expected) < 1e-5
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert difference(together(trained, batch), expected) > 1e-2, "control: an example reads the one before"


@pytest.mark.parametrize("kind", [kind for kind, attention in CASES if attention == FLASH])
def test_flash_attention_is_told_where_examples_begin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's function in plain PyTorch; the kernel itself needs a GPU."""
    other = next(attention for case, attention in CASES if case == kind and attention != FLASH)
    expected = alone(tiny(kind, other))
    flash_on_cpu.install(monkeypatch)
    model = tiny(kind, FLASH)
    keep_examples_apart(model)
    batch = packed(FLASH)
    assert len(batch["input_ids"]) == 1
    assert difference(together(model, batch), expected) < 1e-5


@pytest.mark.parametrize("kind", SHORT_SIGHTED)
def test_windows_and_chunks_of_the_tests_act(kind: str) -> None:
    """The longest example sees less with them than without them; one that fits into them sees the same."""
    attention = next(attention for case, attention in CASES if case == kind and attention != FLASH)
    short, long = (alone(tiny(kind, attention, **sizes)) for sizes in ({}, LONG))
    assert difference([short[3]], [long[3]]) > 1e-2
    assert difference([short[2]], [long[2]]) < 1e-6


def loss_and_gradients(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """The summed loss of all targets, and its gradient in all adapters."""
    total, parameters = 0.0, [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        loss = model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
        for sum_, grad in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += grad
        total += float(loss.detach())
    return total, torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("memory", ["plain", "recomputed"])
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"),
        ("mistral", "sdpa"),
        ("gemma3_text", "sdpa"),
        ("gemma2", "eager"),
        ("llama4_text", "sdpa"),
        ("mixtral", "eager"),
        ("opt", "sdpa"),
        ("gpt_oss", "eager"),
    ],
)
def test_losses_and_gradients(kind: str, attention: str, memory: str) -> None:
    """In training mode, with activation checkpointing and without."""
    base: Any = tiny(kind, attention)
    if memory == "recomputed":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    keep_examples_apart(base)
    model = adapted(base, ["q_proj", "v_proj"]).trained.train()
    single = [{key: torch.tensor(value)[None] for key, value in example.items()} for example in examples()]
    expected, expected_grads = loss_and_gradients(model, single)
    loss, grads = loss_and_gradients(model, [packed(attention)])
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=2e-5 * float(expected_grads.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "opt"])
def test_compiled_layers(kind: str) -> None:
    model = adapted(tiny(kind, "sdpa"))
    keep_examples_apart(model.model)
    expected = alone(model.trained)
    compile_layers(model, may_fail=False)
    assert difference(together(model.trained, packed("sdpa")), expected) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_evaluation_batches_keep_their_mask(attention: str) -> None:
    """Held-out rows are padded, not packed, also for a model that gets its masks from us."""
    model = tiny("opt", attention)
    keep_examples_apart(model)
    batch = Collator(0, attn_implementation=attention)(examples())
    with torch.no_grad():
        logits_BSV = model(**batch).logits
    found = [logits_BSV[row, :length] for row, length in enumerate(LENGTHS)]
    assert difference(found, alone(model)) < 1e-5
