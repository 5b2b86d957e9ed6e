"""HeteroLoRA's selections and whole searches reproduce the released code (see hetero/README.md)."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from salient_ds.heterolora import proxies
from salient_ds.heterolora.module_select import Candidates, KeptShare, select_modules_on, top_k
from salient_ds.heterolora.shortcut import KINDS
from tests.golden.hetero_model import PROJECTIONS, by_short_name, group, our_name, read_json, switch, tiny_opt
from tests.golden.hetero_scores import RELATIVE, Batch, assert_scores, flat, scores, stub_batches


def candidates(linear: list[str], shortcuts: list[str]) -> Candidates:
    marks = (False,) * len(linear) + (True,) * len(shortcuts)
    return Candidates((*linear, *shortcuts), marks, (1,) * len(marks))


def selection_cases() -> list[Any]:
    return [pytest.param(c, id=f"{c['name']}-{c['mode']}-{c['turn_on_percentile']}-{c['generator_seed']}")
            for c in read_json("selection")["cases"]]  # fmt: skip


@pytest.mark.parametrize("case", selection_cases())
def test_selection(case: dict[str, Any]) -> None:
    """Two events on end with one generator; budgets of 0 and NaN are refused (there: a crash, and NaN wins)."""
    linear, shortcut = flat(case["lora_scores"]), flat(case["shortcut_scores"])
    space = candidates(list(linear), list(shortcut))
    score_M = torch.tensor([*linear.values(), *shortcut.values()], dtype=torch.float64)
    share = KeptShare(case["turn_on_percentile"], case["mode"])
    generator = torch.Generator().manual_seed(case["generator_seed"])
    if case["name"] in ("nan", "budget_zero"):
        with pytest.raises(ValueError, match="not a number" if case["name"] == "nan" else "less than one module"):
            select_modules_on(score_M, space, share, generator)
        return
    for event, count in zip(case["events"], case["n_on"], strict=True):
        choice = select_modules_on(score_M, space, share, generator)
        ranked = [n for n, on in zip(space.names, choice.mask_M.tolist(), strict=True)
                  if on and (case["mode"] != "off" or n in linear)]  # fmt: skip
        assert sorted(ranked) == sorted(f"{layer}.{name}" for layer, name in event)
        assert choice.spent == choice.budget == count


def test_random_permutations() -> None:
    """The draws that ties depend on: three in a row from one generator, for six lengths and three seeds."""
    compared = 0
    for seed, lengths in read_json("randperm").items():
        for count, expected in lengths.items():
            generator = torch.Generator().manual_seed(int(seed))
            for permutation in expected:
                assert torch.randperm(int(count), generator=generator).tolist() == permutation
                compared += 1
            generator.manual_seed(int(seed))
            mask = top_k(torch.ones(int(count), dtype=torch.float64), 4, generator)
            assert mask.nonzero().flatten().tolist() == sorted(expected[0][:4])
    assert compared == 3 * 6 * 3


RUNS = {
    "grad_norm_combined": ("grad_norm", "combined"),
    "grad_norm_separated": ("grad_norm", "separated"),
    "grad_norm_lora_only": ("grad_norm", "off"),
    "constant_lora_only": ("constant", "off"),
    "snip_lora_only": ("snip", "off"),
    "synflow_lora_only": ("synflow", "off"),
}


class Search:
    """The released training loop in plain torch: an event every N steps; AdamW passes over modules that are off."""

    def __init__(self, name: str) -> None:
        self.golden, self.settings = read_json("dynamic_runs")["runs"][name], read_json("dynamic_runs")["settings"]
        self.proxy, self.mode = RUNS[name]
        self.adapted = tiny_opt(group("dynamic_runs", name, "w0"), shortcuts="lora_only" not in name)
        self.adapters = by_short_name(self.adapted)
        model: Any = self.adapted.model
        model.score.weight.requires_grad_()
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(self.settings["generator_seed_for_ties"])
        shortcuts = [n for n in self.adapters if n.split(".")[1] in KINDS]
        self.space = candidates([n for n in self.adapters if n not in shortcuts], shortcuts)
        self.on = dict.fromkeys(self.adapters, True)

    def event(self) -> dict[str, float]:
        found = scores(self.adapted, self.proxy, stub_batches()[: self.settings["limit_test_batches"]])
        score_M = torch.tensor(list(found.values()), dtype=torch.float64)
        share = KeptShare(self.settings["turn_on_percentile"], self.mode)
        choice = select_modules_on(score_M, self.space, share, self.generator)
        self.on = dict(zip(self.adapters, choice.mask_M.tolist(), strict=True))
        switch(self.adapted, self.on)
        return found

    def step(self, batch: Batch) -> float:
        loss = self.adapted.model(**batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        for name, adapter in self.adapters.items():
            for address in adapter.factors().values():
                if not self.on[name]:
                    assert address.parameter.grad is not None
                    assert not address.parameter.grad.any()
                    address.parameter.grad = None
        self.optimizer.step()
        return loss.item()


@pytest.mark.parametrize("name", RUNS)
def test_whole_search(name: str) -> None:
    """Two epochs: all losses, scores and decisions, and at the end weights, moments and step counts."""
    search = Search(name)
    events, losses = iter(search.golden["events"]), iter(search.golden["losses"])
    for _ in range(search.settings["epochs"]):
        for i, batch in enumerate(stub_batches()):
            if i % search.golden["N"] == 0:
                expected = next(events)
                entries = {f"{layer}.{module}": (score, on) for layer, module, score, on in expected["entries"]}
                assert expected["step"] == i
                found = search.event()
                assert_scores(found, {n: score for n, (score, _) in entries.items()})
                assert {n: search.on[n] for n in entries} == {n: on for n, (_, on) in entries.items()}
            assert math.isclose(search.step(batch), next(losses), rel_tol=RELATIVE)
    assert next(events, None) is next(losses, None) is None
    final = {our_name(n): value for n, value in group("dynamic_runs", name, "w1").items()}
    assert final.keys() == search.trained.keys()
    for key, value in final.items():
        torch.testing.assert_close(search.trained[key].detach(), value, rtol=1e-8, atol=1e-12)
    counts = {our_name(n): count for n, count in search.golden["adamw_steps"].items()}
    state = search.optimizer.state
    assert {n: float(state[p]["step"]) if state[p] else 0.0 for n, p in search.trained.items()} == counts
    if name == "grad_norm_combined":
        for letter, key in (("m1", "exp_avg"), ("m2", "exp_avg_sq")):
            for n, value in group("dynamic_runs", name, letter).items():
                torch.testing.assert_close(state[search.trained[our_name(n)]][key], value, rtol=1e-8, atol=1e-15)


def test_what_locks_in_is_noticed() -> None:
    """SNIP's first event is a draw, and its later ones repeat it (golden runs): our verdict refuses both."""
    events = read_json("dynamic_runs")["runs"]["snip_lora_only"]["events"]
    sets = [{(layer, name) for layer, name, _, on in e["entries"] if on} for e in events]
    assert all(s == sets[0] for s in sets)
    first, second = (torch.tensor([score for _, _, score, _ in e["entries"]]) for e in events[:2])
    names = [f"{layer}.{name}" for layer, name, _, _ in events[0]["entries"]]
    assert proxies.check_scores("snip", names, first).kind == "degenerate"
    assert proxies.check_scores("snip", names, second, second > 0).kind == "locked_in"
    assert proxies.check_scores("snip", names, second, torch.ones(len(names), dtype=torch.bool)).kind == "ok"


def recorded(name: str) -> Path:
    """A file of recorded runs, not ours to copy, in the folder that SALIENT_SHARED names; the test fails without it."""
    folder = os.environ.get("SALIENT_SHARED")
    if not folder:
        pytest.fail(f"SALIENT_SHARED is not set: a test marked outside needs it, to read golden/hetero/{name} there",
                    pytrace=False)  # fmt: skip
    path = Path(folder) / "golden" / "hetero" / name
    if not path.is_file():
        pytest.fail(f"SALIENT_SHARED={folder} holds no file golden/hetero/{name}, which a test marked outside reads",
                    pytrace=False)  # fmt: skip
    return path


def consistent(score_M: Tensor, on_M: Tensor, budget: int) -> bool:
    """Whether top-k with some draw among ties gives this set."""
    mask_M = top_k(score_M, budget, torch.Generator())
    cut = score_M[mask_M].min()
    return int(on_M.sum()) == budget and bool(on_M[score_M > cut].all()) and not bool(on_M[score_M < cut].any())


@pytest.mark.outside
def test_recorded_events() -> None:
    """The authors' own dynamic runs (863 events without NaN)."""
    with np.load(recorded("recorded_histories.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    checked = 0
    for prefix in sorted(key.removesuffix("scores") for key in arrays if key.endswith("scores")):
        names = [str(n) for n in arrays[f"{prefix}names"]]
        shortcut_M = torch.tensor([any(kind in n for kind in KINDS) for n in names])
        mode: Any = "separated" if "separated" in prefix else ("combined" if shortcut_M.any() else "off")
        share = KeptShare(0.33 if "llama" in prefix else 0.25, mode)
        bL = math.floor(share.share * int((~shortcut_M).sum()))
        bS = round(share.share * int(shortcut_M.sum()))
        for score_row, on_row in zip(arrays[f"{prefix}scores"], arrays[f"{prefix}on"], strict=True):
            score_M, on_M = torch.from_numpy(score_row).double(), torch.from_numpy(on_row).bool()
            if score_M.isnan().any():
                continue
            if mode == "combined":
                assert consistent(score_M, on_M, bL + bS), prefix
            else:
                assert consistent(score_M[~shortcut_M], on_M[~shortcut_M], bL), prefix
            if mode == "separated":
                assert consistent(score_M[shortcut_M], on_M[shortcut_M], bS), prefix
            checked += 1
    assert checked == 863


@pytest.mark.outside
def test_recorded_static_searches() -> None:
    """The authors' static scores on MRPC lead to the sets that they trained."""
    golden = json.loads(recorded("recorded_static.json").read_text())
    tables = {re.sub(r"_\d+-\d+", "", source)[:-5].replace("_", "-"): t for source, t in golden["scores"].items()}
    checked = 0
    for name, entries in golden["resulting_modules"].items():
        if not name.startswith("mrpc-"):
            continue  # of these the scores are not recorded
        table = tables[name.removeprefix("mrpc-").removesuffix("-04-01-version_0.toml")]
        scored = {n: float(v) for n, v in flat(table).items() if n.rpartition(".")[2] in PROJECTIONS}
        chosen = {entry.split(":")[0] for entry in entries}
        assert chosen <= scored.keys()
        score_M = torch.tensor(list(scored.values()), dtype=torch.float64)
        assert consistent(score_M, torch.tensor([n in chosen for n in scored]), math.floor(0.25 * len(scored))), name
        checked += 1
    assert checked == 15
