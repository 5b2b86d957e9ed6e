"""liger-kernel's kernels: who may have them, and what the library is asked for. Its place is taken by a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.targets import match_targets
from salient_ds.check.memory import estimate
from salient_ds.check.preflight import preflight
from salient_ds.config.run import parse_config
from salient_ds.config.speed import SpeedConfig, compiles, speed_problems
from salient_ds.models import kernels as fused_kernels
from salient_ds.models.kernels import apply_kernels, kernel_problems, loss_only, model_types
from salient_ds.strict import ConfigError
from tests.support.linears import linear_modules
from tests.support.methods import OPTIONS
from tests.unit.check.test_memory import config, work
from tests.unit.check.test_preflight import make, only_problem, settings  # noqa: F401

LIBRARY = '''
from types import MethodType

CALLS = []

def lce_forward(self, input_ids=None, labels=None, skip_logits=None, **kwargs):
    return "fused"

def apply_liger_kernel_to_llama(
    rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
    swiglu: bool = True, model=None,
) -> None:
    CALLS.append({k: v for k, v in locals().items() if k != "model"})
    model.forward = MethodType(lce_forward, model)

def apply_liger_kernel_to_granite(cross_entropy: bool = True, fused_linear_cross_entropy: bool = False, model=None):
    raise NotImplementedError

def apply_liger_kernel_to_mistral(*, fused_linear_cross_entropy: bool = True, model=None):
    """Forgets to."""

MODEL_TYPE_TO_APPLY_LIGER_FN = {
    "mistral": apply_liger_kernel_to_mistral, "llama": apply_liger_kernel_to_llama,
    "granite": apply_liger_kernel_to_granite,
}
'''
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LOSS, ALL = SpeedConfig(liger="loss"), SpeedConfig(liger="all")


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == fused_kernels.PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in's source; importing torch or triton is what its package must not be asked for by a check."""
    source = tmp_path / "site" / fused_kernels.PACKAGE / fused_kernels._PATCHES
    source.parent.mkdir(parents=True)
    (source.parent.parent / "__init__.py").write_text("")
    (source.parent / "__init__.py").write_text("")
    source.write_text(LIBRARY)
    forget()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield source
    forget()


class Model(nn.Module):
    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)

    def forward(self, input_ids: Any = None, labels: Any = None) -> str:
        return "plain"


def test_supported_types_come_from_the_librarys_source(library: Path) -> None:
    assert model_types(library) == ["llama", "mistral"], "granite's loss is off by default: it has none"
    assert kernel_problems(LOSS, "llama") == kernel_problems(LOSS, None) == []
    assert fused_kernels.PACKAGE not in sys.modules, "a check must not import it"
    (problem,) = kernel_problems(ALL, "mistrall")
    assert "speed.liger=all" in problem and "'mistrall' (nearest name: mistral), use none" in problem
    assert problem.endswith("has one for llama, mistral")
    (problem,) = kernel_problems(LOSS, "granite")
    assert "no fused loss for model type 'granite'" in problem


def test_a_library_without_the_table_is_named(tmp_path: Path) -> None:
    other = tmp_path / "patches.py"
    other.write_text("TABLE = {}\n")
    with pytest.raises(ValueError, match="pip install 'salient-ds"):
        model_types(other)


def test_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernels, "PACKAGE", "liger_kernel_that_nobody_has")
    (problem,) = kernel_problems(LOSS, "llama")
    assert "pip install 'salient-ds[liger]'" in problem
    assert kernel_problems(SpeedConfig(), "llama") == []


def test_the_loss_alone_turns_everything_else_off(library: Path) -> None:
    model, other = Model("llama"), Model("llama")
    apply_kernels(model, LOSS, CUDA)
    from liger_kernel.transformers.monkey_patch import CALLS  # type: ignore[import-not-found,unused-ignore]

    off = dict.fromkeys(("rope", "cross_entropy", "rms_norm", "swiglu"), False)
    assert [off | {"fused_linear_cross_entropy": True}] == CALLS
    assert (model(**loss_only(LOSS)), other()) == ("fused", "plain")
    apply_kernels(other, ALL, CUDA)
    on = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": True}
    assert on == CALLS[1]


def test_nothing_is_asked_for_by_default(library: Path) -> None:
    model = Model("unheard-of")
    apply_kernels(model, SpeedConfig(), CPU)
    assert model() == "plain" and loss_only(SpeedConfig()) == {}
    assert fused_kernels.PACKAGE not in sys.modules


@pytest.mark.parametrize(
    ("model_type", "device", "expected"),
    [
        ("llama", CPU, "needs a CUDA device .* on cpu: set it to none"),
        ("granite", CUDA, "no fused loss for model type 'granite'"),
        ("mistral", CUDA, "left the loss of Model as it was"),
    ],
)
def test_refusals_at_the_start_of_training(library: Path, model_type: str, device: torch.device, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        apply_kernels(Model(model_type), LOSS, device)


def test_assembling_a_run_applies_them_first(settings: dict[str, Any]) -> None:  # noqa: F811
    from salient_ds.run.assemble import assemble

    with pytest.raises(ValueError, match="speed.liger=loss needs a CUDA device"):
        assemble(Model("llama"), make(settings, speed={"liger": "loss"}), {}, 1, CPU)


def test_evaluation_asks_for_the_loss_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from salient_ds.engine.reports import MicroBatch
    from salient_ds.run import evaluating
    from salient_ds.run.held_out import HeldOut

    seen: list[dict[str, Any]] = []

    class Engine:
        def __call__(self, **inputs: Any) -> Any:
            seen.append(inputs)
            return SimpleNamespace(loss=torch.tensor(2.0), logits=None)

        def eval(self) -> None: ...

        def train(self) -> None: ...

    batch = MicroBatch({"input_ids": torch.zeros(1, 2)}, 3, ())
    monkeypatch.setattr(evaluating, "evaluation_batches", lambda *_: iter([batch]))
    train = SimpleNamespace(micro_batch_size=1, best_metric=None)
    held_out = HeldOut(SimpleNamespace(speed=LOSS, train=train, data=SimpleNamespace(task=None)), 1)  # type: ignore[arg-type]
    engine: Any = SimpleNamespace(engine=Engine(), step=1, device=CPU, adapted=SimpleNamespace(generate=None))
    inputs: Any = SimpleNamespace(scored=None)
    assert not held_out.evaluate(inputs, engine, None, 2)
    assert held_out.text().endswith("2.0000")
    assert [inputs["skip_logits"] for inputs in seen] == [True]


@pytest.mark.parametrize(
    ("options", "method", "stage", "shortcuts", "expected"),
    [
        ({"zero3": "partitioned"}, "salientlora", 3, False, "ZeRO-3 partitions here: use none, stage 2, or zero3"),
        ({}, "heterolora", 3, True, "ZeRO-3 partitions here"),
        ({"liger": "all", "compile_layers": True}, "salientlora", 2, False, "fuse these already, use liger: loss"),
        ({"liger": "all"}, "heterolora", 2, True, "does not work with adapter.shortcuts: use liger: loss"),
    ],
)
def test_contradictions(options: dict[str, Any], method: str, stage: int, shortcuts: bool, expected: str) -> None:
    speed = SpeedConfig.model_validate({"liger": "loss", **options})
    (problem,) = speed_problems(speed, OPTIONS[method], stage, shortcuts)
    assert expected in problem


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("liger", ["loss", "all"])
def test_what_goes_together(liger: str, stage: int) -> None:
    speed = SpeedConfig.model_validate({"liger": liger, "compile_layers": liger == "loss" and stage < 3})
    method = OPTIONS["salientlora"]
    assert speed_problems(speed, method, stage) == []
    auto = SpeedConfig.model_validate({"liger": liger})
    assert speed_problems(auto, method, stage) == []
    assert compiles(auto, method, packed=True, on_gpu=True) == (liger == "loss"), "layers are fused once"


def test_absolute_weights_would_not_reach_fused_norms() -> None:
    run = {
        "output_dir": "o", "deepspeed": "d", "model": {"path": "m"}, "adapter": {"rank": 2}, "data": {"train": "t"},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
        "method": {"name": "heterolora", "proxy": "synflow"}, "speed": {"liger": "all"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="use liger: loss, or choose another proxy"):
        parse_config(run)
    run["speed"] = {"liger": "loss"}
    assert parse_config(run).speed.liger == "loss"


def test_the_report_says_so_and_counts_less_memory(library: Path, settings: dict[str, Any]) -> None:  # noqa: F811
    plain, fused = preflight(make(settings)), preflight(make(settings, speed={"liger": "loss"}))
    assert fused.problems == []
    assert fused.facts["this_run"]["activations"] < plain.facts["this_run"]["activations"]
    library.write_text(LIBRARY.replace('"llama":', '"olmo2":'))
    model_types.cache_clear()
    assert "no fused loss for model type 'llama'" in only_problem(preflight(make(settings, speed={"liger": "loss"})))


def test_memory_of_the_fused_loss_does_not_grow_with_the_vocabulary() -> None:
    load = work()
    assert load.architecture is not None
    wide = replace(load, architecture=replace(load.architecture, vocab_size=4 * load.architecture.vocab_size))

    def activations(one: Any) -> int:
        found = estimate(one, config(2), 1).activations
        assert found is not None
        return found

    assert activations(wide) > activations(load) > activations(replace(load, fused_loss=True))
    assert activations(replace(wide, fused_loss=True)) == activations(replace(load, fused_loss=True))


def test_the_output_layer_is_never_adapted(tiny_llama: Path) -> None:
    """The fused loss goes past its forward pass, and with it past an adapter on it."""
    from transformers import AutoModelForCausalLM

    linear = linear_modules(AutoModelForCausalLM.from_pretrained(tiny_llama))
    assert linear and "lm_head" not in linear
    with pytest.raises(ValueError, match="matches no linear layer"):
        match_targets(dict.fromkeys(linear, (1, 1)), "re:.*lm_head")
