"""Merging changes the adapted matrices and nothing else, whatever the checkpoint looks like."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salient_ds.export.api import export_adapter
from salient_ds.export.base_files import locate_by_suffix, open_base
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.merge import write_merged
from tests.support.verify import load_model, verify_merged
from tests.unit.export.builders import Case, build


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = open_base(folder)
    return {key: files.read(key) for key in files.file_of}


def rewrite(base: Path, folder: Path, tensors: dict[str, torch.Tensor], shards: int, suffix: str) -> Path:
    """The checkpoint again, with ``tensors`` in so many files."""
    folder.mkdir()
    shutil.copyfile(base / "config.json", folder / "config.json")
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" for i in range(shards)] if shards > 1 else [stem + suffix]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key, file in weight_map.items() if file == name}
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    if shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_only_adapted_matrices_change(llama: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    before = {key: value.to(dtype) for key, value in all_tensors(llama.base).items()}
    base = rewrite(llama.base, tmp_path / "base", before, 1, ".safetensors")
    merged = export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    after = all_tensors(merged)
    assert list(after) == list(before)
    adapted = {f"{f.name}.weight": f for f in llama.factors if f.rank}
    for key, value in after.items():
        if key not in adapted:
            assert torch.equal(value, before[key]) and value.dtype == dtype
            continue
        f = adapted[key]
        delta_OI = f.scaling * f.B @ torch.diag(f.E * f.mask) @ f.A
        exact = before[key].double() + delta_OI.detach().double()
        unit = torch.finfo(dtype).eps * exact.abs().max() if dtype != torch.float64 else 1e-6
        assert not torch.equal(value, before[key]) and (value.double() - exact).abs().max() <= unit
        if dtype in (torch.bfloat16, torch.float16):  # rounded once: a delta cast before adding would miss many
            assert (value == exact.to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_file_layouts(llama: Case, tmp_path: Path, suffix: str, shards: int) -> None:
    base = rewrite(llama.base, tmp_path / "base", all_tensors(llama.base), shards, suffix)
    merged = export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    names = {path.name for path in merged.glob("*.safetensors")}
    assert len(names) == shards and not list(merged.glob("*.bin*"))
    assert (merged / "model.safetensors.index.json").is_file() == (shards > 1)
    if shards > 1:
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == names
        sizes = sum(v.numel() * v.element_size() for v in all_tensors(merged).values())
        assert index["metadata"]["total_size"] == sizes
    assert verify_merged(merged, llama.inputs, llama.logits) < 1e-5


def test_tied_tensors_of_a_pickled_checkpoint(case_of, tmp_path: Path) -> None:
    case = case_of("t5")
    base = rewrite(case.base, tmp_path / "base", {}, 1, ".bin")
    torch.save(build("t5").state_dict(), base / "pytorch_model.bin")  # shared and encoder.embed_tokens: one storage
    merged = export_adapter(case.factors, case.meta, tmp_path / "out", "merged", base)
    assert verify_merged(merged, case.inputs, case.logits) < 1e-5


def test_checkpoint_without_the_prefix(llama: Case, tmp_path: Path) -> None:
    """Saved from LlamaModel: "layers.0..." for the module "model.layers.0..."."""
    tensors = {key.removeprefix("model."): value for key, value in all_tensors(llama.base).items()}
    base = rewrite(llama.base, tmp_path / "base", tensors, 1, ".safetensors")
    merged = export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    assert set(all_tensors(merged)) == set(tensors)
    assert verify_merged(merged, llama.inputs, llama.logits) < 1e-5


def test_new_head_on_a_headless_checkpoint(case_of, tmp_path: Path) -> None:
    case = case_of("bert")
    tensors = all_tensors(case.base)
    head = {key: tensors.pop(key) for key in ("classifier.weight", "classifier.bias")}
    bare = {key.removeprefix("bert."): value for key, value in tensors.items()}
    base = rewrite(case.base, tmp_path / "base", bare, 1, ".safetensors")
    updates = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}
    merged = export_adapter(
        case.factors, case.meta, tmp_path / "out", "merged", base, trained=head, config_updates=updates
    )
    assert verify_merged(merged, case.inputs, case.logits) < 1e-5
    assert load_model(merged, "SEQ_CLS", torch.float32).config.id2label[1] == "maybe"


def test_trained_head_replaces_the_old_one(case_of, out: Path) -> None:
    case = case_of("bert")
    export_adapter(case.factors, case.meta, out, "merged", case.base, trained={"classifier.bias": torch.arange(3.0)})
    assert torch.equal(all_tensors(out)["classifier.bias"], torch.arange(3.0))
    with pytest.raises(ValueError, match=r"'classifier.bias' is \[3\] in the base, \[4\] in the run"):
        export_adapter(
            case.factors, case.meta, out.with_name("b"), "merged", case.base, trained={"classifier.bias": torch.ones(4)}
        )


def test_companion_files(llama: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.base, base)
    extra = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "modeling_x.py"]
    for name in extra:
        (base / name).write_text(name)
    for name in ("optimizer.pt", "trainer_state.json", "pytorch_model.bin", ".hidden.json"):
        (base / name).write_text("not for the copy")
    merged = export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    expected = {*extra, "config.json", "generation_config.json", "model.safetensors", "salient_ds.json"}
    assert {path.name for path in merged.iterdir()} == expected
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


def renamed(factors: list[AdapterFactors], old: str, new: str) -> list[AdapterFactors]:
    return [replace(f, name=f.name.replace(old, new)) for f in factors]


def test_every_missing_module_is_listed(llama: Case, out: Path) -> None:
    wrong = renamed(llama.factors, "layers.1.mlp", "layers.7.mlp")
    with pytest.raises(ValueError) as caught:
        export_adapter(wrong, llama.meta, out, "merged", llama.base)
    text = str(caught.value)
    assert text.startswith("3 adapted modules") and text.count("layers.7.mlp.") == 3 and "nearest: model.layers" in text
    assert not out.exists()


def test_locating_by_suffix() -> None:
    keys = ["encoder.layer.0.q.weight", "decoder.layer.0.q.weight", "encoder.layer.0.q.bias"]
    assert locate_by_suffix(["bert.encoder.layer.0.q"], keys) == {"bert.encoder.layer.0.q": keys[0]}
    assert locate_by_suffix(["layer.0.k"], ["m.layer.0.k.weight"]) == {"layer.0.k": "m.layer.0.k.weight"}
    with pytest.raises(ValueError, match="layer.0.q .could be encoder.layer.0.q.weight, decoder.layer.0.q.weight"):
        locate_by_suffix(["layer.0.q"], keys)
    with pytest.raises(ValueError, match="1 adapted modules"):
        locate_by_suffix(["a.encoder.layer.0.q", "b.encoder.layer.0.q"], keys)  # both would take the same tensor
    with pytest.raises(ValueError):
        locate_by_suffix(["other_encoder.layer.0.q"], ["encoder.layer.0.q.weight"])  # whole components only


def test_wrong_model_is_noticed_by_shape(llama: Case, out: Path) -> None:
    first = llama.factors[1]
    wide = replace(first, A=torch.ones(first.A.shape[0], 64))
    with pytest.raises(ValueError, match=r"is \[16, 64\], its base weight '.*' \[16, 32\]: is this the model"):
        export_adapter([wide], llama.meta, out, "merged", llama.base)
    assert not out.exists() and not list(out.parent.iterdir())


def test_transposed_layers_are_refused(llama: Case, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    square = replace(llama.factors[3], name="transformer.h.0.attn.c_proj")  # 32 x 32: no shape gives it away
    with pytest.raises(ValueError, match="gpt2 stores transformer.h.0.attn.c_proj transposed"):
        export_adapter([square], llama.meta, tmp_path / "out", "merged", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    oblong = replace(square, name="transformer.h.0.mlp.c_fc", B=torch.ones(128, 6))
    with pytest.raises(ValueError, match=r"\[128, 32\].*\[32, 128\]: it is stored transposed"):
        export_adapter([oblong], llama.meta, tmp_path / "out", "merged", tmp_path / "gpt2")


@pytest.mark.parametrize("stated", [True, None])
def test_tied_head_is_refused(llama: Case, tmp_path: Path, stated: bool | None) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.base, base)
    head = replace(llama.factors[3], name="lm_head", B=torch.ones(64, 6))
    export_adapter([head], llama.meta, tmp_path / "untied", "merged", base)
    config = json.loads((base / "config.json").read_text())
    config["tie_word_embeddings"] = stated
    if stated is None:  # T5 ties unless its config says otherwise
        config = {"model_type": "t5"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        export_adapter([head], llama.meta, tmp_path / "out", "merged", base)


def test_quantised_base_is_refused(llama: Case, tmp_path: Path) -> None:
    tensors = {key: value.to(torch.int8) if "proj" in key else value for key, value in all_tensors(llama.base).items()}
    base = rewrite(llama.base, tmp_path / "base", tensors, 1, ".safetensors")
    with pytest.raises(ValueError, match="is stored as I8: merging needs one of F64, F32, F16, BF16"):
        export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)


def test_overflow_of_the_stored_dtype(llama: Case, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in all_tensors(llama.base).items()}
    base = rewrite(llama.base, tmp_path / "base", half, 1, ".safetensors")
    huge = [replace(f, scaling=1e6) for f in llama.factors]
    with pytest.raises(ValueError, match="overflows torch.float16 after merging"):
        export_adapter(huge, llama.meta, tmp_path / "out", "merged", base)


def test_damaged_bases(llama: Case, tmp_path: Path) -> None:
    base = rewrite(llama.base, tmp_path / "base", all_tensors(llama.base), 2, ".safetensors")
    second = base / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for length, message in ((len(whole) - 40, "is truncated, .* bytes of"), (100, "truncated inside its header")):
        second.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=message):
            export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    second.unlink()
    with pytest.raises(ValueError, match="names files that are not there: model-00002-of-00002.safetensors"):
        export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base)
    with pytest.raises(ValueError, match="no weights in"):
        open_base(tmp_path)
    with pytest.raises(ValueError, match="neither a directory nor a hub model in the local cache"):
        export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", "no-such/model")
    assert not (tmp_path / "out").exists()


def test_base_and_run_cannot_be_overwritten(llama: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.base, base)
    for form in ("merged", "peft"):
        with pytest.raises(ValueError, match="which is still needed"):
            export_adapter(llama.factors, llama.meta, base, form, base, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="which is still needed"):
        export_adapter(llama.factors, llama.meta, tmp_path, "merged", base, overwrite=True)
    assert load_file(base / "model.safetensors")


def test_progress_is_shown_by_shard(llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = rewrite(llama.base, tmp_path / "base", all_tensors(llama.base), 3, ".safetensors")
    write_merged(tmp_path / "out", llama.factors, llama.meta, base)
    assert "3/3" in capsys.readouterr().err
    write_merged(tmp_path / "quiet", llama.factors, llama.meta, base, progress=False)
    assert capsys.readouterr().err == ""
