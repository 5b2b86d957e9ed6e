"""Packed adapters compute what separate ones do, and their addresses say where everything is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.packed_model import LAYERS_PER_BANK, _in_groups, layer_of
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.methods.salientlora.options import SalientLoRAConfig

WIDTH, RANK, LAYERS = 12, 6, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 20, bias=False)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.q(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.top = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.top(x)


SALIENT = SalientLoRAConfig(target_rank=2)
METHODS: dict[str, Any] = {
    "salientlora": SALIENT,
    "adalora": AdaLoRAConfig(target_rank=2),
    "lora": LoRAConfig(),
    "lora_svd": LoRAConfig(form="svd"),
    "lora2": LoRA2Config(target_rank=2),
    "lora2_wide": LoRA2Config(target_rank=2, inner_width=3),
    "increlora": IncreLoRAConfig(target_rank=4, top_h=2),
}


def make(method: Any, packed: bool, **adapter: Any) -> AdaptedModel:
    torch.manual_seed(0)
    net = Net()
    options = {"rank": RANK, "alpha": 8, "init_std": 0.3, "target_modules": ["q", "up", "down", "top"]} | adapter
    adapted = inject(net, AdapterConfig(**options), method, 3, torch.float32)
    if packed:
        adapted.pack()
    with torch.no_grad():  # nothing may be hidden by a factor that starts at zero
        for name, tensor, index in every_factor(adapted):
            if name in ("E", "B"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return adapted


def every_factor(adapted: AdaptedModel, of: str = "value") -> list[tuple[str, torch.Tensor, int]]:
    """(factor, live tensor, index) in module order, through the addresses alone."""
    found = []
    for adapter in adapted.adapters.values():
        for name, where in adapter.factors().items():
            flat = where.parameter.detach() if of == "value" else where.parameter.grad
            assert flat is not None
            numel = int(torch.tensor(where.shape).prod())
            found.append((name, flat.view(-1)[where.offset : where.offset + numel].view(where.shape), len(found)))
    return found


def backward(adapted: AdaptedModel, steps: int = 1) -> torch.Tensor:
    adapted.model.train()
    if adapted.penalty is not None:
        adapted.penalty.arm(1.0, torch.device("cpu"))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    out = adapted.model(x)
    out.square().sum().backward()
    return out.detach()


def assert_same(one: AdaptedModel, two: AdaptedModel) -> None:
    torch.testing.assert_close(backward(one), backward(two))
    for (name, mine, _), (_, theirs, _) in zip(every_factor(one, "grad"), every_factor(two, "grad"), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, n=name: f"{n}: {text}")
    if one.penalty is not None:
        assert two.penalty is not None and one.penalty.norms_M2 is not None
        assert bool((one.penalty.norms_M2[:, :2] > 0).any())
        torch.testing.assert_close(one.penalty.norms_M2, two.penalty.norms_M2)
        torch.testing.assert_close(one.penalty.value(), two.penalty.value())


@pytest.mark.parametrize("name", METHODS)
def test_packed_equals_separate(name: str) -> None:
    separate, packed = make(METHODS[name], False), make(METHODS[name], True)
    assert packed.packed is not None and len(packed.packed.banks) == 2  # layers, and what belongs to none
    assert_same(separate, packed)
    trainable = [p for p in packed.trained.parameters() if p.requires_grad]
    assert len(trainable) == (2 if name == "lora" else 4)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("form", ["mean_norm", "squared"])
@pytest.mark.parametrize("name", ["salientlora", "lora2", "lora2_wide"])
def test_packed_equals_separate_under_masks(name: str, gate: bool, form: str) -> None:
    orthogonality = {"coefficient": 0.4, "form": form}
    pair = [make(METHODS[name], packed, orthogonality=orthogonality) for packed in (False, True)]
    mask_N = torch.rand(pair[0].layout.total, generator=torch.Generator().manual_seed(4)) > 0.5
    mask_N[:RANK] = False  # a matrix that is off altogether
    backward(pair[1])  # before: what the bank derives from masks must not be stale
    for adapted in pair:
        adapted.trained.zero_grad()
        adapted.set_mask(mask_N, gate)
    assert_same(*pair)


@pytest.mark.parametrize("name", ["lora2", "lora2_wide"])
def test_more_two_scale_adapters_take_few_more_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty and the inner factors are computed per bank, not per adapter. Views are counted too."""
    counts = {}
    for layers in (2, 4):
        monkeypatch.setitem(globals(), "LAYERS", layers)
        for packed in (True, False):
            adapted = make(METHODS[name], packed)
            backward(adapted)
            with Operations() as mode:
                backward(adapted)
            counts[layers, packed] = mode.count
    more = {packed: counts[4, packed] - counts[2, packed] for packed in (True, False)}
    assert more[True] < 0.5 * more[False], counts


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_two_scale_adapters_with_different_ranks_work_one_by_one() -> None:
    adapted = make(METHODS["lora2_wide"], packed=True)
    for index, adapter in enumerate(adapted.adapters.values()):
        adapter.resize(1 + index % 4)
    assert adapted.packed is not None
    adapted.packed.repack()
    with torch.no_grad():
        for _, tensor, index in every_factor(adapted):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))
    out = backward(adapted)
    up = adapted.adapters["layers.0.up"]
    assert up.rank == 2 and out.isfinite().all()
    A, B, E, aa, bb = (getattr(up, f"lora_{name}").detach() for name in ("A", "B", "E", "aa", "bb"))
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(up(x), up.base(x) + up.scaling * x @ (bb @ aa @ torch.diag(E) @ B @ A).T)


def test_dropout_acts_on_the_adapters_input_only() -> None:
    packed = make(SALIENT, True, dropout=0.5)
    packed.model.train()
    x = torch.randn(64, WIDTH)
    torch.manual_seed(1)
    first = packed.model(x)
    torch.manual_seed(1)
    second = make(SALIENT, False, dropout=0.5)
    second.model.train()
    torch.manual_seed(1)
    torch.testing.assert_close(first, second.model(x))
    assert not torch.allclose(first, packed.model(x))


def test_ragged_ranks_equal_masked_ones() -> None:
    """A bank of adapters with different ranks: the penalty's other path."""
    masked, small = make(SALIENT, False), make(SALIENT, True)
    keep = {name: torch.arange(RANK) < 1 + index % 4 for index, name in enumerate(masked.adapters)}
    masked.set_mask(torch.cat(list(keep.values())), gate=True)
    for name, adapter in small.adapters.items():
        adapter.resize(int(keep[name].sum()))
    assert small.packed is not None
    small.packed.repack()
    with torch.no_grad():
        for name, adapter in small.adapters.items():
            for factor, where in adapter.factors().items():
                whole = getattr(masked.adapters[name], f"lora_{factor}").detach()
                part = whole[:, keep[name]] if factor == "B" else whole[keep[name]]
                where.parameter.view(-1)[where.offset : where.offset + part.numel()] = part.reshape(-1)
                assert part.shape == where.shape
    torch.testing.assert_close(backward(masked), backward(small))
    for name, adapter in small.adapters.items():
        for factor, where in adapter.factors().items():
            whole = getattr(masked.adapters[name], f"lora_{factor}").grad
            part = whole[:, keep[name]] if factor == "B" else whole[keep[name]]
            assert where.parameter.grad is not None
            mine = where.parameter.grad.view(-1)[where.offset : where.offset + part.numel()].view(where.shape)
            torch.testing.assert_close(mine, part)
    assert masked.penalty is not None and small.penalty is not None
    torch.testing.assert_close(masked.penalty.norms_M2, small.penalty.norms_M2)


def test_layers_of_one_list_share_banks_and_others_do_not() -> None:
    names = [f"{part}.{layer}.{matrix}" for part in ("enc.block", "dec.block") for layer in range(6) for matrix in "qv"]
    groups = _in_groups(["embed", *names])
    assert groups[0] == [""]
    assert groups[1] == [f"enc.block.{layer}" for layer in range(LAYERS_PER_BANK)]
    assert [len(group) for group in groups] == [1, LAYERS_PER_BANK, 6 - LAYERS_PER_BANK] + [LAYERS_PER_BANK, 2]


def test_a_bank_is_unpacked_by_whichever_of_its_layers_runs_first() -> None:
    adapted = make(SALIENT, True)
    before = backward(adapted)
    adapted.trained.zero_grad()
    skipped = adapted.model.layers[0]
    adapted.model.layers[0] = torch.nn.Identity()
    backward(adapted)
    backward(adapted)  # fails if views of an earlier pass, whose graph is gone, were still in use
    adapted.model.layers[0] = skipped
    torch.testing.assert_close(backward(adapted), before)


def test_an_adapter_without_rows_is_its_frozen_layer() -> None:
    adapted = make(SALIENT, True)
    for adapter in adapted.adapters.values():
        adapter.resize(0 if adapter.out_features == 20 else 2)
    assert adapted.packed is not None
    adapted.packed.repack()
    backward(adapted)
    up = adapted.adapters["layers.0.up"]
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(up(x), up.base(x))


def test_recomputed_layers_get_the_same_gradients() -> None:
    """Non-reentrant checkpointing of whole layers, as transformers does it: hooks run again inside."""
    from torch.utils.checkpoint import checkpoint

    plain, recomputed = make(SALIENT, True), make(SALIENT, True)
    backward(plain)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in recomputed.model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return recomputed.model.top(x)

    object.__setattr__(recomputed.model, "forward", forward)
    backward(recomputed)
    for (_, mine, _), (_, theirs, _) in zip(every_factor(plain, "grad"), every_factor(recomputed, "grad"), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_layers_are_found_by_the_first_number() -> None:
    assert layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_of("encoder.block.0.layer.1.DenseReluDense.wi") == "encoder.block.0"
    assert layer_of("classifier.dense") == ""


@pytest.mark.parametrize("gate", [True, False])
def test_an_event_that_changes_nothing_recomputes_nothing(gate: bool) -> None:
    """What a bank derives from masks is computed anew, and on GPUs its graph captured anew, only where they act."""
    adapted = make(SALIENT, packed=True)
    mask_N = torch.arange(adapted.layout.total) % 3 > 0
    versions = [[a.mask_version for a in adapted.adapters.values()]]
    for mask in (mask_N, mask_N.clone(), ~mask_N):
        adapted.set_mask(mask, gate)
        assert torch.equal(torch.cat([a.rank_mask_R for a in adapted.adapters.values()]), mask)
        versions.append([a.mask_version for a in adapted.adapters.values()])
    changes = [before != after for before, after in zip(versions[:-1], versions[1:], strict=True)]
    assert changes == ([True, False, True] if gate else [False] * 3)
    adapted.set_mask(torch.ones_like(mask_N), not gate)
    assert [a.mask_version for a in adapted.adapters.values()] != versions[-1], "gating itself changes"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("armed", [True, False])
def test_scores_of_growing_matrices_in_a_bank(armed: bool, dropout: float) -> None:
    """Outputs, gradients and scores of whole matrices are those of separate factors, dropout drawn once."""
    found = []
    for packed in (False, True):
        adapted = make(METHODS["increlora"], packed, dropout=dropout)
        assert adapted.scores is not None
        if armed:
            adapted.scores.arm(1.0, torch.device("cpu"), None)
        torch.manual_seed(5)
        out = backward(adapted)
        grads = torch.cat([grad.reshape(-1) for _, grad, _ in every_factor(adapted, "grad")])
        found.append((out, grads, adapted.scores.score_M.clone(), torch.rand(1)))
    assert bool(found[0][2].any()) == armed
    for separate, banked in zip(*found, strict=True):
        torch.testing.assert_close(banked, separate, rtol=1e-4, atol=1e-6)
