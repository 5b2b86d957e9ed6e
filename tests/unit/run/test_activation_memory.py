"""``train.activation_memory``: compiled layers keep less for the backward pass, and the training stays the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._functorch.config
from salient_eval.bench.own_arms import OwnArm

from salient_ds.config.run import parse_config
from salient_ds.run import assemble
from salient_ds.strict import ConfigError
from tests.unit.bench.bench_helpers import spec

TOKENS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
RUN = {
    "output_dir": "unused", "deepspeed": "unused", "model": {"path": "unused"},
    "adapter": {"rank": 4, "alpha": 8}, "data": {"train": "unused"}, "method": {"name": "lora"},
}  # fmt: skip
TRAIN = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-4}
SHARES = ("memory0", "memory50")


@pytest.fixture(autouse=True)
def partitioning_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real partitioner without the code generator, so that nothing has to be built."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager_decomp_partition"))
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        yield


def trained(method: str, *options: str, compiled: bool = True) -> tuple[int, list[float]]:
    """Bytes that the first step keeps for its backward pass, and the losses of three steps."""
    arm = OwnArm.build(replace(spec(method, schedule_steps=0), compiled=compiled, speed=options), torch.device("cpu"))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = [arm.loss(TOKENS)]
    return sum(kept.values()), losses + [arm.loss(TOKENS) for _ in range(2)]


@pytest.mark.parametrize("method", ["lora", pytest.param("salientlora", marks=pytest.mark.slow)])
def test_a_lower_share_keeps_less_and_trains_the_same(method: str) -> None:
    all_kept, losses = trained(method)
    found = []
    for share in SHARES:
        torch._dynamo.reset()
        kept, others = trained(method, share)
        assert others == pytest.approx(losses, rel=1e-6)
        found.append(kept)
    assert found == sorted(found) and len({*found, all_kept}) == 3 and found[-1] < all_kept, (found, all_kept)


def test_layers_that_are_not_compiled_are_recomputed_aloud(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = parse_config(RUN | {"train": TRAIN | {"activation_memory": 0.5}})
    assert run.train.activation_memory == 0.5, "speed.compile_layers=auto compiles on GPUs"
    full, others = trained("lora", compiled=False)
    monkeypatch.setattr(assemble, "compiles", lambda *args, **options: False)
    with caplog.at_level(logging.WARNING, logger="salient_ds"):
        kept, losses = trained("lora", "memory50")
    assert "activation_memory=0.5: layers are not compiled here" in caplog.text
    assert kept < full and losses == pytest.approx(others, rel=1e-6)


@pytest.mark.parametrize(
    ("train", "speed", "message"),
    [
        ({"activation_memory": 0.5, "activation_checkpointing": "all"}, {}, "both recompute: use one"),
        ({"activation_checkpointing": "all"}, {"cuda_graphs": True}, "cannot be graphs, use train.activation_memory"),
        ({"activation_memory": 0.5}, {"compile_layers": False}, "needs compiled layers"),
        ({"activation_memory": 0.5}, {"liger": "all"}, "needs compiled layers"),
        ({"activation_memory": 1.5}, {}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_had_is_refused(train: dict[str, Any], speed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RUN | {"train": TRAIN | train, "speed": speed})
