"""What a PEFT adapter directory is read as, and every kind of damage."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salient_ds.export.lora_config import LoraConfig
from salient_ds.export.lora_folder import LoraFolder
from salient_ds.export.shrink import plan_cut
from salient_ds.export.streamed import Entry, in_file_order, write_streamed
from salient_ds.salience.spectral_cut import Cut
from tests.unit.export.builders import build
from tests.unit.export.peft_adapters import RAGGED, change_config, config_of, dense_updates, save_adapter

pytest.importorskip("peft", reason="the adapters are written by real PEFT")
KEY = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(build("llama"), tmp_path_factory.mktemp("saved"), **RAGGED)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_factors_have_the_scale_of_their_module(saved: Path) -> None:
    folder, expected = LoraFolder(saved), dense_updates(saved)
    assert set(folder.modules) == set(expected)
    for name, update in expected.items():
        factors = folder.read(name)
        assert torch.allclose(factors.scaling * factors.B.double() @ factors.A.double(), update)
    scales = {round(folder.read(name).scaling, 6) for name in folder.modules}
    assert len(scales) == 5, "9 and 20 and 2 by the square roots of 3, 6 and 8"


def test_peft_computes_the_same_scale(saved: Path) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(build("llama"), str(saved))
    folder = LoraFolder(saved)
    for name in folder.modules:
        assert model.base_model.model.get_submodule(name).scaling["default"] == folder.read(name).scaling


NAMES = st.sampled_from(["q", "layers.1.q", "0.q", r"layers\.[01]\.q", "model.layers.0.q", "k", "layers.0"])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.integers(1, 9)), st.sampled_from(["model.layers.0.q", "model.layers.1.q", "q", "xq"]))
def test_patterns_are_matched_as_peft_matches_them(patterns: dict[str, int], module: str) -> None:
    from peft.utils.other import get_pattern_key

    values = {"r": 100, "lora_alpha": 7, "rank_pattern": patterns, "alpha_pattern": patterns}
    found = LoraConfig(Path("adapter_config.json"), values)
    assert found.rank_of(module) == patterns.get(get_pattern_key(list(patterns), module), 100)
    assert found.scaling(module) == patterns.get(get_pattern_key(list(patterns), module), 7) / found.rank_of(module)


def test_layers_are_in_the_order_of_their_numbers(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    more = {
        k.replace("layers.0", f"layers.{n}"): v.clone() for k, v in tensors.items() for n in (2, 10) if "layers.0" in k
    }
    save_file(tensors | more, adapter / WEIGHTS)
    assert [name.split(".")[2] for name in LoraFolder(adapter).modules][::7] == ["0", "1", "2", "10"]


def test_an_unknown_field_is_named(adapter: Path) -> None:
    assert LoraFolder(adapter).notes() == []
    change_config(adapter, new_thing={"a": 1}, newer=None)
    assert LoraFolder(adapter).notes() == [
        "adapter_config.json sets new_thing, unknown to this version: carried over unread"
    ]
    assert LoraFolder(adapter).config["new_thing"] == {"a": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "has peft_type 'ADALORA', and only LORA .* exports its own AdaLoRA runs as LORA"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3', and only LORA"),
        ({"peft_type": None}, "has peft_type None"),
        ({"use_dora": True}, "sets use_dora, .* DoRA divides by the norm"),
        ({"lora_bias": True}, "sets lora_bias, .* has a bias"),
        ({"target_parameters": ["experts.w"]}, "sets target_parameters, .* more than two dimensions"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', .*initial_model_for_weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"r": 0}, "has r=0, expected a rank above 0"),
        ({"r": "8"}, "has r='8', expected a rank above 0"),
        ({"lora_alpha": None}, "has lora_alpha=None, expected a number"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"has rank_pattern\['q_proj'\]=1.5"),
        ({"alpha_pattern": {"q_proj": "a"}}, r"has alpha_pattern\['q_proj'\]='a', expected a number"),
        ({"alpha_pattern": {"(": 1}}, r"has '\(' in alpha_pattern, which is no pattern"),
        ({"alpha_pattern": [1]}, r"has alpha_pattern=\[1\], expected names with numbers"),
        ({"rank_pattern": {}}, r"state different ranks.*q_proj \(has 3, stated 6\)"),
    ],
)
def test_other_configurations_are_refused_by_name(adapter: Path, changes: dict[str, Any], message: str) -> None:
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        LoraFolder(adapter)


def test_dora_of_real_peft_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dora"
    save_adapter(build("llama"), folder, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="sets use_dora"):
        LoraFolder(folder)
    change_config(folder, use_dora=False)
    with pytest.raises(
        ValueError, match=r"lora_magnitude_vector.*: these are not names that PEFT saves for plain LoRA"
    ):
        LoraFolder(folder)


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def without(gone: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != gone}


def replace(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: make(tensors[key])}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(f"{KEY}.lora_B.weight"), r"lacks one factor of .*q_proj \(only lora_A"),
        (without(f"{KEY}.lora_A.weight"), r"lacks one factor of .*q_proj \(only lora_B"),
        (lambda t: {"base_model.model.x.weight": torch.ones(2)}, "holds no tensor named base_model.model.MODULE"),
        (rename("lora_A.weight", "lora_A.default.weight"), "these are not names that PEFT saves"),
        (rename("base_model.model.", "unet."), "these are not names that PEFT saves"),
        (replace(f"{KEY}.lora_A.weight", lambda v: v[:2]), r"q_proj has lora_A \(2, 32\) and lora_B \(32, 3\)"),
        (replace(f"{KEY}.lora_A.weight", lambda v: v[:0]), "q_proj has empty factors: .* ZeRO-3"),
        (replace(f"{KEY}.lora_A.weight", lambda v: v[:, :, None, None]), "q_proj is a convolution"),
        (replace(f"{KEY}.lora_A.weight", lambda v: v[0]), r"q_proj has lora_A \(32,\)"),
        (replace(f"{KEY}.lora_B.weight", lambda v: v.to(torch.int8)), "stored as torch.float32 and torch.int8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together(adapter: Path, spoil: Callable[[Tensors], Tensors], message: str) -> None:
    tensors = spoil(load_file(adapter / WEIGHTS))
    save_file({key: value.contiguous() for key, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        LoraFolder(adapter)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(adapter: Path, bad: float) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"{KEY}.lora_B.weight"][1, 1] = bad
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: factor B .* holds NaN or infinity"):
        plan_cut(LoraFolder(adapter), Cut("rank", 1))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_truncated_weights(adapter: Path, name: str, share: float) -> None:
    if name == "adapter_model.bin":
        torch.save(load_file(adapter / WEIGHTS), adapter / name)
        (adapter / WEIGHTS).unlink()
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is damaged or holds other things than tensors .*fetch it again"):
        LoraFolder(adapter)


class Trap:
    """Pickled code that must never run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("trapped.txt"), "ran"))


@pytest.mark.parametrize("content", [{"a": Trap()}, [1, 2], {"a": "text"}])
def test_pickles_of_other_things(adapter: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter)
    (adapter / WEIGHTS).unlink()
    torch.save(content, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is damaged or holds other things than tensors"):
        LoraFolder(adapter)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="adapter_model.bin is damaged or holds other things than tensors"):
        LoraFolder(adapter)
    assert not (adapter / "trapped.txt").exists()


def test_directories_that_are_no_adapter(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist: give the directory .*hf download"):
        LoraFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file: give the directory"):
        LoraFolder(adapter / WEIGHTS)
    for name, message in (
        ("nothing.txt", "holds no adapter_config.json: give"),
        ("config.json", "is a model"),
        ("shortcut_adapter.json", "is an adapter with shortcuts"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            LoraFolder(folder)


def test_files_that_are_missing_or_not_json(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="holds adapter_model-00001-of-00002.safetensors, which PEFT does not read"):
        LoraFolder(adapter)
    (adapter / "adapter_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights: expected adapter_model.safetensors or adapter_model.bin"):
        LoraFolder(adapter)
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "holds no object"),
        ('{"peft_type": "LORA"}', "has no 'r'"),
    ):
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            LoraFolder(adapter)


def test_a_damaged_record(adapter: Path) -> None:
    (adapter / "salient_ds.json").write_text("{")
    with pytest.raises(ValueError, match="salient_ds.json is not valid JSON"):
        LoraFolder(adapter)


def test_streamed_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "é.b": torch.arange(3, dtype=torch.uint8), "a": torch.randn(2, 3), "h": torch.randn(5).half(),
        "n": torch.tensor(7), "z": torch.zeros(0, 4), "t": torch.randn(4, 3).T, "m": torch.tensor([True, False]),
        "w": torch.randn(3).bfloat16(), "d": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    entries = in_file_order(Entry(name, value.dtype, tuple(value.shape)) for name, value in tensors.items())
    write_streamed(tmp_path / "x.safetensors", entries, (tensors[entry.name] for entry in entries))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())
    header = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    offsets = {name: e for name, e in json.loads(header[8 : 8 + length]).items() if name != "__metadata__"}
    assert length % 8 == 0
    assert all(e["data_offsets"][0] % tensors[name].element_size() == 0 for name, e in offsets.items())


def test_config_survives_what_does_not_concern_ranks(adapter: Path) -> None:
    change_config(adapter, alora_invocation_tokens=[5, 6], revision="abc", exclude_modules=["lm_head"])
    carried = LoraFolder(adapter).config
    assert carried["alora_invocation_tokens"] == [5, 6] and carried["revision"] == "abc"
    assert not {"r", "lora_alpha", "rank_pattern", "use_rslora", "target_modules"} & carried.keys()
    assert carried["base_model_name_or_path"] == config_of(adapter)["base_model_name_or_path"]
