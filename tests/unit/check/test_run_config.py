"""What a user reads when the run file or an override is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from salient_ds.config.run import RunConfig, load_config
from salient_ds.strict import ConfigError

VALID = {
    "output_dir": "out",
    "deepspeed": "zero2.json",
    "model": {"path": "m"},
    "adapter": {"rank": 8},
    "method": {"name": "salientlora", "target_rank": 2},
    "data": {"train": "d.json"},
    "train": {"max_steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALID))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems


def test_the_valid_file_is_valid(run_file: Path) -> None:
    assert isinstance(load_config(run_file), RunConfig)


def test_overrides_win_and_keep_their_types(run_file: Path) -> None:
    config = load_config(
        run_file,
        ["train.lr=5e-4", "train.max_steps=null", "train.epochs=1.5", "adapter.target_modules=[q_proj,v_proj]",
         "method.lambda=0.5", "data.packing=true", "model.revision='1'"],
    )  # fmt: skip
    assert (config.train.lr, config.train.max_steps, config.train.epochs) == (5e-4, None, 1.5)
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.method.name == "salientlora" and config.method.lambda_ == 0.5
    assert config.data.packing is True and config.model.revision == "1"


def test_regular_expressions_survive_the_command_line(run_file: Path) -> None:
    config = load_config(run_file, [r"adapter.target_modules=re:.*layers\.[01]\..*_proj"])
    assert config.adapter.target_modules == r"re:.*layers\.[01]\..*_proj"


def test_unknown_keys_in_every_section_with_the_nearest_name(run_file: Path) -> None:
    wrong = ["model.pth=x", "adapter.rnk=2", "method.bta=1", "trin.lr=1", "adapter.orthogonality.fom=a"]
    found = problems(run_file, *wrong)
    assert found == [
        "unknown key 'model.pth': did you mean 'path'?",
        "unknown key 'adapter.orthogonality.fom': did you mean 'form'?",
        "unknown key 'adapter.rnk': did you mean 'rank'?",
        "unknown key 'method.bta': did you mean 'beta'?",
        "unknown key 'trin': did you mean 'train'?",
    ]


def test_several_kinds_of_problems_at_once(run_file: Path) -> None:
    found = "\n".join(problems(run_file, "train.lr=-1", "train.precision=fp8", "method.gamma=0.5", "data.train=null"))
    for text in ("train.lr=-1", "train.precision='fp8'", "method.gamma=0.5 must be above 1", "data.train=None"):
        assert text in found


def test_missing_keys_say_how_to_set_them(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    found = problems(path)
    assert len(found) == len(VALID)
    assert "missing key 'model': it has no default, set it in the YAML or as model=VALUE" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("method.name=salientlra", "method.name='salientlra' is unknown: did you mean 'salientlora'?"),
        ("method.name=null", "missing key 'method.name'"),
        ("method=null", "method=None: must be a section of keys"),
        ("model=llama", "model='llama': must be a section of keys"),
        ("train.betas=[0.9]", "train.betas: element 2"),
        ("train.max_steps=null", "train.max_steps and train.epochs are both missing"),
        ("train.micro_batch_size=3", "train.global_batch_size=4 is not a multiple of train.micro_batch_size=3"),
        ("method.target_rank=9", "method.target_rank=9 is above adapter.rank=8"),
        ("method.target_total=9", "exactly one of method.target_rank"),
        ("output_dir=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_one_clear_sentence(run_file: Path, override: str, expected: str) -> None:
    (problem,) = problems(run_file, override)
    assert expected in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1\n", "cannot read"),
        ("- a\n", "no mapping of sections"),
        ("3\n", "cannot read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (problem,) = problems(path)
    assert expected in problem


def test_a_missing_file_names_the_working_directory(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "none.yaml")
    assert "does not exist (working directory: " in problem


def test_noise_is_for_models_with_one_input(run_file: Path) -> None:
    with_task = ["model.task=seq2seq-lm", "data.task=summarisation/xsum"]
    found = problems(run_file, "train.neftune_alpha=5", *with_task)
    assert any("train.neftune_alpha=5 is for models with one input" in problem for problem in found)
    assert problems(run_file, "train.neftune_alpha=-1")[0].startswith("train.neftune_alpha=-1: ")


def test_the_zero_json_may_lie_beside_the_run_file(run_file: Path) -> None:
    beside = run_file.with_name("zero2.json")
    beside.write_text("{}")
    assert load_config(run_file).deepspeed == str(beside.resolve())
