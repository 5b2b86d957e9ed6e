"""What every kind of client computes from an exported adapter, and which form is the default.

Readers are written down here from their own sources, without the code under test. That the real clients agree is tested
in tests/clients.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salient_ds.adapters.rank_pattern import read_ranks
from salient_ds.export.api import export_adapter
from salient_ds.export.forms import choose_form
from salient_ds.export.lora_folder import LoraFolder
from salient_ds.export.shrink import plan_cut
from salient_ds.export.shrunk_folder import write_shrunk
from salient_ds.run.applying import add_adapter
from salient_ds.salience.spectral_cut import Cut
from tests.support.verify import logits_of
from tests.unit.export.builders import Case, build
from tests.unit.export.peft_adapters import dense_updates


def tensors_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    stored = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"])
        for name in names
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def by_rows_of_the_tensor(folder: Path) -> dict[str, torch.Tensor]:
    """llama.cpp and vLLM from 0.32: lora_alpha / rows, no patterns."""
    alpha = config_of(folder)["lora_alpha"]
    return {name: alpha / len(A) * B @ A for name, (A, B) in tensors_of(folder).items()}


def by_one_rank(folder: Path) -> dict[str, torch.Tensor]:
    """SGLang and older vLLM: the rank of the configuration, for stacks of tensors of that size."""
    config = config_of(folder)
    pairs = tensors_of(folder)
    if {len(A) for A, _ in pairs.values()} != {config["r"]}:
        raise ValueError("one rank for all")
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (A, B) in pairs.items()}


def expected(case: Case) -> dict[str, torch.Tensor]:
    return {
        f.name: f.scaling * f.B.detach() @ torch.diag(f.E.detach() * f.mask) @ f.A.detach()
        for f in case.factors  # type: ignore[operator]
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, update in wanted.items():
        assert (found.get(name, torch.zeros_like(update)) - update).abs().max() < 1e-5 * max(update.abs().max(), 1)


def test_every_reader_computes_the_same_update(llama: Case, out: Path) -> None:
    wanted = expected(llama)
    export_adapter(llama.factors, llama.meta, out / "ragged", "ragged", llama.base)
    export_adapter(llama.factors, llama.meta, out / "padded", "padded", llama.base)
    for folder in (out / "ragged", out / "padded"):
        assert_same(by_rows_of_the_tensor(folder), wanted)
        assert_same({name: value.float() for name, value in dense_updates(folder).items()}, wanted)
        model = add_adapter(build("llama"), folder)
        with torch.no_grad():
            assert (logits_of(model(**llama.inputs)) - llama.logits).abs().max() < 1e-5
    assert_same(by_one_rank(out / "padded"), wanted)
    with pytest.raises(ValueError, match="one rank for all"):
        by_one_rank(out / "ragged")


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_a_shrunk_adapter_follows_the_same_form(llama: Case, out: Path, form: str) -> None:
    export_adapter(llama.factors, llama.meta, out / "source", "padded", llama.base)
    source = LoraFolder(out / "source")
    shrinkage = plan_cut(source, Cut("energy", 1.0))
    assert shrinkage.ranks == {f.name: int((f.mask & (f.E != 0)).sum()) for f in llama.factors}  # type: ignore[operator]
    before = {f.name: f.rank for f in llama.factors}
    assert {m.name: m.before for m in shrinkage.modules} == before, "rows of padding are no ranks"
    write_shrunk(source, shrinkage, out / "cut", form=form)
    assert_same(by_rows_of_the_tensor(out / "cut"), expected(llama))
    assert "alpha_pattern" not in config_of(out / "cut") and "exclude_modules" not in config_of(out / "cut")
    if form == "padded":
        assert_same(by_one_rank(out / "cut"), expected(llama))


def test_adapters_of_older_versions_are_still_read(llama: Case, out: Path) -> None:
    """Until 2026-11-26 the ragged form had alpha_pattern = rank_pattern, and a scale of 1."""
    export_adapter(llama.factors, llama.meta, out, "ragged", llama.base)
    from safetensors.torch import save_file

    path, config = out / "adapter_model.safetensors", config_of(out)
    stored = load_file(path)
    for key in [key for key in stored if key.endswith("lora_B.weight")]:
        stored[key] *= config["lora_alpha"] / stored[key].shape[1]
    save_file(stored, path)
    config |= {"alpha_pattern": config["rank_pattern"], "exclude_modules": None}
    (out / "adapter_config.json").write_text(json.dumps(config))
    model = add_adapter(build("llama"), out)
    with torch.no_grad():
        assert (logits_of(model(**llama.inputs)) - llama.logits).abs().max() < 1e-5
    assert_same({name: LoraFolder(out).read(name).scaling * B @ A for name, (A, B) in tensors_of(out).items()},
                expected(llama))  # fmt: skip


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_ranks_of_an_adapter_are_its_own_whatever_its_form(llama: Case, out: Path, form: str) -> None:
    export_adapter(llama.factors, llama.meta, out, form, llama.base)
    for place in (out, out / "adapter_config.json"):
        assert read_ranks(place) == {"*": 0} | {f.name: f.rank for f in llama.factors}


def test_default_form_by_size(llama: Case, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_adapter(llama.factors, llama.meta, out / "wide", None, llama.base)
    note = capsys.readouterr().err
    assert config_of(out / "wide")["rank_pattern"] and note.count("\n") == 1
    assert "ranks 0 to 6" in note and "--form padded" in note and "SGLang" in note
    alike = [replace(f, mask=torch.arange(6) < (5 if k else 6)) for k, f in enumerate(llama.factors)]
    export_adapter(alike, llama.meta, out / "alike", None, llama.base)
    assert config_of(out / "alike")["rank_pattern"] == {} and capsys.readouterr().err == ""
    export_adapter(llama.factors, llama.meta, out / "asked", None, llama.base, pad_to=8)
    assert config_of(out / "asked")["r"] == 8


def test_choice_of_the_form() -> None:
    widths = {"q": 10, "down": 30}
    assert choose_form(widths, {"q": 2, "down": 2}).form == "padded"
    ragged = choose_form(widths, {"q": 600, "down": 100})
    assert ragged.cost == pytest.approx(600 * 40 / (6000 + 3000)) and ragged.form == "ragged"
    assert ragged.note is not None and "2.7 times as large, and rank 600 is above vLLM's limit of 512" in ragged.note
    assert choose_form(widths, {"q": 0, "down": 2}).form == "padded", "4/3 of the size is below 1.5"


@pytest.mark.parametrize("form", ["ragged", "padded", "merged"])
def test_files_have_the_mode_of_new_files(llama: Case, out: Path, form: str) -> None:
    before = os.umask(0o022)
    try:
        export_adapter(llama.factors, llama.meta, out, form, llama.base)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()} == {0o644}


def test_no_nulls_and_the_revision(llama: Case, out: Path) -> None:
    meta = replace(llama.meta, revision="v2", base_model="some/model")
    export_adapter(llama.factors, meta, out, "ragged", llama.base)
    config = config_of(out)
    assert None not in config.values(), "PEFT 0.13 takes no key that it does not know"
    assert config["revision"] == "v2" and json.loads((out / "salient_ds.json").read_text())["revision"] == "v2"
    export_adapter(llama.factors, replace(llama.meta, revision="v2"), out, "ragged", llama.base, overwrite=True)
    assert "revision" not in config_of(out), "a folder has no revision"


def test_card(llama: Case, out: Path) -> None:
    facts = {"Data": {"train": "a|b.json", "eval": None}, "Measured": {"loss": 0.25}}
    meta = replace(llama.meta, base_model="some/model", revision="v2", card=facts)
    export_adapter(llama.factors, meta, out, "ragged", llama.base)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: some/model\n")
    for text in ("a\\|b.json", "| loss | 0.25 |", "vLLM 0.32 or later", "--max-lora-rank 8",
                 'revision="v2"', "llama.cpp",
                 "PeftModel.from_pretrained", "12 of 14 matrices"):  # fmt: skip
        assert text in card, text
    assert "eval" not in card and "SGLang" not in card
    export_adapter(llama.factors, llama.meta, out, "padded", llama.base, overwrite=True)
    card = (out / "README.md").read_text()
    assert "SGLang" in card and "base_model:" not in card, "the hub knows no folders"
