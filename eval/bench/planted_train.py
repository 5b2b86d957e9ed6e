"""Train one student in plain torch: one process, fp32, no DeepSpeed.

The order within a step is that of :class:`salient_ds.engine.engine.AllocatingEngine`: optimizer step, pruned singular
values set back to zero, observation, decisions that waited for this step, then the event of the step.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salient_ds.adapters.inject import module_generator

from .plain_training import PlainTraining
from .planted_plan import Arm, ProblemSize, Regime, Training
from .planted_problem import Problem, held_out_loss, make_problem, update_error
from .planted_students import Student, build_student

KEPT_EVENTS = 20
"""At most this many events of a run are recorded, evenly spaced."""


class Diverged(RuntimeError):
    """The loss is no longer finite."""


def train(arm: Arm, size: ProblemSize, training: Training, regime: Regime, seed: int, lr: float) -> dict[str, Any]:
    """Train one student. The result is a pure function of the arguments (on one machine, with one thread).

    Returns:
        arm, regime, seed, lr, planted and recovered ranks per matrix, loss (held out, relative to the frozen
        network's), update_error, num_events, events and seconds. A run that diverged has ``error`` and the loss None
        instead.
    """
    began = time.perf_counter()
    problem = make_problem(size, regime, seed)
    student = build_student(arm, problem, size, training, seed)
    run = PlainTraining(student.adapted, student.method, student.optimizer(lr))
    result: dict[str, Any] = {"arm": arm.name, "regime": regime, "seed": seed, "lr": lr}
    try:
        steps(run, student, problem, training, seed)
    except (Diverged, ValueError) as error:  # methods raise ValueError if their statistics are not finite
        return result | {"error": str(error), "loss": None, "seconds": round(time.perf_counter() - began, 2)}
    run.finish()
    student.model.eval()
    live = run.ranks()
    events = run.taken[:: max(1, math.ceil(len(run.taken) / KEPT_EVENTS))]
    layout = student.adapted.layout
    return result | {
        "planted": list(problem.ranks.values()),
        "recovered": [live.get(name, 0) for name in problem.ranks],
        "loss": held_out_loss(student.model, problem),
        "update_error": update_error(student_updates(student, problem), problem),
        "num_events": len(run.taken),
        "events": [{"step": d.step, "budget": d.budget, "ranks": d.ranks(layout)} for d in events],
        "seconds": round(time.perf_counter() - began, 2),
    }


def steps(run: PlainTraining, student: Student, problem: Problem, training: Training, seed: int) -> None:
    """Run all training steps.

    Raises:
        Diverged: the loss is not finite.
        ValueError: a method's statistics are not finite.
    """
    penalty = student.adapted.penalty
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    draw = module_generator(seed, "batches")
    student.model.train()
    for step in range(1, training.steps + 1):
        rows_n = torch.randint(len(problem.inputs_nD), (training.batch,), generator=draw)
        if penalty is not None:
            penalty.arm(1.0, torch.device("cpu"))
        run.before_forward(step)
        loss = F.mse_loss(student.model(problem.inputs_nD[rows_n]), problem.targets_nD[rows_n]) / problem.base_error
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss of step {step} is {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        run.before_optimizer(step)
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * training.rates.rate(step)
        run.optimizer.step()
        run.after_optimizer(step, penalty.norms_M2 if penalty is not None else None)
        run.optimizer.zero_grad()


@torch.no_grad()
def student_updates(student: Student, problem: Problem) -> dict[str, Tensor]:
    """Dense update (O, I) of every matrix, from the adapter's outputs for unit inputs. Zero without an adapter."""
    found = {name: torch.zeros_like(update_OI) for name, update_OI in problem.updates.items()}
    for name, adapter in student.adapted.adapters.items():
        eye_II = torch.eye(adapter.in_features)
        found[name] = (adapter(eye_II) - adapter.base(eye_II)).T
    return found
