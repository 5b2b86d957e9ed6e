"""A merged model in another data type, and what rounding does to the adapter's update."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salient_ds.export.api import export_adapter
from salient_ds.export.base_files import open_base
from salient_ds.export.fold import LoraPair, delta_weight
from salient_ds.export.merged_shards import bytes_as
from salient_ds.export.rounding import RoundingError, merge_matrix
from tests.support.verify import load_model, logits_of, verify_merged, verify_peft
from tests.unit.export.builders import Case
from tests.unit.export.test_merge import all_tensors, rewrite

SAVED = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "hidden_size": 1}}


@pytest.fixture
def bf16(case_of) -> Case:
    return case_of("llama", torch.bfloat16)


def record(folder: Path) -> dict:
    return json.loads((folder / "salient_ds.json").read_text())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_all_floating_tensors_follow(bf16: Case, tmp_path: Path, shards: int, suffix: str) -> None:
    tensors = all_tensors(bf16.base) | {"counter": torch.arange(3)}
    base = rewrite(bf16.base, tmp_path / "base", tensors, shards, suffix)
    config = json.loads((base / "config.json").read_text()) | SAVED
    (base / "config.json").write_text(json.dumps(config))
    merged = export_adapter(bf16.factors, bf16.meta, tmp_path / "out", "merged", base, torch.float32)
    after = all_tensors(merged)
    assert set(after) == set(tensors)
    assert {value.dtype for key, value in after.items() if key != "counter"} == {torch.float32}
    assert torch.equal(after["counter"], tensors["counter"])
    adapted = {f"{f.name}.weight" for f in bf16.factors if f.rank}
    for key in set(tensors) - adapted - {"counter"}:
        assert torch.equal(after[key], tensors[key].float()), key
    written = json.loads((merged / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["torch_dtype"] == "float32"
    assert written["text_config"]["hidden_size"] == 1
    assert written.keys() == config.keys()
    assert record(merged)["dtype"] == "float32" and record(merged)["rounding_error"] < 1e-4
    if shards > 1:
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in after.values())


def test_a_merged_model_in_fp32_is_base_plus_adapter(bf16: Case, tmp_path: Path) -> None:
    """The reference: the bf16 base and its adapter, both computed in fp32."""
    export_adapter(bf16.factors, bf16.meta, tmp_path / "peft", "peft", bf16.base)
    export_adapter(bf16.factors, bf16.meta, tmp_path / "exact", "merged", bf16.base, torch.float32)
    export_adapter(bf16.factors, bf16.meta, tmp_path / "stored", "merged", bf16.base)
    with torch.no_grad():
        exact = logits_of(load_model(tmp_path / "exact", "CAUSAL_LM", torch.float32)(**bf16.inputs))
    assert verify_peft(tmp_path / "peft", bf16.base, bf16.inputs, exact) < 1e-5
    assert verify_merged(tmp_path / "stored", bf16.inputs, exact) > 1e-3


def test_the_error_is_printed_with_a_warning(
    bf16: Case, llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [replace(factors, scaling=factors.scaling / 100) for factors in bf16.factors]
    export_adapter(small, bf16.meta, tmp_path / "a", "merged", bf16.base)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rounding the merged weights to bfloat16 changes the adapter's update by ")
    assert last.endswith("; this is above 1% of the update: --dtype float32 keeps it")
    matrices = sum(f.rank > 0 for f in bf16.factors)
    assert f"(Frobenius norm over {matrices} matrices, largest in model.layers." in last
    export_adapter(llama.factors, llama.meta, tmp_path / "b", "merged", llama.base)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "by less than 0.01 %" in last and "--dtype" not in last
    assert record(tmp_path / "b")["dtype"] == "as stored"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_error_is_that_of_the_stored_matrix(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5000, 8, generator=draw).to(dtype)  # more rows than are added at a time
    pair = LoraPair("m", torch.randn(2, 8, generator=draw) * 0.01, torch.randn(5000, 2, generator=draw))
    rounding = RoundingError()
    merged = merge_matrix(base, pair, dtype, rounding)
    exact = base.double() + delta_weight(pair).double()
    assert merged.dtype == dtype and torch.equal(merged, exact.to(dtype))
    error = (merged.double() - exact).norm() / delta_weight(pair).double().norm()
    assert rounding.share == pytest.approx(float(error), rel=1e-6) and rounding.shares == {"m": rounding.share}
    expected = {torch.bfloat16: (0.05, 0.5), torch.float16: (0.005, 0.05), torch.float32: (0, 1e-4)}
    low, high = expected.get(dtype, (0, 1e-12))
    assert low <= rounding.share <= high


def test_errors_add_up_by_norm() -> None:
    rounding = RoundingError()
    rounding.add("a", 9.0, 100.0)
    rounding.add("b", 16.0, 525.0)
    assert rounding.share == pytest.approx(0.2)
    assert "by 20 % (Frobenius norm over 2 matrices, largest in a: 30 %)" in rounding.line("float16")
    rounding.add("idle", 0.0, 0.0)
    assert RoundingError().share == rounding.shares["idle"] == 0


def test_values_that_do_not_fit(llama: Case, tmp_path: Path) -> None:
    tensors = all_tensors(llama.base)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e6)
    base = rewrite(llama.base, tmp_path / "base", tensors, 1, ".safetensors")
    with pytest.raises(ValueError, match="'model.norm.weight' overflows torch.float16"):
        export_adapter(llama.factors, llama.meta, tmp_path / "out", "merged", base, torch.float16)
    assert not (tmp_path / "out").exists()
    tensors["model.norm.weight"][0] = float("inf")  # was there before: not the merge's doing
    save_file({"x": tensors["model.norm.weight"]}, tmp_path / "x.safetensors")
    assert bytes_as([tmp_path / "x.safetensors"], None) == (tmp_path / "x.safetensors").stat().st_size


def test_the_needed_space(bf16: Case, tmp_path: Path) -> None:
    files = [bf16.base / name for name in open_base(bf16.base).shards]
    size = sum(path.stat().st_size for path in files)
    data = sum(value.numel() for value in load_file(files[0]).values()) * 2
    assert bytes_as(files, torch.bfloat16) == size and bytes_as(files, torch.float32) == size + data
    pickled = rewrite(bf16.base, tmp_path / "bin", all_tensors(bf16.base), 1, ".bin") / "pytorch_model.bin"
    assert bytes_as([pickled], torch.float32) == 2 * pickled.stat().st_size


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (["--form", "merged"], None),
        (["--form", "merged", "--dtype", "float32"], torch.float32),
        (["--dtype", "bfloat16"], torch.bfloat16),
        ([], None),
    ],
)
def test_the_command_line_hands_it_on(
    options: list[str], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from salient_ds.cli import app
    from salient_ds.run import deviation

    given: dict = {}
    measured: list = []
    monkeypatch.setattr(deviation, "newest_checkpoint", lambda run: Path("checkpoint"))
    monkeypatch.setattr(deviation, "report_deviation", lambda *given: measured.append(given))
    monkeypatch.setattr(deviation, "export_run", lambda *_, **more: given.update(more) or Path("written"))
    assert CliRunner().invoke(app, ["export", "run", *options]).exit_code == 0
    assert given["dtype"] == dtype
    wanted = [(Path("run"), Path("checkpoint"), Path("written"), None)] if "merged" in options else []
    assert measured == wanted and given["checkpoint"] == (Path("checkpoint") if wanted else None)
    assert CliRunner().invoke(app, ["export", "run", "--dtype", "int8"]).exit_code == 2
