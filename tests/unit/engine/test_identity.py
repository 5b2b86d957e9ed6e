"""What a resumed run may differ in from its checkpoint, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from salient_ds.config.run import TrainConfig
from salient_ds.engine.identity import CHANGEABLE, Difference, compare, completed
from salient_ds.run.changes import change_problems
from tests.support.methods import OPTIONS

TRAIN = {"lr": 0.1, "sigma_lr": "auto", "lr_schedule": "linear", "lr_warmup": 0, "weight_decay": 0.0,
         "betas": [0.9, 0.999], "eps": 1e-8, "max_grad_norm": 1.0, "precision": "bf16"}  # fmt: skip
SAVED: dict[str, Any] = {
    "method": {"name": "salientlora", "target_rank": 3.0}, "adapter": {"rank": 8, "shortcuts": None},
    "total_steps": 24, "data": "abc", "data_settings": {"data.train": "a.json", "data.max_length": 160},
    "global_batch_size": 4, "seed": 0, "train": TRAIN, "base weights": "f00d",
    "config.json": {"rope_parameters": {"rope_theta": 10000.0}, "hidden_size": 64},
}  # fmt: skip
PATH = Path("run/checkpoints/step-00000004")


def keys(here: dict[str, Any], saved: dict[str, Any] = SAVED) -> tuple[list[str], list[str]]:
    found = compare(saved, here)
    return [d.key for d in found.differences], [d.key for d in found.unknown]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"train": TRAIN | {"betas": (0.9, 0.999)}}, []),
        ({"train": TRAIN | {"lr": 0.2, "betas": (0.9, 0.99)}}, ["train.lr", "train.betas"]),
        ({"method": {"name": "lora", "form": "plain"}}, ["method.name"]),
        ({"method": {"name": "salientlora"}}, ["method.target_rank"]),
        ({"adapter": {"rank": 8, "shortcuts": {"rank": 2}}}, ["adapter.shortcuts"]),
        ({"total_steps": 25, "seed": 1}, ["number of steps", "train.seed"]),
        ({"base weights": "beef"}, ["base weights"]),
        ({"config.json": {"rope_parameters": {"rope_theta": 5e5}, "hidden_size": 64}},
         ["config.json.rope_parameters.rope_theta"]),
        ({"data": "def"}, ["training data"]),
        ({"data": "def", "data_settings": {"data.train": "a.json", "data.max_length": 96}}, ["data.max_length"]),
        ({"data_settings": {"data.train": "moved.json", "data.max_length": 160}}, []),
    ],
)  # fmt: skip
def test_every_difference_is_named(change: dict[str, Any], expected: list[str]) -> None:
    assert keys(SAVED | change) == (expected, [])


def test_parts_that_are_not_known_yet_are_not_compared() -> None:
    assert keys({"seed": 0}) == ([], [])


def test_what_an_old_checkpoint_does_not_record_is_named() -> None:
    old = {key: SAVED[key] for key in ("adapter", "total_steps", "data", "global_batch_size", "seed")}
    old["method"] = {"name": "increlora", "score_reduction": "auto"}
    here = SAVED | {"method": {"name": "increlora", "score_reduction": "mean"}}
    differences, unknown = keys(here, old)
    assert differences == []
    assert unknown[0] == "method.score_reduction" and "train.lr" in unknown and "base weights" in unknown
    groups = [{"name": "singular_values", "weight_decay": 0.0},
              {"name": "factors", "lr": 0.05, "initial_lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.999),
               "eps": 1e-8}]  # fmt: skip
    differences, unknown = keys(here, completed(old, groups))
    assert differences == ["train.sigma_lr", "train.weight_decay"]
    assert [key for key in unknown if key.startswith("train.")] == [
        "train.lr_schedule", "train.lr_warmup", "train.max_grad_norm", "train.precision",
    ]  # fmt: skip
    found = compare(completed(old, groups), here)
    assert found.refusal(PATH, ()) is not None and found.refusal(PATH, ["train.weight_decay", "train.sigma_lr"]) is None
    changed = found.changed(["train.weight_decay", "train.lr_schedule", "train.lr"])
    assert changed == [Difference("train.weight_decay", 0.2, 0.0), Difference("train.lr_schedule", None, "linear")]


def test_an_option_that_older_versions_did_not_have_counts_as_not_used() -> None:
    assert keys(SAVED | {"train": TRAIN | {"neftune_alpha": 0.0}}) == ([], [])
    found = compare(SAVED, SAVED | {"train": TRAIN | {"neftune_alpha": 5.0}})
    assert found.differences == [Difference("train.neftune_alpha", 0.0, 5.0)] and found.unknown == []
    assert found.refusal(PATH, ()) is not None and found.refusal(PATH, ["train.neftune_alpha"]) is None


def test_the_refusal_is_one_sentence_with_both_values_and_a_remedy() -> None:
    rates = compare(SAVED, SAVED | {"train": TRAIN | {"lr": 0.2, "eps": 1e-6}})
    assert rates.refusal(PATH, ()) == (
        f"{PATH} belongs to another run (train.lr: 0.1 there, 0.2 here; train.eps: 1e-08 there, 1e-06 here): resume "
        "with the configuration it was made with, take the new values with --change train.lr --change train.eps, or "
        "choose another output_dir"
    )
    assert "train.lr" not in str(rates.refusal(PATH, ["train.lr"]))
    other = compare(SAVED, SAVED | {"seed": 1, "train": TRAIN | {"lr": 0.2}}).refusal(PATH, ())
    assert other is not None and "--change" not in other and "train.seed: 0 there, 1 here" in other


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.precision", "is not possible, because one run would mix"),
        ("train.seed", "is not possible, because the order of the rows"),
        ("train.max_steps", "all steps of the run"),
        ("method.target_rank", "is not possible, because statistics and decisions"),
        ("data", "some would come twice"),
        ("model.path", "were trained on the old base model"),
        ("speed.compaction", "is not possible"),
        ("speed.packing", "is not needed"),
        ("train.micro_batch_size", "is not needed"),
        ("model.attn_implementation", "is not needed"),
        ("deepspeed", "is not needed"),
        ("lr", "names no key of a run file: did you mean 'train.lr'? allowed are train.lr, "),
        ("train.wieght_decay", "did you mean 'train.weight_decay'? allowed"),
        ("nonsense", "names no key of a run file: allowed are"),
    ],
)
def test_other_keys_cannot_be_changed(key: str, expected: str) -> None:
    (problem,) = change_problems([key], "auto")
    assert problem.startswith(f"--change {key} ") and expected in problem


def test_changes_belong_to_a_resume() -> None:
    assert change_problems(list(CHANGEABLE), "auto") == [] == change_problems([], "never")
    (problem,) = change_problems(["train.lr", "train.eps"], "never")
    assert problem.startswith("--change train.lr --change train.eps does nothing without --resume: add")


def test_every_changeable_key_is_one_of_the_run_file() -> None:
    assert {key.removeprefix("train.") for key in CHANGEABLE} < set(TrainConfig.model_fields)


def test_resolved_options_say_what_auto_stands_for() -> None:
    method = OPTIONS["increlora"]
    assert [getattr(method.resolved(n), "score_reduction", None) for n in (1, 2)] == ["exact", "mean"]
    assert all(options.resolved(2) is options for name, options in OPTIONS.items() if name != "increlora")
