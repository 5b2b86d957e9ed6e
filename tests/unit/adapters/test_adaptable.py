"""What ``adapter.target_modules`` means in a model with towers, fused experts and layers that no adapter can wrap."""

from __future__ import annotations

import json

import pytest

from salient_ds.adapters.adaptable import Adaptable, FusedExperts

TEXT = [f"model.language_model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
SHARED = "model.language_model.layers.1.mlp.shared_expert.gate_proj"
VISION = [f"model.vision_tower.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.fc1")]
ROUTER = "model.language_model.layers.0.mlp.router"
EXPERTS = FusedExperts(
    parameters=tuple(
        f"model.language_model.layers.{i}.mlp.experts.{n}" for i in (0, 1, 10) for n in ("gate_up", "down")
    ),
    experts=4,
    axes=3,
    names=("gate_up_proj", "gate_proj", "down_proj", "w1"),
)
MODEL = Adaptable(
    linears=dict.fromkeys([*VISION, *TEXT, SHARED], (4, 4)),
    towers=("model.vision_tower", "model.audio_tower"),
    experts=EXPERTS,
    unfit={ROUTER: "it returns two tensors"},
)


def error_of(wanted: str | list[str], model: Adaptable = MODEL) -> str:
    with pytest.raises(ValueError) as caught:
        model.select(wanted)
    return str(caught.value)


def test_bare_names_and_all_linear_mean_the_language_model() -> None:
    assert MODEL.select("all-linear") == [*TEXT, SHARED]
    assert MODEL.select(["q_proj"]) == [name for name in TEXT if name.endswith("q_proj")]
    assert MODEL.select("q_proj") == MODEL.select(["q_proj"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([VISION[0]], [VISION[0]]),
        (["vision_tower.layers.1.mlp.fc1", "up_proj"], [VISION[3], TEXT[1], TEXT[3]]),
        (r"re:model\.vision_tower\..*q_proj", [VISION[0], VISION[2]]),
        (r"re:.*(vision_tower|language_model).*q_proj", [VISION[0], VISION[2], TEXT[0], TEXT[2]]),
        (r"re:.*q_proj", [TEXT[0], TEXT[2]]),
    ],
)
def test_towers_are_adapted_only_if_they_are_named(wanted: str | list[str], expected: list[str]) -> None:
    assert MODEL.select(wanted) == expected


def test_what_is_left_out_of_a_tower_is_said() -> None:
    experts, towers, unfit = MODEL.notes("all-linear")
    assert towers.startswith(f"4 linear layers, such as {VISION[0]}, are left out, in model.vision_tower: ")
    assert towers.endswith("gives full paths or a pattern with 'vision_tower'") and "audio_tower" not in towers
    assert unfit == f"{ROUTER} is left out: it returns two tensors"
    assert experts == EXPERTS.sentence
    assert MODEL.notes(["up_proj"]) == [EXPERTS.sentence]
    assert len(MODEL.notes(["q_proj"])) == 2


def test_the_sentence_about_experts() -> None:
    assert EXPERTS.sentence.startswith(
        "the experts are fused 3-D parameters (model.language_model.layers.0.mlp.experts.gate_up and 1 more per layer, "
        "4 experts, 3 layers) and are not adapted: "
    )
    single = FusedExperts(("layers.0.w",), experts=0, axes=2, names=())
    assert "2-D parameters (layers.0.w, 1 layer)" in single.sentence


def test_names_that_mean_experts_only() -> None:
    message = error_of(["q_proj", "w1", "down_proj"])
    assert message.startswith(
        "adapter.target_modules: 'w1', 'down_proj': only experts are called that, and the experts"
    )
    assert message.endswith("leave such names out") and "did you mean" not in message
    both = error_of(["w1", "q_prj"])
    assert (
        "'w1': only experts" in both and "'q_prj' matches no linear layer of the model, did you mean 'q_proj'?" in both
    )
    assert EXPERTS.sentence in error_of("re:.*experts.*")


def test_names_of_experts_that_match_layers_beside_them() -> None:
    (note,) = MODEL.notes(["gate_proj"])
    assert note == f"{EXPERTS.sentence}; 'gate_proj' match shared experts and dense layers only, such as {SHARED}"


def test_names_in_towers_or_of_unfit_layers_come_with_the_reason() -> None:
    message = error_of(["fc1"])
    assert (
        "'fc1': layers of that name are in model.vision_tower only" in message
        and "pattern with 'vision_tower'" in message
    )
    assert "are in model.vision_tower only" in error_of("re:.*fc1")
    assert f"'router': {ROUTER} cannot be adapted (it returns two tensors), leave it out" in error_of(["router"])


def test_plain_errors_stay() -> None:
    plain = Adaptable(dict.fromkeys(TEXT, (4, 4)))
    assert error_of(["out_proj"], plain) == (
        "adapter.target_modules: 'out_proj' matches no linear layer of the model, did you mean 'up_proj'?; linear "
        f"layers there are called q_proj, up_proj (first path: {TEXT[0]})"
    )
    assert "no linear layer at all" in error_of("all-linear", Adaptable({}))
    assert "is not a regular expression" in error_of("re:(", MODEL)
    assert plain.notes("all-linear") == []


@pytest.mark.parametrize("model", [MODEL, Adaptable({"a": (1, 2)})])
def test_json(model: Adaptable) -> None:
    assert Adaptable.from_json(json.loads(json.dumps(model.to_json()))) == model
