"""Which layers are launched as CUDA graphs, and that what a graph reads stays where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.bank import FactorBank
from salient_ds.run.compiled import MOST_SHAPES, GraphedForward, compile_layers, graph_problem
from tests.unit.adapters import test_bank
from tests.unit.adapters.test_bank import METHODS, assert_same, backward, make


@dataclass
class OnGPU:
    """Looks like a batch on a GPU."""

    shape: tuple[int, ...]
    is_cuda: bool = True


class Layer(nn.Module):
    def forward(self, hidden: Any, scale: float = 1.0) -> Any:
        return hidden, scale


def graphed(monkeypatch: pytest.MonkeyPatch, known: set[tuple[int, ...]]) -> GraphedForward:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *a, **k: ("graph", *function(*a, **k)))
    layer = Layer()
    return GraphedForward(layer, lambda *a, **k: ("plain", *layer.forward(*a, **k)), known)


def test_the_first_shapes_are_graphs_and_all_layers_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[tuple[int, ...]] = set()
    forward, other = graphed(monkeypatch, known), graphed(monkeypatch, known)
    assert not forward.graphs
    batches = [OnGPU((2, length, 8)) for length in range(1, MOST_SHAPES + 2)]
    assert [forward(batch, scale=2.0)[0] for batch in batches] == ["graph"] * MOST_SHAPES + ["plain"]
    assert other(batches[0])[0] == "graph" and other(batches[-1])[0] == "plain"
    assert forward(batches[0], scale=2.0) == ("graph", batches[0], 2.0)
    assert forward.graphs


def test_evaluation_and_cpus_have_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = graphed(monkeypatch, set())
    assert forward(torch.zeros(1, 2, 3))[0] == "plain"
    with torch.no_grad():
        assert forward(OnGPU((1, 2, 3)))[0] == "plain"
    forward._layer.eval()
    assert forward(OnGPU((1, 2, 3)))[0] == "plain"
    assert not forward.graphs


def test_the_signature_is_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    assert list(inspect.signature(graphed(monkeypatch, set())).parameters) == ["hidden", "scale"]


def derived(adapted: Any) -> list[int]:
    """Addresses of what a forward pass reads besides parameters."""
    tensors = [getattr(a, name, None) for a in adapted.adapters.values() for name in ("gain_R", "merged_kI", "lora_A")]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None and tensor.numel()]


@pytest.mark.parametrize("name", ["salientlora", "lora", "lora2"])
def test_addresses_stay_and_values_follow(name: str) -> None:
    pair = [make(METHODS[name], packed=True) for _ in range(2)]
    assert pair[1].packed is not None
    for bank in pair[1].packed.banks:
        assert isinstance(bank, FactorBank)
        bank.keep_addresses()
    assert_same(*pair)
    first = derived(pair[1])
    mask_N = torch.rand(pair[0].layout.total, generator=torch.Generator().manual_seed(4)) > 0.5
    for adapted in pair:
        adapted.trained.zero_grad()
        adapted.set_mask(mask_N, gate=True)
    taken = torch.empty(10_000)  # a freed block may come back at the same address; this one takes its place
    assert_same(*pair)
    assert derived(pair[1]) == first and taken.numel()
    assert torch.equal(backward(pair[0]), backward(pair[1]))


def test_new_banks_keep_addresses_too() -> None:
    adapted = make(METHODS["salientlora"], packed=True)
    assert adapted.packed is not None
    for bank in adapted.packed.banks:
        assert isinstance(bank, FactorBank)
        bank.keep_addresses()
    adapted.packed.repack()
    assert all(isinstance(bank, FactorBank) and bank._kept is not None for bank in adapted.packed.banks)


def test_what_rules_graphs_out() -> None:
    packed, apart = make(METHODS["lora"], packed=True), make(METHODS["lora"], packed=False)
    assert graph_problem(packed, partitioned=False) is None
    assert "ZeRO-3" in str(graph_problem(packed, partitioned=True))
    assert "not packed" in str(graph_problem(apart, partitioned=False))


@pytest.mark.parametrize("name", ["salientlora", "lora"])
def test_one_compilation_serves_layers_whose_ranks_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch compiles at most eight variants by itself, and runs what is left uncompiled without failing."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(test_bank, "LAYERS", 12)
    adapted = make(METHODS[name], packed=True)
    compile_layers(adapted, may_fail=False)
    adapted.model.train()
    graphs = []
    for resized in (False, True):
        if resized:
            for index, adapter in enumerate(adapted.adapters.values()):
                adapter.resize(2 + (index * 5) % 4)
            assert adapted.packed is not None
            adapted.packed.repack()
        x = torch.randn(5, test_bank.WIDTH, requires_grad=True)
        adapted.model(x).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    frames = torch._dynamo.utils.counters["frames"]
    assert graphs == [1, 2] and frames["total"] == frames["ok"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["salientlora", "lora2", "lora"])
def test_graphs_compute_what_compiled_layers_do(name: str) -> None:
    """Ten steps of plain SGD, masks changed in between: the same losses, bit for bit."""
    device = torch.device("cuda")
    found = []
    for graphs in (False, True):
        torch._dynamo.reset()
        adapted = make(METHODS[name], packed=True)
        adapted.trained.to(device)
        for adapter in adapted.adapters.values():
            adapter.to(device)
        adapted.model.train()
        compile_layers(adapted, may_fail=False, cuda_graphs=graphs)
        losses = []
        for step in range(10):
            if step == 6:
                mask_N = torch.rand(adapted.layout.total, generator=torch.Generator().manual_seed(4)) > 0.5
                adapted.set_mask(mask_N, gate=True)
            if adapted.penalty is not None:
                adapted.penalty.arm(1.0, device)
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step)).to(device)
            loss = adapted.trained(x).square().mean()
            loss.backward()
            losses.append(float(loss))
            with torch.no_grad():
                for parameter in adapted.trained.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
        forwards = [layer.forward for layer in adapted.model.layers]
        assert [isinstance(forward, GraphedForward) and forward.graphs for forward in forwards] == [graphs] * 2
        found.append(losses)
    assert found[0] == found[1] and len(set(found[0])) == 10
