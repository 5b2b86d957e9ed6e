"""A cut adapter is the best one of its ranks, PEFT loads it, and what is no factor stays as it was.

Tolerance of logits: 1e-5 (measured 2e-6), as in test_round_trip; they reach 2 to 5 and the adapters move them by more
than 0.1.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salient_ds.export.fold import AdapterFactors
from salient_ds.export.lora_folder import LoraFolder
from salient_ds.export.shrink import plan_cut
from salient_ds.salience.spectral_cut import Cut
from tests.support.verify import logits_of, verify_peft
from tests.unit.export.builders import build
from tests.unit.export.peft_adapters import (
    INPUTS,
    RAGGED,
    config_of,
    dense_updates,
    logits_with,
    save_adapter,
    shrink,
    truncated,
)  # fmt: skip

pytest.importorskip("peft", reason="the adapters are written and read by real PEFT")
EXACT = 1e-5


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rsLoRA, lora_alpha != r, rank_pattern and alpha_pattern, lm_head trained in full."""
    folder = save_adapter(build("llama"), tmp_path_factory.mktemp("ragged"), modules_to_save=["lm_head"], **RAGGED)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"content of {name}")
    (folder / "optimizer.pt").write_text("state")
    return folder


@torch.no_grad()
def logits_of_updates(updates: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> torch.Tensor:
    """The base model with dense updates added to its weights, and modules replaced."""
    model = build("llama")
    for name, value in saved.items():
        model.get_parameter(name).copy_(value)
    for name, update_OI in updates.items():
        weight = model.get_submodule(name).weight
        weight.copy_(weight.double() + update_OI)
    return logits_of(model(**INPUTS))


def saved_in_full(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items() if "lora_" not in key}


@pytest.mark.parametrize("form", ["peft", "padded"])
def test_nothing_cut_is_the_same_adapter(ragged: Path, out: Path, form: str) -> None:
    shrinkage = shrink(ragged, out, Cut("energy", 1), form=form)
    assert shrinkage.keeps_everything and shrinkage.energy_kept == 1
    assert shrinkage.ranks == {name: LoraFolder(ragged).pairs[name].rank for name in shrinkage.ranks}
    assert verify_peft(out, build("llama"), INPUTS, logits_with(ragged)) < EXACT
    before, after = dense_updates(ragged), dense_updates(out)
    assert all((after[name] - value).abs().max() < 1e-6 * value.abs().max() for name, value in before.items())
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (ragged, out))
    for key in (key for key in old if "lora_A" in key):
        exponent_rI = torch.log2(new[key][: len(old[key])] / old[key])
        assert torch.equal(exponent_rI, exponent_rI.round()), "the factors are the old ones, times powers of two"


@pytest.mark.parametrize("form", ["peft", "padded"])
@pytest.mark.parametrize(
    "cut",
    [Cut("rank", 2), Cut("rank", 2.5), Cut("energy", 0.8), Cut("parameters", 2500), Cut("rank", 3, uniform=True)],
    ids=str,
)
def test_peft_computes_the_best_adapter_of_these_ranks(ragged: Path, out: Path, cut: Cut, form: str) -> None:
    shrinkage = shrink(ragged, out, cut, form=form)
    before, after = dense_updates(ragged), dense_updates(out)
    expected = {name: truncated(update, shrinkage.ranks[name]) for name, update in before.items()}
    for name, update in expected.items():
        assert (after.get(name, torch.zeros_like(update)) - update).abs().max() < 1e-6 * before[name].abs().max()
    assert verify_peft(out, build("llama"), INPUTS, logits_of_updates(expected, saved_in_full(ragged))) < EXACT
    assert (logits_with(ragged) - logits_with(out)).abs().max() > 1000 * EXACT, "the cut must matter for this test"
    lost = sum(float((before[name] - update).square().sum()) for name, update in expected.items())
    total = sum(float(update.square().sum()) for update in before.values())
    assert shrinkage.energy_kept == pytest.approx(1 - lost / total, abs=1e-9)


def test_the_threshold_is_that_of_all_dense_singular_values(ragged: Path) -> None:
    values = [(float(s), name) for name, update in dense_updates(ragged).items() for s in torch.linalg.svdvals(update)]
    expected = dict.fromkeys(dense_updates(ragged), 0)
    for _, name in sorted(values, reverse=True)[:30]:
        expected[name] += 1
    shrinkage = plan_cut(LoraFolder(ragged), Cut("rank", 30 / 14))
    assert shrinkage.ranks == expected and len(set(expected.values())) > 3
    assert sum(expected.values()) == 30


def test_files_and_record(ragged: Path, out: Path) -> None:
    import hashlib

    shrinkage = shrink(ragged, out, Cut("energy", 0.7), also=lambda folder: (folder / "more.txt").write_text("x"))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "more.txt", "salient_ds.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert (out / "chat_template.jinja").read_text() == "content of chat_template.jinja"
    config, record = config_of(out), json.loads((out / "salient_ds.json").read_text())
    kept = {name: rank for name, rank in shrinkage.ranks.items() if rank}
    assert len(kept) < 14 and set(config["target_modules"]) == set(kept) and config["modules_to_save"] == ["lm_head"]
    assert set(config["rank_pattern"].values()) == {*kept.values()} and "alpha_pattern" not in config
    assert config["r"] == config["lora_alpha"] == max(kept.values()) and not config["use_rslora"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == config_of(ragged)["base_model_name_or_path"]
    weights = (ragged / "adapter_model.safetensors").read_bytes()
    assert record["shrink"]["sha256"]["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert record["shrink"]["source"] == str(ragged) and record["shrink"]["criterion"] == "energy"
    assert record["shrink"]["energy_kept"] == shrinkage.energy_kept >= 0.7
    assert record["ranks"] == shrinkage.ranks and record["total_rank"] == sum(kept.values())
    assert record["shrink"]["parameters_after"] == sum(
        value.numel() for key, value in load_file(out / "adapter_model.safetensors").items() if "lora_" in key
    )
    for name, row in record["shrink"]["modules"].items():
        update = dense_updates(ragged)[name]
        share = truncated(update, row["rank_after"]).square().sum() / update.square().sum()
        assert row["energy_kept"] == pytest.approx(float(share), abs=1e-9)


def test_a_shrunk_adapter_shrinks_again_as_if_at_once(ragged: Path, tmp_path: Path) -> None:
    shrink(ragged, tmp_path / "half", Cut("rank", 3))
    twice = shrink(
        tmp_path / "half", tmp_path / "twice", Cut("rank", 1.5 * 14 / len(LoraFolder(tmp_path / "half").modules))
    )
    once = shrink(ragged, tmp_path / "once", Cut("rank", 1.5))
    assert {name: rank for name, rank in once.ranks.items() if rank} == {n: r for n, r in twice.ranks.items() if r}
    for name, update in dense_updates(tmp_path / "once").items():
        assert (dense_updates(tmp_path / "twice")[name] - update).abs().max() < 1e-5 * update.abs().max()


def test_two_cuts_are_equal_byte_for_byte(ragged: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shrink(ragged, tmp_path / name, Cut("rank", 2))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_pickled_weights(ragged: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((ragged / "adapter_config.json").read_bytes())
    torch.save(load_file(ragged / "adapter_model.safetensors"), old / "adapter_model.bin")
    shrink(old, tmp_path / "a", Cut("rank", 2))
    shrink(ragged, tmp_path / "b", Cut("rank", 2))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
def test_types(ragged: Path, tmp_path: Path, stored: torch.dtype) -> None:
    """As stored, or as asked. A module that keeps all its rows loses at most one rounding per element."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_bytes((ragged / "adapter_config.json").read_bytes())
    tensors = load_file(ragged / "adapter_model.safetensors")
    save_file({k: v.to(stored) for k, v in tensors.items()}, source / "adapter_model.safetensors")
    shrink(source, tmp_path / "as_stored", Cut("energy", 1))
    shrink(source, tmp_path / "asked", Cut("energy", 1), dtype=torch.float32)
    for folder, kind in (("as_stored", min(stored, torch.float32, key=lambda d: d.itemsize)), ("asked", torch.float32)):
        written = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert {v.dtype for k, v in written.items() if "lora_" in k} == {kind}
        assert written["base_model.model.lm_head.weight"].dtype == stored, "what is no factor stays as it is"
        for name, update in dense_updates(source).items():
            error = (dense_updates(tmp_path / folder)[name] - update).abs().max()
            assert error < 4 * torch.finfo(kind).eps * update.abs().max()


def test_rows_without_effect_are_left_out(tmp_path: Path) -> None:
    """A module that was never trained (B = 0) and one whose rows are copies of each other."""
    source = save_adapter(build("llama"), tmp_path / "source", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    path = source / "adapter_model.safetensors"
    tensors = load_file(path)
    q, v = (f"base_model.model.model.layers.{i}.self_attn.{n}" for i, n in ((0, "q_proj"), (1, "v_proj")))
    tensors[f"{q}.lora_B.weight"].zero_()
    tensors[f"{v}.lora_A.weight"][1:] = tensors[f"{v}.lora_A.weight"][0]
    save_file(tensors, path)
    shrinkage = shrink(source, tmp_path / "out", Cut("rank", 100))
    assert list(shrinkage.ranks.values()) == [0, 4, 4, 1] and shrinkage.keeps_everything
    assert verify_peft(tmp_path / "out", build("llama"), INPUTS, logits_with(source)) < EXACT


def test_one_module_at_a_time_is_in_memory(ragged: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[AdapterFactors]] = []
    seen: list[int] = []
    read = LoraFolder.read

    def watched(self: LoraFolder, module: str) -> AdapterFactors:
        seen.append(sum(reference() is not None for reference in alive))
        factors = read(self, module)
        alive.append(weakref.ref(factors))
        return factors

    monkeypatch.setattr(LoraFolder, "read", watched)
    shrinkage = shrink(ragged, out, Cut("rank", 2))
    assert seen == [0] * (14 + sum(map(bool, shrinkage.ranks.values()))), "two passes, nothing kept in between"


def test_opening_reads_no_values(ragged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from salient_ds.export.lora_folder import WeightFile

    monkeypatch.setattr(WeightFile, "read", lambda *_: pytest.fail("a tensor was read"))
    assert len(LoraFolder(ragged).modules) == 14
