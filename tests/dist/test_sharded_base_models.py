"""Models that are not like LLaMA: a sharded base computes the same or says that it cannot. One process, no engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salient_ds.zero.sharded_base import ShardedBase

CPU = torch.device("cpu")
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


class Layer(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x + torch.tanh(self.inner(x)))


class Net(nn.Module):
    """Five layers whose outputs are wrapped somehow, and something trainable before them."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(6))
        self.layers = nn.ModuleList(Layer(wrap) for _ in range(5))
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = self.unwrap(layer(x))
        return x


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


WRAPS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda x: x),
    "tuple": (lambda x: (x, None), lambda out: out[0]),
    "dict": (lambda x: {"hidden": x}, lambda out: out["hidden"]),
}


def sharded(net: nn.Module) -> nn.Module:
    for parameter in net.layers.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    scale = net.scale
    del net.scale
    ShardedBase(net, OFFLOAD, CPU)
    net.scale = scale
    return net


@pytest.mark.parametrize("kind", WRAPS)
def test_gradients_are_those_of_the_whole_model(kind: str) -> None:
    whole = Net(*WRAPS[kind])
    apart = sharded(copy.deepcopy(whole))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for net in (whole, apart):
        for _ in range(2):
            net(x).square().sum().backward()
    torch.testing.assert_close(apart.scale.grad, whole.scale.grad)


def test_outputs_that_nothing_is_known_of_are_refused() -> None:
    net = sharded(Net(Box, lambda box: box.x))
    with pytest.raises(ValueError, match="returns Box, in which no tensor was found .*partitioned"):
        net(torch.ones(2, 6))
    with torch.no_grad():
        assert net(torch.ones(2, 6)).isfinite().all()


def test_shared_parameters_mixed_types_and_layerdrop_are_refused() -> None:
    shared = Net(*WRAPS["tensor"])
    shared.layers[3].inner.weight = shared.layers[0].inner.weight
    mixed = Net(*WRAPS["tensor"])
    mixed.layers[2].double()
    dropped = Net(*WRAPS["tensor"])
    dropped.config = type("Config", (), {"layerdrop": 0.1})()
    for net, message in (
        (shared, "share parameters"),
        (mixed, "torch.float32, torch.float64"),
        (dropped, "layerdrop=0.1"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*use ZeRO stage 2"):
            ShardedBase(net, OFFLOAD, CPU)
