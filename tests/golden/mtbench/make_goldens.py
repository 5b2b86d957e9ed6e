"""Write the golden files: FastChat 0.2.36's own functions on inputs.py and on our own questions.

    python tests/golden/mtbench/make_goldens.py [FOLDER]

README.md says what it needs. No judge is asked: its replies are in inputs.py.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import inputs
import numpy as np
import pandas as pd
import sklearn.linear_model
import sklearn.metrics
import statsmodels.formula.api
import tiktoken
from fastchat_setting import HERE, Setting, common, gen_judgment, show_result  # first: it makes FastChat importable

from fastchat.llm_judge import compute_agreement, gen_model_answer  # isort: skip
from fastchat.serve.monitor import elo_analysis  # isort: skip


class Maker(Setting):
    """Writes one group of golden files a method."""

    def constants(self) -> None:
        self.json("constants.json", {"temperatures": common.temperature_config, "with_reference": common.NEED_REF_CATS,
                                     "api_error_output": common.API_ERROR_OUTPUT})  # fmt: skip
        names = ("fschat", "pandas", "numpy", "scikit-learn", "statsmodels", "tiktoken")
        found = {name: importlib.metadata.version(name) for name in names}
        self.json("versions.json", {"python": platform.python_version(), **found})

    def parsing(self) -> None:
        """run_judge_single's rating and play_a_match_pair's winners for every reply."""
        match = self.matches("single", ["model-a"])[0]
        cases = []
        for text in inputs.RATING_REPLIES:
            try:
                rating = self.judge.play(match, text)["score"]
                cases.append({"judgment": text, "rating": rating, "rating_type": type(rating).__name__})
            except SyntaxError as error:
                cases.append({"judgment": text, "raises": f"SyntaxError: {error.msg}"})
        self.json("parse_single.json", cases)
        match = self.matches("all", ["model-a", "model-b"])[0]
        mapping = []
        for first, second in itertools.product(inputs.PAIR_REPLIES.values(), repeat=2):
            row = self.judge.play(match, first, second)
            mapping.append({"game1_reply": first, "game2_reply_swapped_order": second,
                            "g1_winner": row["g1_winner"], "g2_winner": row["g2_winner"]})  # fmt: skip
        self.json("pair_swap_mapping.json", mapping)

    def requests(self) -> None:
        """What the judge is asked, word by word, with cl100k's count of tokens; which placeholders are filled."""
        cases, encoding = [], tiktoken.get_encoding("cl100k_base")
        for kind, models in (("single", ["model-a"]), ("all", ["model-a", "model-b"])):
            for match in self.matches(kind, models):
                replies = ["Rating: [[5]]"] if kind == "single" else ["[[A]]", "[[B]]"]
                row = self.judge.play(match, *replies)
                asked = self.judge.requests
                names = ["request"] if kind == "single" else ["request_game1", "request_game2"]
                tokens = sum(len(encoding.encode(m["content"], disallowed_special=())) for m in asked[0]["messages"])
                cases.append({"kind": "single" if kind == "single" else "pair", "question_id": row["question_id"],
                              "turn": row["turn"], "judge": row["judge"], "keys": list(row), "tokens": tokens,
                              **dict(zip(names, asked, strict=True))})  # fmt: skip
        cases.sort(key=lambda case: case["question_id"])
        self.json("judge_requests.json", cases)
        self.json("placeholders.json", {prompt["name"]: prompt["prompt_template"].filled
                                        for prompt in self.prompts.values()})  # fmt: skip

    def match_lists(self) -> None:
        def shown(match: Any) -> list[Any]:
            models = match.model if isinstance(match, common.MatchSingle) else [match.model_1, match.model_2]
            return [match.question["question_id"], models, match.judge.prompt_template["name"],
                    1 + match.multi_turn, match.ref_answer is not None]  # fmt: skip

        models = list(inputs.MODELS)
        baseline, every = self.matches("baseline", models, "model-a"), self.matches("all", models)
        self.json("match_lists.json", {
            "single_1_model": [shown(m) for m in self.matches("single", ["model-a"])],
            "single_3_models_count": len(self.matches("single", models)),
            "baseline_3_models_count": len(baseline), "baseline": [shown(m) for m in baseline],
            "all_pairs_3_models_count": len(every), "all_pairs": [shown(m) for m in every],
        })  # fmt: skip

    def refusals(self) -> None:
        """check_data on sets that lack something."""
        judges = gen_judgment.make_judge_single(inputs.JUDGE, self.prompts)

        def check(lacking_answer: int | None = None, lacking_reference: int | None = None) -> str | None:
            answers = {q: a for q, a in self.answers["model-a"].items() if q != lacking_answer}
            references = {q: r for q, r in self.references[inputs.JUDGE].items() if q != lacking_reference}
            try:
                common.check_data(self.questions, {"model-a": answers}, {inputs.JUDGE: references}, ["model-a"], judges)
            except AssertionError as error:
                return str(error)
            return None

        numbers = [q["question_id"] for q in self.questions]
        self.json("check_data.json", {"answer": {n: check(lacking_answer=n) for n in numbers},
                                      "reference": {n: check(lacking_reference=n) for n in numbers}})  # fmt: skip

    def single(self) -> None:
        """A judge's records of three models, the same with an unfinished run, and show_result's tables."""
        replies, rows = inputs.single_replies(), []
        for match in self.matches("single", list(inputs.MODELS)):
            number, turn = match.question["question_id"], 1 + match.multi_turn
            row = self.judge.play(match, replies[match.model, number, turn])
            rows.append(row | {"user_prompt": f"what {match.model} was asked, {number}, turn {turn}"})
        self.lines("judgments_single.jsonl", rows)
        part = [row for row in rows if (row["model"], row["question_id"], row["turn"]) not in inputs.LACKING]
        self.lines("judgments_single_partial.jsonl", part)
        found = {}
        for name in ("judgments_single", "judgments_single_partial"):
            tables = self.shown(show_result.display_result_single, f"{name}.jsonl", bench_name="mt_bench")
            found[name] = {"tables": dict(zip(("first_turn", "second_turn", "average"), tables, strict=True))}
        self.json("show_result_single.json", found)
        table = pd.DataFrame(rows)[["question_id", "model", "score", "turn"]]
        table = table[table["score"] != -1].reset_index(drop=True)  # display_result_single's filter
        table["category"] = table["question_id"].map({q["question_id"]: q["category"] for q in self.questions})
        by_category = {
            f"by_{'_'.join(keys)}": table.groupby(keys)["score"].mean().reset_index().to_dict("records")
            for keys in (["model", "category"], ["model", "category", "turn"])
        }
        self.json("per_category_means.json", by_category)
        self.errors = {model: _errors(part) for model, part in table.groupby("model")}

    def pair(self) -> None:
        """A judge's records of all pairs, show_result's tables, the truth table and Bradley-Terry ratings."""
        found = {
            (m.question["question_id"], m.model_1, m.model_2, 1 + m.multi_turn): m
            for models in (list(inputs.MODELS), list(inputs.MODELS)[::-1])
            for m in self.matches("all", models)
        }
        words = inputs.PAIR_REPLIES
        first = {"model_1": words["A"], "model_2": words["B"], "tie": words["tie"], "error": words["error"]}
        second = first | {"model_1": words["B"], "model_2": words["A"]}
        rows = []
        for number, one, two, turn, g1, g2 in inputs.pair_games():
            row = self.judge.play(found[number, one, two, turn], first[g1], second[g2])
            assert (row["g1_winner"], row["g2_winner"]) == (g1, g2)
            asked = {f"g{n}_user_prompt": f"what game {n} asked, {number}, turn {turn}" for n in (1, 2)}
            rows.append(row | asked)
        self.lines("judgments_pair.jsonl", rows)
        cases = [(f"pairwise-baseline({m})", m, None) for m in inputs.MODELS]
        cases += [("pairwise-all", None, None), ("pairwise-all(model_list=model-a)", None, ["model-a"])]
        tables = {}
        for case, baseline, models in cases:
            (table,) = self.shown(
                show_result.display_result_pairwise, "judgments_pair.jsonl", baseline_model=baseline, model_list=models
            )
            tables[case] = {"baseline_model": baseline, "model_list": models, "table": table}
        self.json("show_result_pair.json", tables)
        self.json("pair_truth_table.json", [self.truth(*games) for games in itertools.product(inputs.GAMES, repeat=2)])
        self.json("bradley_terry.json", self.ratings(rows))

    def truth(self, g1: str, g2: str) -> dict[str, Any]:
        """One match of "aa" and "bb": what show_result counts and load_pairwise_model_judgments says."""
        row = {"question_id": 1, "model_1": "aa", "model_2": "bb", "g1_winner": g1, "g2_winner": g2,
               "judge": ["j", "p"], "g1_judgment": "", "g2_judgment": "", "turn": 1}  # fmt: skip
        with self.scratch([row]) as name:
            try:
                (table,) = self.shown(show_result.display_result_pairwise, name)
                counted: Any = {r["model"]: [r["win"], r["loss"], r["tie"]] for r in table}
            except KeyError as error:
                counted = f"KeyError: {error}"
            (game,) = common.load_pairwise_model_judgments(str(self.folder / name))["j", "p"].values()
        return {"g1_winner": g1, "g2_winner": g2, "show_result_win_loss_tie": counted,
                "load_pairwise_winner": game["winners"][0]}  # fmt: skip

    def ratings(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """compute_elo_mle_with_tie as it is, and with the L2 penalty of its logistic regression left out."""
        names = {"model_1": "model_a", "model_2": "model_b"}
        rows = [row for row in rows if "error" not in (row["g1_winner"], row["g2_winner"])]
        battles = pd.DataFrame(
            {"model_a": row["model_1"], "model_b": row["model_2"],
             "winner": names.get(row["g1_winner"], "tie") if row["g1_winner"] == row["g2_winner"] else "tie"}
            for row in rows
        )  # fmt: skip
        plain = sklearn.linear_model.LogisticRegression

        def unpenalised(**options: Any) -> Any:
            return plain(**options, C=np.inf, tol=1e-12, max_iter=10_000)

        as_it_is = elo_analysis.compute_elo_mle_with_tie(battles).to_dict()
        with mock.patch.object(sklearn.linear_model, "LogisticRegression", unpenalised):
            without = elo_analysis.compute_elo_mle_with_tie(battles).to_dict()
        head_to_head = {}
        for one, two in itertools.combinations(inputs.MODELS, 2):
            both = [row for row in rows if {row["model_1"], row["model_2"]} == {one, two}]
            with self.scratch(both) as name:
                ((counts,),) = self.shown(show_result.display_result_pairwise, name, baseline_model=two)
            head_to_head[f"{one} vs {two}"] = counts
        return {"n_battles": len(battles), "without_penalty": {"ratings": without},
                "fastchat_0_2_36_compute_elo_mle_with_tie": {"ratings": as_it_is},
                "head_to_head": head_to_head}  # fmt: skip

    def agreement(self) -> None:
        judge, people = inputs.votes()
        self.json("votes_gpt4_pair.json", judge)
        self.json("votes_human.json", people)
        found, kappas = {}, {}
        for name, judges, kinds in (("gpt4-pair vs human", ("gpt4-pair", "human"), [judge, people]),
                                    ("human vs human", ("human", "human"), [people])):  # fmt: skip
            data = compute_agreement.get_mt_bench_votes_data(kinds)
            found[name] = {"counts": {
                f"turn{turn}_{key}": compute_agreement.get_mt_bench_agreement(data[turn - 1], *judges, ban=ban)
                for turn in inputs.TURNS for key, ban in (("with_tie", []), ("no_tie", ["tie"]))
            }}  # fmt: skip
            kappas[name] = {f"turn{turn}": _kappa(data[turn - 1], *judges) for turn in inputs.TURNS}
        self.json("compute_agreement.json", found)
        self.json("stats_reference.json", {"standard_errors": self.errors, "cohen_kappa": kappas})

    def reorganised(self) -> None:
        self.lines("answers_unsorted.jsonl", inputs.answers_unsorted())
        done = self.folder / "answers_reorg_expected.jsonl"
        shutil.copyfile(self.folder / "answers_unsorted.jsonl", done)
        gen_model_answer.reorg_answer_file(str(done))


def _errors(table: pd.DataFrame) -> dict[str, float]:
    """Standard errors of the mean by statsmodels: as if answers were independent, and clustered by question."""
    model = statsmodels.formula.api.ols("score ~ 1", table)

    def clustered(corrected: bool) -> float:
        fit = model.fit(
            cov_type="cluster", cov_kwds={"groups": table["question_id"].to_numpy(), "use_correction": corrected}
        )
        return float(fit.bse["Intercept"])

    return {"naive": float(model.fit().bse["Intercept"]), "clustered": clustered(True),
            "clustered_uncorrected": clustered(False)}  # fmt: skip


def _kappa(data: dict[Any, Any], first: str, second: str) -> float:
    """Cohen's kappa by scikit-learn over the pairs of votes that FastChat compares; within a group in both orders."""
    pairs: list[tuple[str, str]] = []
    for given in data.values():
        mine, theirs = given.get(first, []), given.get(second, [])
        pairs += itertools.permutations(mine, 2) if first == second else itertools.product(mine, theirs)
    table = [[compute_agreement.convertvote(vote) for vote in side] for side in zip(*pairs, strict=True)]
    return float(sklearn.metrics.cohen_kappa_score(*table))


def main() -> None:
    found = importlib.metadata.version("fschat")
    if found != "0.2.36":
        raise SystemExit(f"fschat is {found}; these goldens are those of 0.2.36: pip install fschat==0.2.36")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    folder.mkdir(parents=True, exist_ok=True)
    maker = Maker(folder)
    for step in (maker.constants, maker.parsing, maker.requests, maker.match_lists, maker.refusals, maker.single,
                 maker.pair, maker.agreement, maker.reorganised):  # fmt: skip
        step()


if __name__ == "__main__":
    main()
