"""The run file that ``salient-ds init`` writes, with a comment on every choice. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from salient_ds.adapters.presets import PREFIX, PRESETS
from salient_ds.check.fit import Choice
from salient_ds.check.memory import GIB
from salient_ds.guide.answers import Answers, short_name
from salient_ds.guide.schema import language_server_line
from salient_ds.methods.table import methods


@dataclass(frozen=True)
class Plan:
    """What was chosen for the answers."""

    zero: str
    """Name of the DeepSpeed JSON without its ending."""
    template: str
    max_length: int
    max_length_why: str
    held_out: int
    """Rows that are held out; 0: none."""
    global_batch_size: int
    choice: Choice | None
    """None if nothing is known about memory."""
    epochs: float = 3
    eval_every: int = 100
    matrices: int | None = None
    """Adapted matrices; None: not known."""
    steps: int | None = None
    """Optimizer steps of the run; None: not known."""


def target_modules(model_type: str | None) -> str:
    """``adapter.target_modules`` for a family of models."""
    kind = (model_type or "").removesuffix("_text")
    for name in (kind, kind.rstrip("0123456789_")):
        if name in PRESETS:
            return f"{PREFIX}{name}"
    return "all-linear"


def run_text(answers: Answers, plan: Plan, modules: str) -> str:
    """The whole file."""
    name = f"{short_name(answers.model)}-{answers.method}"
    where = f"{answers.gpus} GPU{'s' if answers.gpus > 1 else ''}" if answers.gpus else "one CPU process"
    command = f"salient-ds train FILE --gpus {answers.gpus}" if answers.gpus else "salient-ds train FILE --gpus 1"
    method = _method(answers, plan)
    grows = methods()[answers.method].grows
    train = _train(answers, plan)
    return f"""{language_server_line()}
# Written by `salient-ds init` for {where}. `salient-ds check` looks at it, `salient-ds options` explains every key.
# Start it: {command}
output_dir: {json.dumps(f"runs/{name}")}
deepspeed: {plan.zero}.json  # a plain DeepSpeed JSON beside this file

model:
  path: {json.dumps(answers.model)}

adapter:
  target_modules: {modules}  # which layers
  rank: {answers.rank}  # {"the most that a matrix may grow to" if grows else "at the start, of every matrix"}
  alpha: {2 * answers.rank}  # updates are scaled by alpha / rank

method:
{method}
data:
  train: {json.dumps(answers.data)}
  template: {plan.template}
  max_length: {plan.max_length}  # tokens; {plan.max_length_why}
{_held_out(plan)}
train:
{train}"""


def _method(answers: Answers, plan: Plan) -> str:
    lines = [f"  name: {answers.method}  # others: {', '.join(n for n in methods() if n != answers.method)}"]
    if "target_rank" in methods()[answers.method].model_fields:
        lines.append(
            f"  target_rank: {answers.target_rank:g}  # mean rank at the end; some matrices keep more, others less"
        )
    chosen = methods()[answers.method].suggested(plan.matrices or 1, plan.steps or 1, answers.target_rank)
    lines += [f"  {key}: {value:g}  # {why}" for key, (value, why) in chosen.items()]
    return "\n".join(lines) + "\n"


def _held_out(plan: Plan) -> str:
    if not plan.held_out:
        return ""
    return f"  eval_size: {plan.held_out}  # rows held out; their loss is in the log and in the report\n"


def _train(answers: Answers, plan: Plan) -> str:
    choice, lines = plan.choice, []
    lines.append(f"  epochs: {plan.epochs:g}")
    lines.append(f"  global_batch_size: {plan.global_batch_size}  # examples per optimizer step, over all processes")
    micro = choice.micro_batch_size if choice else 1
    if choice is None:
        lines.append(
            f"  micro_batch_size: {micro}  # examples per forward pass; memory of this model is not known: raise it"
        )
    else:
        of = f"of {answers.memory / GIB:.0f} GiB" + ("" if answers.gpus else " on the host")
        lines.append(f"  micro_batch_size: {micro}  # examples per forward pass: about {choice.peak / GIB:.1f} {of}")
        if choice.activation_checkpointing != "none":
            lines.append(
                f"  activation_checkpointing: {choice.activation_checkpointing}  # recomputed, or they do not fit"
            )
        if choice.activation_memory < 1:
            lines.append(
                f"  activation_memory: {choice.activation_memory:g}  # share of activations kept, or they do not fit"
            )
    lines.append(f"  precision: {'bf16' if answers.gpus else 'fp32'}")
    lines.append("  lr: 2.0e-4  # tune it first: salient-ds sweep")
    lines.append("  lr_schedule: linear")
    lines.append("  lr_warmup: 0.03  # of all steps")
    if plan.held_out:
        lines.append(f"  eval_every: {plan.eval_every}  # steps")
    return "\n".join(lines) + "\n"
