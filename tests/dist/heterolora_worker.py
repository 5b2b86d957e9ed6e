"""HeteroLoRA inside an already started process group: searches, frozen modules, probes, interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine import checkpoint
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.heterolora.method import HeteroLoRA
from salient_ds.heterolora.probe import ProbeData, Prober
from salient_ds.models.loading import load_model
from salient_ds.run.adapt import adapt
from tests.dist import scenario
from tests.dist.resume_worker import IDENTITY
from tests.dist.scenario import Case, example

CPU = torch.device("cpu")
PROBES = 3  # not a multiple of two processes: one of them gets a filler
STEPS, STOP = 10, 6  # events before steps 1, 5 and 9; the checkpoint lies between the last two
PROXIES = ("grad_norm", "snip", "fisher", "synflow", "alpha_test")


def probe_batch(j: int) -> MicroBatch:
    tokens, labels = example(700 + j, j % 3)
    return MicroBatch({"input_ids": tokens, "labels": labels}, int((labels[:, 1:] != -100).sum()), (j,))


DATA = ProbeData(PROBES, probe_batch)


def build(case: Case, model: Path, world_size: int) -> AllocatingEngine:
    return scenario.build(case, model, world_size, probe_data=DATA)


def method_of(engine: AllocatingEngine) -> HeteroLoRA:
    assert isinstance(engine.method, HeteroLoRA)
    return engine.method


def run(global_rank: int, world_size: int, model: Path, cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """One cell per case: watched without dropout; with dropout whole, probed in between, and stopped and resumed."""
    found: dict[str, Any] = {}
    for key, case in cases.items():
        found[key] = {"watched": watched(global_rank, world_size, model, case)}
        if case.method["proxy"] == "constant" and case.stage != 1:
            noisy = replace(case, adapter=case.adapter | {"dropout": 0.3})
            found[key] |= interruptions(global_rank, world_size, model, noisy, folder / key)
    return found


def watched(global_rank: int, world_size: int, model: Path, case: Case) -> dict[str, Any]:
    """Train and look at every local shard after every step."""
    engine = build(case, model, world_size)
    method = method_of(engine)
    losses, digests, frozen, moved = [], [], [], []
    before = shards(engine)
    while engine.step < STEPS:
        report = engine.train_step(*scenario.batches(engine.step, global_rank, world_size))
        losses.append(report.loss)
        digests += [report.event.decision.digest()] if report.event else []
        after = shards(engine)
        for key, tensors in after.items():
            same = all(torch.equal(a, b) for a, b in zip(before.get(key, tensors), tensors, strict=True))
            (moved if method.rates.on_M[key[0]] else frozen).append(same)
        before = after
    result = {
        "losses": losses, "digests": digests, "frozen": frozen, "moved": moved, "history": list(method.history),
        "steps": list(method.rates.steps_M), "state": scenario.local_state(engine),
        "masks": [(bool(a.rank_mask_R.all()), bool(a.rank_mask_R.any())) for a in engine.adapted.adapters.values()],
    }  # fmt: skip
    prober = prober_of(engine)
    result["scores"] = {proxy: prober.score(proxy, DATA).score_M for proxy in PROXIES[:2]}
    engine.engine.destroy()
    return result


def shards(engine: AllocatingEngine) -> dict[Any, list[Tensor]]:
    """Master and both moments of everything owned here, by module and place; zeros before the first step."""
    found = {}
    for entry in scenario.local_state(engine)["fragments"]:
        master, part = entry["master"], entry["part"]
        moments = [entry.get(name, torch.zeros_like(master)) for name in ("exp_avg", "exp_avg_sq")]
        found[part.module, part.factor, part.lo] = [master, *moments]
    return found


def interruptions(global_rank: int, world_size: int, model: Path, case: Case, folder: Path) -> dict[str, Any]:
    torch.manual_seed(7 + global_rank)
    engine = build(case, model, world_size)
    losses = advance(engine, STOP, global_rank, world_size)
    checkpoint.save(engine.state, folder, IDENTITY, {}, keep=1)
    found = {"whole": finish(engine, losses, global_rank, world_size)}
    torch.manual_seed(7 + global_rank)
    found["probed"] = finish(*probed(build(case, model, world_size), global_rank, world_size), global_rank, world_size)
    engine = build(case, model, world_size)
    torch.manual_seed(999)
    checkpoint.load(engine.state, checkpoint.find_checkpoints(folder)[-1], IDENTITY)
    found["scores"] = scores_of(engine)
    found["resumed"] = finish(engine, losses, global_rank, world_size)
    return found


def prober_of(engine: AllocatingEngine) -> Prober:
    return Prober(engine.engine, engine.adapted, engine.shards, method_of(engine).probes, CPU)


def scores_of(engine: AllocatingEngine) -> dict[str, Tensor]:
    """By every proxy; the last one is slow, and one stage of it is enough."""
    several = PROXIES if engine.engine.zero_optimization_stage() == 2 else PROXIES[:-1]
    return {proxy: prober_of(engine).score(proxy, DATA).score_M for proxy in several}


def advance(engine: AllocatingEngine, until: int, global_rank: int, world_size: int) -> list[float]:
    return scenario.advance(engine, until, global_rank, world_size)[0]


def finish(engine: AllocatingEngine, losses: list[float], global_rank: int, world_size: int) -> dict[str, Any]:
    losses = losses + advance(engine, STEPS, global_rank, world_size)
    method = method_of(engine)
    result = {"losses": losses, "state": scenario.local_state(engine), "rng": torch.get_rng_state(),
              "history": list(method.history), "steps": list(method.rates.steps_M)}  # fmt: skip
    engine.engine.destroy()
    return result


def probed(engine: AllocatingEngine, global_rank: int, world_size: int) -> tuple[AllocatingEngine, list[float]]:
    """As far as the checkpoint, scoring by every proxy after step 2, and by gradients later."""
    losses: list[float] = []
    for until in range(2, STOP + 1, 2):
        losses += advance(engine, until, global_rank, world_size)
        if until == 2:
            scores_of(engine)
        else:
            prober_of(engine).score(PROXIES[0], DATA)
    return engine, losses


def faults(
    global_rank: int, world_size: int, model: Path, scored: Case, degenerate: Case, refusing: Case
) -> dict[str, Any]:
    """Probes that break on process 1; scores that cannot rank; the same when a fall-back is not wanted."""
    engine = build(scored, model, world_size)
    advance(engine, 3, global_rank, world_size)
    before = engine.decisions.latest
    spoilt = next(iter(engine.adapted.adapters.values()))
    factor = float("nan") if global_rank else 1.0
    # probes run in evaluation mode: training goes on undisturbed
    spoilt.register_forward_hook(lambda module, _, out: out * (1.0 if module.training else factor))
    losses = advance(engine, 7, global_rank, world_size)
    found: dict[str, Any] = {"kept": engine.decisions.latest is before, "losses": losses,
                             "history": list(method_of(engine).history)}  # fmt: skip
    engine.engine.destroy()
    engine = build(degenerate, model, world_size)
    advance(engine, 1, global_rank, world_size)
    found["fallback"] = method_of(engine).history[0]["proxy"]
    engine.engine.destroy()
    engine = build(refusing, model, world_size)
    try:
        advance(engine, 1, global_rank, world_size)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def everything(
    global_rank: int, world_size: int, model: Path, cases: dict[str, Case], folder: Path, broken: list[Case]
) -> dict[str, Any]:
    """Cells and faults in one process group."""
    found = run(global_rank, world_size, model, cases, folder)
    return found | {"faults": faults(global_rank, world_size, model, *broken)}


def alone(global_rank: int, world_size: int, model: Path, cases: list[Case], saved: Path) -> list[dict[str, Tensor]]:
    """Scores of a checkpoint on a single process, at several stages."""
    found = []
    for case in cases:
        engine = build(case, model, world_size)
        checkpoint.load(engine.state, checkpoint.find_checkpoints(saved)[-1], IDENTITY)
        found.append(scores_of(engine))
        engine.engine.destroy()
    return found


def plain_scores(case: Case, model_dir: Path, masters: dict[tuple[int, str], Tensor]) -> dict[str, Tensor]:
    """GRAD-NORM and SNIP of a model with these factors, all modules on, from plain gradients of the probe batches."""
    config = case.config(model_dir)
    adapted = adapt(load_model(config.model, config.train, {}), config, torch.float32)
    model: Any = adapted.model.eval()
    with torch.no_grad():
        for k, adapter in enumerate(adapted.adapters.values()):
            for factor, address in adapter.factors().items():
                address.parameter.copy_(masters[k, factor].view(address.shape))
    for j in range(PROBES):
        model(**probe_batch(j).inputs).loss.backward()
    norms, snips = [], []
    for adapter in adapted.adapters.values():
        pairs = [(a.parameter.detach().double(), a.parameter.grad.double()) for a in adapter.factors().values()]
        norms.append(sum(float(g.norm()) for _, g in pairs))
        snips.append(sum(float((p * g).abs().sum()) for p, g in pairs))
    return {"grad_norm": torch.tensor(norms, dtype=torch.float64), "snip": torch.tensor(snips, dtype=torch.float64)}
