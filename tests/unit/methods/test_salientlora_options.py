"""Options of SalientLoRA that follow from each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from salient_ds.methods.salientlora.options import SalientLoRAConfig


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({}, "gate_fisher"),
        ({"window_initial": 5, "window_final": 30}, "gate_fisher"),
        ({"preset": "paper"}, "salience"),
        ({"preset": "reference"}, "salience"),
        ({"beta": 0.9}, "salience"),
        ({"lambda": 0.7}, "salience"),
        ({"loss_weights": "global"}, "salience"),
        ({"preset": "paper", "score": "gate_fisher"}, "gate_fisher"),
    ],
)
def test_the_score_follows_from_the_other_options_and_is_saved(options: dict[str, Any], score: str) -> None:
    config = SalientLoRAConfig.model_validate({"target_rank": 2} | options)
    assert config.score == score
    assert SalientLoRAConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_options_that_gate_fisher_does_not_read_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"score=gate_fisher does not read method\.gamma, method\.lambda: remove"):
        SalientLoRAConfig.model_validate({"target_rank": 2, "score": "gate_fisher", "lambda": 0.5, "gamma": 3})
