"""Name matching of target modules."""

from __future__ import annotations

import pytest

from salient_ds.adapters.options import LLAMA_MODULES
from salient_ds.adapters.targets import match_targets, select_modules

LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{leaf}" for i in range(11) for leaf in LEAVES]


def test_suffixes_match_whole_path_parts_in_model_order() -> None:
    chosen = select_modules(NAMES, ["down_proj", "self_attn.q_proj"])
    assert chosen == [n for n in NAMES if n.endswith(("q_proj", "down_proj"))]
    # "proj" is the end of many names but the whole last part of none
    with pytest.raises(ValueError, match="'proj' matches no linear layer"):
        select_modules(NAMES, ["proj"])
    assert select_modules(["q_proj", "x.my_q_proj"], ["q_proj"]) == ["q_proj"]


def test_one_name_as_a_plain_string() -> None:
    assert select_modules(NAMES, "mlp.gate_proj") == [n for n in NAMES if "gate" in n]


def test_regular_expressions_match_the_whole_path() -> None:
    assert select_modules(NAMES, r"re:model\.layers\.1\..*[qk]_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    with pytest.raises(ValueError, match="matches no linear layer"):
        select_modules(NAMES, "re:q_proj")  # would match by search
    with pytest.raises(ValueError, match="is not a regular expression"):
        select_modules(NAMES, "re:layers.(1")


def test_all_linear_takes_everything_given() -> None:
    assert select_modules(NAMES, "all-linear") == NAMES
    with pytest.raises(ValueError, match="no linear layer at all"):
        select_modules([], "all-linear")


def test_a_listed_name_that_matches_nothing_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ValueError) as caught:
        select_modules(NAMES, ["q_proj", "out_proj", "fc1"])
    message = str(caught.value)
    assert "'out_proj', 'fc1' matches no linear layer" in message
    assert "did you mean 'o_proj'?" in message
    assert "q_proj, k_proj, o_proj, gate_proj, down_proj" in message
    assert "first path: model.layers.0.self_attn.q_proj" in message


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(ValueError, match=r"layer0, .*layer11, \.\.\. \(40 in all\)"):
        select_modules([f"layer{i}" for i in range(40)], ["other"])


def test_shapes_travel_with_the_names() -> None:
    shapes = dict.fromkeys(NAMES, (4, 2))
    assert match_targets(shapes, ["k_proj"])[0] == ("model.layers.0.self_attn.k_proj", (4, 2))
    with pytest.raises(ValueError, match="up_proj"):
        match_targets(shapes, LLAMA_MODULES)
