"""Batches made ahead: in order, one ahead, the same bits, and errors where the batch is taken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.config.run import parse_config
from salient_ds.run.inputs import load_inputs, micro_batches, placed
from salient_ds.run.prefetch import Prefetched

ROOT = Path(__file__).resolve().parents[3]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_next_one_is_made_while_nobody_waits() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        if number == 1:
            second.set()
        return 10 * number

    with Prefetched(make) as ahead:
        assert ahead.take(0) == 0 and second.wait(10), "batch 1 is made although nobody has asked for it"
        assert [ahead.take(number) for number in (1, 2, 3)] == [10, 20, 30]
        assert ahead.take(7) == 70 and ahead.take(8) == 80, "a resumed run begins anywhere"
    assert [number for number in made if number in (0, 1, 2, 3, 7, 8)] == [0, 1, 2, 3, 7, 8]
    assert threads() == []


def test_an_error_comes_to_the_one_who_takes_that_batch() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("row 5 cannot be read")
        return number

    with pytest.raises(ValueError, match="row 5 cannot be read"), Prefetched(make) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        ahead.take(2)
    assert threads() == []
    with Prefetched(make) as ahead:
        ahead.take(1)  # batch 2 fails, and nobody wants it
    assert threads() == []


def test_one_thread_makes_one_at_a_time_and_is_not_the_one_that_trains() -> None:
    seen: set[int] = set()
    with Prefetched(lambda number: seen.add(threading.get_ident())) as ahead:
        for number in range(20):
            ahead.take(number)
    assert len(seen) == 1 and threading.get_ident() not in seen


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_the_same_bits(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path, packing: bool) -> None:
    from transformers import AutoTokenizer

    run = parse_config({
        "output_dir": str(tmp_path / "run"), "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)}, "adapter": {"rank": 4}, "method": {"name": "lora"},
        "data": {"train": [{"path": str(tiny_alpaca), "weight": 1.5}], "packing": packing, "max_length": 256},
        "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    })  # fmt: skip
    inputs = load_inputs(run, AutoTokenizer.from_pretrained(tiny_llama))

    def make(sampler: Any, number: int) -> Any:
        return micro_batches(inputs, sampler, number, global_rank=1, world_size=2, size=2, device=torch.device("cpu"))

    one, other = inputs.sampler(run.train), inputs.sampler(run.train)
    with Prefetched(lambda number: make(one, number)) as ahead:
        for number in (0, 1, 2, 29, 30, 5):
            (found, targets), (wanted, count) = ahead.take(number), make(other, number)
            assert targets == count and len(found) == len(wanted) == 2
            for left, right in zip(found, wanted, strict=True):
                left = placed(left, torch.device("cpu"))
                assert left.indices == right.indices and left.num_targets == right.num_targets
                assert left.segments == right.segments and left.inputs.keys() == right.inputs.keys()
                assert all(torch.equal(value, right.inputs[name]) for name, value in left.inputs.items())
