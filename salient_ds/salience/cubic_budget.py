"""The budget of AdaLoRA and LoRA^2: when ranks are removed and how many remain. No torch.

Numbers: N = initial sum of ranks, t_i / t_f = initial and final warm-up, T = all steps, dT = interval, b = budget.
Steps are applied optimizer steps, counted from 1; the released code's step s, counted from 0, is our step s + 1.
"""

from __future__ import annotations

from salient_ds.ranks import Event
from salient_ds.salience.budget import AllocationPlan, refuse_many


def budget_at(plan: AllocationPlan, step: int) -> int:
    """Allowed sum of ranks after ``step`` (1-based): N, then b_T + (N - b_T)(1 - progress)^3, then the target b_T.

    Progress runs from 0 to 1 over the steps t_i < s <= T - t_f of the released code (AdaLoRA, Zhang et al. 2023,
    section 3.3). The budget is rounded down, as there. Differs from the formula as printed in the paper (Eq. 14), which
    subtracts t_f in the numerator too, and so starts above N and ends above the target.
    """
    s, end = step - 1, plan.total_steps - plan.final_warmup
    if s <= plan.initial_warmup:
        return plan.initial_total
    if s > end:
        return plan.target_total
    left = 1 - (s - plan.initial_warmup) / plan.phase_steps
    return int(plan.target_total + (plan.initial_total - plan.target_total) * left**3)


def cubic_schedule(plan: AllocationPlan, interval: int) -> list[Event]:
    """Events at every multiple of ``interval`` inside the allocation phase, and a final one that leaves the target.

    In the final phase, the released code masks with frozen scores at every step. All these masks are the same. So here,
    the first of them is the last event, and its decision is held. The final event comes after the last step at the
    latest. Differs from the released code and PEFT, which never make the final cut if the final warm-up is below 2
    (PEFT: if it is 0).

    The window of an event covers the steps that its scores have seen: all steps so far, but none of the final phase.

    Returns:
        An empty list if the target is the initial total: the method is then LoRA in SVD form.

    Raises:
        ValueError: the target is below the initial total, and no step is left to get there.
    """
    if plan.target_total == plan.initial_total:
        return []
    if plan.phase_steps == 0:
        raise ValueError(
            f"no allocation phase: initial_warmup={plan.initial_warmup} + final_warmup={plan.final_warmup} takes all "
            f"of total_steps={plan.total_steps}, so that no step is left to go from {plan.initial_total} ranks to "
            f"{plan.target_total}: shorten a warm-up, or train longer"
        )
    end = plan.total_steps - plan.final_warmup
    first = (plan.initial_warmup // interval + 1) * interval
    regular = range(first, min(end, plan.total_steps - 1) + 1, interval)
    refuse_many(len(regular))
    final = end if end in regular else min(end + 1, plan.total_steps - 1)
    budgets = {s + 1: budget_at(plan, s + 1) for s in regular} | {final + 1: plan.target_total}
    return [Event(step, budget, 1, min(step, end)) for step, budget in budgets.items()]
