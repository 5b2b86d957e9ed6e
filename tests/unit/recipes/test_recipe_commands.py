"""``salient-ds recipes``: the list, one run file, and files that are never overwritten unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from salient_ds.cli import app
from salient_ds.config.run import load_config
from salient_ds.recipes.book import recipe, recipes


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *words])


def test_the_list_has_a_line_for_every_recipe() -> None:
    done = invoke()
    assert done.exit_code == 0
    *lines, last = done.output.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert last.startswith("90 recipes. Run here: nothing so far.")
    assert any("DeBERTaV3-base  accuracy 90.66 (matched), 90.70 (mismatched)" in line for line in lines)
    assert len(invoke("--like", "glue/rte").output.splitlines()) == 7 + 4 + 1


def test_a_filter_that_fits_nothing_is_an_error() -> None:
    done = invoke("--like", "imagenet")
    assert done.exit_code == 2 and "no recipe has 'imagenet' in its name" in done.output


def test_show_prints_the_run_file() -> None:
    done = invoke("show", "glue/mnli/salientlora")
    assert (done.exit_code, done.output) == (0, recipe("glue/mnli/salientlora").text())


@pytest.mark.parametrize("verb", [["show"], ["write", "-o", "run.yaml"]])
def test_a_wrong_name_gets_the_nearest_one(verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(verb[0], "glue/mnli/salient", *verb[1:])
    assert done.exit_code == 2
    assert "there is no recipe 'glue/mnli/salient'; did you mean 'glue/mnli/salientlora'?" in done.output
    assert list(tmp_path.iterdir()) == []


def test_write_makes_a_run_file_that_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("write", "squad/v2/adalora", "-o", "run.yaml")
    assert done.exit_code == 0 and "next: salient-ds check run.yaml" in done.output
    run = load_config(tmp_path / "run.yaml")
    assert run.data.task is not None and run.data.task.name == "squad/v2"
    assert Path(run.deepspeed).is_file()
    assert "--module salient_ds.train run.yaml" in (tmp_path / "run.yaml").read_text()
    assert invoke("write", "squad/v2/adalora", "-o", "run.yaml").exit_code == 0  # the same once more


def test_write_replaces_nothing_unasked(tmp_path: Path) -> None:
    run, zero = tmp_path / "run.yaml", tmp_path / "zero2.json"
    for path in (run, zero):
        path.write_text("mine")
        done = invoke("write", "squad/v2/adalora", "-o", str(run))
        assert done.exit_code == 2 and f"{path} exists and holds something else" in done.output.replace("\n", "")
        assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
        path.unlink()
    run.write_text("mine")
    assert invoke("write", "squad/v2/adalora", "-o", str(run), "--overwrite").exit_code == 0
    assert load_config(run).output_dir == "runs/squad-v2-adalora"


def test_write_needs_a_folder_and_a_file(tmp_path: Path) -> None:
    done = invoke("write", "squad/v2/adalora", "-o", str(tmp_path / "no" / "run.yaml"))
    assert done.exit_code == 2 and "there is no folder" in done.output
    done = invoke("write", "squad/v2/adalora", "-o", str(tmp_path))
    assert done.exit_code == 2 and "is a folder: give a file" in done.output.replace("\n", "")
