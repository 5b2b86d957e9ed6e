"""Metrics on stored predictions, equal to what other implementations gave for them (their versions are in the file)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data.tasks import metrics
from salient_ds.data.tasks.metrics import classification_scores, missing_libraries, regression_scores
from salient_ds.data.tasks.rouge import rouge_scores, sentences
from salient_ds.data.tasks.squad_metrics import best_thresholds, normalised, squad_scores

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "stored_predictions.json").read_text(encoding="utf-8"))
SINGLE = 1e-6
"""torchmetrics computes in single precision."""


@pytest.mark.parametrize("name", ["two_labels", "three_labels"])
def test_labels_score_as_torchmetrics_says(name: str) -> None:
    case = STORED[name]
    found = classification_scores(case["predicted"], case["wanted"], list(case["torchmetrics"]))
    assert found == pytest.approx(case["torchmetrics"], rel=SINGLE)


def test_labels_by_hand() -> None:
    found = classification_scores([1, 1, 0, 0], [1, 0, 0, 0], ["accuracy", "f1", "f1_macro", "matthews"])
    assert found == pytest.approx(
        {"accuracy": 3 / 4, "f1": 2 / 3, "f1_macro": (2 / 3 + 4 / 5) / 2, "matthews": 2 / math.sqrt(2 * 2 * 1 * 3)}
    )
    assert classification_scores([0, 0], [1, 0], ["f1", "matthews"]) == {"f1": 0.0, "matthews": 0.0}


def test_numbers_score_as_torchmetrics_says() -> None:
    case = STORED["numbers"]
    wanted = case["torchmetrics"]
    found = regression_scores(case["predicted"], case["wanted"], [*wanted, "correlation"])
    assert found.pop("correlation") == (found["pearson"] + found["spearman"]) / 2
    assert found == pytest.approx(wanted, rel=SINGLE)


@pytest.mark.filterwarnings("error")
def test_correlations_of_constants_are_undefined() -> None:
    found = regression_scores([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], ["pearson", "spearman", "correlation", "mse"])
    assert all(math.isnan(found[name]) for name in ("pearson", "spearman", "correlation"))
    assert found["mse"] == pytest.approx(2 / 3)
    assert math.isnan(regression_scores([2.0], [1.0], ["pearson"])["pearson"])


def test_answers_score_as_torchmetrics_says() -> None:
    case = STORED["squad_v1"]
    rows = case["rows"]
    found = squad_scores([r["prediction"] for r in rows], [r["answers"] for r in rows], ["exact_match", "f1"], False)
    assert found == pytest.approx(case["torchmetrics"], rel=SINGLE)


def test_answers_score_as_the_official_rules_of_version_2_to_the_last_digit() -> None:
    case = STORED["squad_v2"]
    rows, wanted = case["rows"], case["transformers"]
    found = squad_scores([r["prediction"] for r in rows], [r["answers"] for r in rows], ["exact_match", "f1"], True)
    names = {"exact_match": "exact", "f1": "f1", "has_answer_exact_match": "HasAns_exact", "has_answer_f1": "HasAns_f1",
             "no_answer_exact_match": "NoAns_exact", "no_answer_f1": "NoAns_f1"}  # fmt: skip
    assert found == {ours: wanted[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_that_of_trying_all(seed: int) -> None:
    draw = random.Random(seed)
    words = ("Elbe", "the Rhine", "Oder", "an Elbe river")
    wanted = [[draw.choice(words)] if draw.random() < 0.6 else [] for _ in range(40)]
    spans = [draw.choice(words) if draw.random() < 0.9 else None for _ in range(40)]
    odds = [float(draw.randrange(-8, 8)) for _ in range(40)]  # many are equal
    found = best_thresholds(spans, odds, wanted, ["f1", "exact_match"])

    def at(threshold: float, metric: str) -> float:
        texts = [
            span if span is not None and value <= threshold else "" for span, value in zip(spans, odds, strict=True)
        ]
        return squad_scores(texts, wanted, [metric], True)[metric]

    for metric in ("f1", "exact_match"):
        every = [at(threshold, metric) for threshold in (-99.0, *odds)]
        assert found[f"best_{metric}"] == pytest.approx(max(every))
        assert at(found[f"best_{metric}_threshold"], metric) == pytest.approx(max(every))


def test_without_any_right_answer_the_best_threshold_answers_nothing() -> None:
    found = best_thresholds(["Elbe", "Oder"], [-3.0, 2.0], [[], []], ["f1"])
    assert found["best_f1"] == 100.0 and found["best_f1_threshold"] < -3.0


def test_a_text_without_words_matches_in_version_2_alone() -> None:
    """As the two official scripts have it: v1.1 counts common words, of which there are none."""
    assert squad_scores(["the"], [["an"]], ["f1", "exact_match"], False) == {"f1": 0.0, "exact_match": 100.0}
    assert squad_scores(["the", ""], [["an"], []], ["f1"], True)["f1"] == 100.0
    assert squad_scores(["Elbe", "the Elbe"], [[], ["Elbe", "Rhine"]], ["f1"], True) == {
        "f1": 50.0, "has_answer_f1": 100.0, "no_answer_f1": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Elbe.", "elbe"),
        ("an A-the\tthe", "athe"),
        ("Café, naïve", "café naïve"),
        ("the", ""),
        ("theatre", "theatre"),
    ],
)
def test_answers_are_compared_in_normal_form(text: str, form: str) -> None:
    assert normalised(text) == form


def test_rouge_is_that_of_rouge_score_to_the_last_digit() -> None:
    case = STORED["summaries"]
    found = rouge_scores(
        [r["prediction"] for r in case["rows"]], [r["target"] for r in case["rows"]], list(case["rouge_score"])
    )
    assert found == case["rouge_score"]


def test_sentences_are_put_on_lines() -> None:
    assert sentences(" One. Two!  Three? four \n\n Five v. six") == "One.\nTwo!\nThree?\nfour\nFive v.\nsix"
    assert sentences("") == ""


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_libraries({**metrics.CLASSIFICATION, **metrics.SUMMARIES}) == []
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    (problem,) = missing_libraries({"rouge1": metrics.SUMMARIES["rouge1"]})
    assert problem == ("the metrics rouge1 need rouge-score, which is not installed: pip install 'salient-ds[tasks]'")
    assert missing_libraries(metrics.ANSWERS) == []
    with pytest.raises(ValueError, match="scikit-learn, which is not installed"):
        classification_scores([1], [1], ["accuracy"])
