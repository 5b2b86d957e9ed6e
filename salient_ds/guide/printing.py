"""What ``salient-ds init`` says when it is done. No torch."""

from __future__ import annotations

from pathlib import Path

from salient_ds.check.memory import GIB
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig
from salient_ds.guide.answers import Answers
from salient_ds.run.exits import print_problems


def print_init(output: Path, answers: Answers, run: RunConfig, report: Report, notes: list[str]) -> int:
    """Print what was chosen and the next commands, or why nothing was written. Returns the exit status."""
    if report.problems:
        print_problems([*report.problems, f"{output} was not written, because its check finds the above"])
        return 1
    train, facts = run.train, report.facts
    stage = facts["zero"]["stage"]
    peak = facts.get("this_run", {}).get("peak")
    memory = (
        f", about {peak / GIB:.1f} of {answers.memory / GIB:.0f} GiB" if peak and run.train.micro_batch_size else ""
    )
    print(f"{output}: {run.method.name} on {facts.get('modules', '?')} matrices, ZeRO-{stage}, micro-batch "
          f"{train.micro_batch_size}{memory}, {facts.get('total_steps', '?')} steps")  # fmt: skip
    for note in [*notes, *report.notes]:
        print(f"note: {note}")
    gpus = answers.processes
    print("next:")
    print(f"  salient-ds check {output} --gpus {gpus}")
    print(f"  salient-ds train {output} --gpus {gpus}")
    print(f"  salient-ds report {run.output_dir}")
    return 0
