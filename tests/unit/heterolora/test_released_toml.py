"""The released code's TOML files become a section that our configuration accepts, or every reason why not is named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from salient_ds.adapters.options import AdapterConfig
from salient_ds.heterolora.released_toml import convert, to_yaml

LORA = "lora_alpha = 16\nlora_dropout = 0.0\nadapter_name = 'a'\n"
SHORT = "shortcut_alpha = 4\nproj_dropout = 0.1\nprojector_name = 's'\n"


def file(folder: Path, granularity: str, tables: dict[str, str], kind: str = "lora") -> Path:
    """Write a file in the released form: ``tables`` holds what a table has besides the usual keys."""
    common = LORA if kind == "lora" else SHORT
    body = [f'granularity = "{granularity}"']
    body += [f"[{title}]\n{keys}\n{common if 'alpha' not in keys else ''}" for title, keys in tables.items()]
    path = folder / f"{kind}.toml"
    path.write_text("\n".join(body))
    return path


OFF = "r = 0\ndisable_adapter = true"
DEFAULT = "r = 8\ninit_lora_weghts = true\nfan_in_fan_out = false\ndisable_adapter = false"
QV = {
    "default": DEFAULT,
    **{f"all_layers.{n}": OFF for n in ("k_proj", "o_proj", "w1", "w2")},
    "all_layers.v_proj": "r = 8",
}


def section(lora: Path, shortcuts: Path | None = None, **options: Any) -> dict[str, Any]:
    """Converted, through YAML and our own configuration."""
    converted = convert(lora, shortcuts, **options)
    assert list(converted) == ["adapter"]
    loaded = yaml.safe_load(to_yaml(converted))["adapter"]
    assert loaded == converted["adapter"]
    return AdapterConfig.model_validate(loaded).model_dump(exclude_unset=True)


def test_network_file(tmp_path: Path) -> None:
    found = section(file(tmp_path, "network", QV))
    assert found == {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16.0, "dropout": 0.0}


def test_with_shortcuts(tmp_path: Path) -> None:
    names = ("residual1", "residual2", "shortcut1", "shortcut2")
    tables = {"default": "r = 32", **{f"all_layers.{n}": "r = 32\ndisable_projector = false" for n in names}}
    shortcuts = file(tmp_path, "network", tables, "shortcut")
    found = section(file(tmp_path, "network", QV), shortcuts, norm_after_shortcut="reuse")
    assert found["shortcuts"] == {
        "modules": ["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"],
        "rank": 32,
        "alpha": 4.0,
        "dropout": 0.1,
        "norm_after_shortcut": "reuse",
    }


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]),
    ],
)
def test_a_default_holds_for_what_has_no_table(tmp_path: Path, model_type: str, names: list[str]) -> None:
    assert section(file(tmp_path, "network", {"default": DEFAULT}), model_type=model_type)["target_modules"] == names


def test_a_table_replaces_the_default_as_a_whole(tmp_path: Path) -> None:
    """r of the default does not fill in for a table without r."""
    path = file(tmp_path, "network", {"default": "r = 8", "all_layers.q_proj": "disable_adapter = false"})
    with pytest.raises(ValueError, match=r"\[all_layers.self_attn.q_proj\] r = None"):
        convert(path)


def test_names_of_llama_files(tmp_path: Path) -> None:
    tables = {"default": OFF, "all_layers.up": "r = 4", "all_layers.down": "r = 4"}
    assert section(file(tmp_path, "network", tables), model_type="llama")["target_modules"] == ["up_proj", "down_proj"]
    with pytest.raises(ValueError, match=r"all_layers.up\]: unknown name"):
        convert(file(tmp_path, "network", tables), model_type="opt")


def test_roberta_tells_its_two_output_layers_apart(tmp_path: Path) -> None:
    targets = section(file(tmp_path, "network", {"default": OFF, "all_layers.w2": "r = 4"}), model_type="roberta")[
        "target_modules"
    ]
    pattern = re.compile(targets.removeprefix("re:"))
    assert pattern.fullmatch("roberta.encoder.layer.11.output.dense")
    assert not pattern.fullmatch("roberta.encoder.layer.11.attention.output.dense")
    attention = section(file(tmp_path, "network", {"default": OFF, "all_layers.o_proj": "r = 4"}), model_type="roberta")
    assert attention["target_modules"] == ["attention.output.dense"]


def test_layer_file(tmp_path: Path) -> None:
    """As the static search writes it: default off, chosen modules of single layers."""
    tables = {
        "default": OFF,
        "model_layer_10.v_proj": "r = 8",
        "model_layer_2.w1": "r = 8",
        "model_layer_2.q_proj": "r = 8",
    }
    found = section(file(tmp_path, "layer", tables))
    base = "model.decoder.layers"
    assert found["target_modules"] == [f"{base}.2.self_attn.q_proj", f"{base}.2.fc1", f"{base}.10.self_attn.v_proj"]


def test_layer_file_with_a_default_needs_the_number_of_layers(tmp_path: Path) -> None:
    path = file(tmp_path, "layer", {"default": "r = 8", "model_layer_1.v_proj": OFF})
    with pytest.raises(ValueError, match="say how many layers"):
        convert(path)
    found = section(path, num_layers=2)["target_modules"]
    assert len(found) == 11
    assert "model.decoder.layers.1.self_attn.v_proj" not in found
    with pytest.raises(ValueError, match="the model has 1 layers"):
        convert(path, num_layers=1)


def test_layer_file_of_shortcuts(tmp_path: Path) -> None:
    """The first layer has no shortcut from an earlier one, whatever the file says."""
    tables = {f"model_layer_{i}.{n}": "r = 2" for i in (0, 1) for n in ("shortcut2", "residual1")}
    shortcuts = file(tmp_path, "layer", {"default": "r = 0", **tables}, "shortcut")
    base = "model.layers"
    found = section(file(tmp_path, "network", QV), shortcuts, model_type="qwen2")
    assert found["shortcuts"]["modules"] == [f"{base}.0.residual_1", f"{base}.1.residual_1", f"{base}.1.shortcut_ffn"]


def test_shortcuts_alone(tmp_path: Path) -> None:
    shortcuts = file(tmp_path, "network", {"default": "r = 0", "all_layers.shortcut1": "r = 2"}, "shortcut")
    found = section(file(tmp_path, "network", {"default": OFF}), shortcuts)
    assert found["target_modules"] == []
    assert found["shortcuts"]["modules"] == ["shortcut_sa"]


@pytest.mark.parametrize(
    ("granularity", "tables", "message"),
    [
        ("head", {"default": DEFAULT}, "belongs to a whole projection"),
        ("model", {"default": DEFAULT}, "must be \"network\" or \"layer\""),
        ("network", {"default": OFF}, "every rank is 0"),
        ("network", {"default": "r = 8", "all_layers.v_proj": "r = 4"}, "modules differ.*r = 8.*r = 4"),
        ("network", {"default": OFF, "all_layers.qproj": "r = 8"}, "did you mean 'q_proj'"),
        ("network", {"default": "r = 8\nlora_alhpa = 16"}, "did you mean 'lora_alpha'"),
        ("network", {"default": DEFAULT, "model_layer_0.q_proj": "r = 8"}, r"expected \[all_layers.NAME\]"),
        ("layer", {"default": OFF, "all_layers.q_proj": "r = 8"}, r"expected \[model_layer_NUMBER.NAME\]"),
        ("network", {"headwise_default.q_proj": "r = 8"}, r"\[headwise_default\] has no meaning"),
        ("network", {"default": "r = 8\ndisable_adapter = true"}, "exists and is off"),
        ("network", {"default": 'r = "NA"'}, "r = None: must be a whole number"),
        ("network", {"default": "r = -1"}, "r = -1"),
        ("network", {"default": "r = 8\nlora_alpha = 0"}, "lora_alpha = 0: must be a number above 0"),
        ("network", {"default": "r = 8\nlora_alpha = 1\nlora_dropout = 1.0"}, "lora_dropout = 1.0"),
    ],
)  # fmt: skip
def test_what_does_not_apply(tmp_path: Path, granularity: str, tables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(file(tmp_path, granularity, tables))


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    lora = file(tmp_path, "network", {"default": "r = 8\ndisable_adapter = true", "all_layers.wq": "r = 1"})
    with pytest.raises(ValueError) as error:
        convert(lora, tmp_path / "missing.toml")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "wq" in lines[0]
    assert "exists and is off" in lines[1]
    assert "missing.toml: cannot be read" in lines[2]


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be converted for opt, llama"):
        convert(file(tmp_path, "network", QV), model_type="gpt2")


def test_not_given_means_the_default_of_dropout(tmp_path: Path) -> None:
    path = file(tmp_path, "network", {"default": 'r = 8\nlora_alpha = 16\nlora_dropout = "NA"'})
    assert section(path)["dropout"] == 0.0


def test_needs_no_torch() -> None:
    program = "import sys, salient_ds.heterolora.released_toml; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3]).returncode == 0
