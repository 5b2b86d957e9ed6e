"""The loaded model has a row for everything that the data looks up, or training does not start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from salient_ds.run.fits import refuse_misfits
from tests.support.tiny_architectures import tiny_config


def inputs(train: list[int], held_out: list[int] | None = None, pad: int = 0) -> Any:
    """As much of the run's inputs as is looked at: one example per part."""
    rows = [[{"input_ids": np.array(part, np.int32)}] if part is not None else None for part in (train, held_out)]
    return SimpleNamespace(train=rows[0], held_out=rows[1], collator=SimpleNamespace(pad_token_id=pad), task=None)


@pytest.fixture(scope="module")
def opt() -> torch.nn.Module:
    """96 rows in the embedding, 64 positions."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("opt"))


def test_what_fits(opt: torch.nn.Module) -> None:
    refuse_misfits(opt, inputs([0, 95], [95]), 64)


@pytest.mark.parametrize(
    ("data", "max_length", "message"),
    [
        (
            inputs([3, 96]),
            64,
            "the training data holds token id 96, and model.decoder.embed_tokens of the model has 96 rows",
        ),
        (inputs([1], [99]), 64, "the held-out data holds token id 99"),
        (inputs([1], pad=96), 64, "padding holds token id 96"),
        (inputs([1]), 65, "data.max_length=65 is above what the model has positions for"),
    ],
)
def test_what_does_not(opt: torch.nn.Module, data: Any, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_misfits(opt, data, max_length)
