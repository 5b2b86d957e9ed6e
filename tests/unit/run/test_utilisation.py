"""MFU: known peaks, live rows of the latest decision, packed examples, and one sentence where it is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from salient_eval.bench.own_arms import OwnArm

from salient_ds.config.train import TrainConfig
from salient_ds.engine.reports import MicroBatch
from salient_ds.models.flops import count_flops
from salient_ds.monitor.device_peak import PEAKS, device_peak
from salient_ds.run.inputs import _segments
from salient_ds.run.utilisation import Utilisation
from tests.unit.bench.bench_helpers import spec

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def train(peak: float | None = None, precision: str = "bf16") -> TrainConfig:
    settings = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3, "precision": precision}
    return TrainConfig.model_validate(settings | ({} if peak is None else {"peak_tflops": peak}))


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A100 80GB PCIe", "fp16", 312),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("cpu", "bf16", None),
    ],
)  # fmt: skip
def test_peaks(name: str, precision: str, tflops: float | None) -> None:
    assert device_peak(name, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))  # type: ignore


def test_every_peak_has_a_source() -> None:
    assert all(peak.source and peak.tflops > 0 for peak in PEAKS)


@pytest.fixture(scope="module")
def arm() -> OwnArm:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        own = OwnArm.build(replace(spec("salientlora", schedule_steps=0)), CPU)
        own.step(TOKENS)
    return own


def test_a_gpu_without_a_known_peak_is_named_once(arm: OwnArm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    used = Utilisation(arm.allocating, train(), torch.device("cuda"))
    assert used.note == "no MFU: the peak of Some GPU in bf16 is not known (train.peak_tflops states it)"
    used = Utilisation(arm.allocating, train(), CPU)
    assert used.note is None
    assert used.of([MicroBatch({"input_ids": TOKENS}, 30, ())], 1.0) is None


def test_a_stated_peak_gives_the_share_of_it(arm: OwnArm) -> None:
    engine = arm.allocating
    used = Utilisation(engine, train(peak=0.5, precision="fp32"), CPU)
    assert used.note is None
    flops = count_flops(engine.adapted.model, engine.adapted.adapters)
    batches = [MicroBatch({"input_ids": TOKENS}, 30, ())] * 3
    live = engine.decisions.latest.ranks(engine.adapted.layout)
    expected = 3 * flops.step([16, 16], 30, flops.adapters(live))
    assert used.flops(batches) == expected
    assert used.of(batches, 2.0) == pytest.approx(expected / (2 * 0.5e12))
    pruned = replace(engine.decisions.latest, mask_N=torch.zeros_like(engine.decisions.latest.mask_N))
    kept, engine.decisions.latest = engine.decisions.latest, pruned
    try:
        assert used.flops(batches) == 3 * flops.step([16, 16], 30, 0) < expected
    finally:
        engine.decisions.latest = kept


def test_packed_examples_are_told_apart() -> None:
    position_BS = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    assert _segments(position_BS) == (3, 2, 4, 1)
    batch = MicroBatch({"input_ids": position_BS}, 1, (), _segments(position_BS))
    assert batch.lengths == (3, 2, 4, 1)
    assert MicroBatch({"input_ids": position_BS}, 1, ()).lengths == (5, 5)


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_peak_is_above_zero(value: str) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        train(peak=float(value))
