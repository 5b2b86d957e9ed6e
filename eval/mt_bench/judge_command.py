"""The command ``judge``: options, prices, and what is shown at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm

from .answer_facts import snapshot_notes
from .asking import Summary, plan_calls
from .batch import BatchRun
from .batch_service import Plans, plans_path
from .cache import ReplyCache
from .cli_common import EXIT_STOPPED, Data, console, escape, judge_endpoint, plainly, question_set, show_origin, takes
from .client import Endpoint, GaveUp, HopelessError, JudgeClient
from .cost import Budget, Price
from .judge import Judging
from .ledger import Ledger
from .matches import Mode, Options
from .questions import QuestionSet
from .store import Layout, check_model_name, load_answers, merge_judgments, read_rows


@plainly
@takes(found=question_set, target=judge_endpoint(attempts=8))
def judge(
    found: QuestionSet,
    target: Endpoint,
    data: Data = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="Model to judge (repeatable; default: all).")] = None,
    mode: Annotated[str, typer.Option(help="single, pair-baseline or pair-all.")] = "single",
    baseline: Annotated[str | None, typer.Option(help="Baseline model of pair-baseline.")] = None,
    concurrency: Annotated[int, typer.Option(help="Concurrent calls.")] = 8,
    repeats: Annotated[int, typer.Option(help="Number of verdicts per answer.")] = 1,
    parser: Annotated[
        str, typer.Option(help="Parser that decides the score: strict or fastchat (both are kept).")
    ] = "strict",
    judge_truncated: Annotated[bool, typer.Option(help="Also judge truncated answers.")] = False,
    keep_thoughts: Annotated[
        bool, typer.Option("--keep-thoughts", help="Show the thoughts of answers to the judge, in <think> tags.")
    ] = False,
    ask_again: Annotated[bool, typer.Option(help="Repeat calls whose reply had no readable verdict.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Do not stop when many calls in a row get the same refusal.")
    ] = False,
    batch: Annotated[
        bool, typer.Option("--batch", help="Order the calls as a batch (OpenAI's: half the price, within a day).")
    ] = False,
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks at a batch.")] = 30.0,
    dry_run: Annotated[bool, typer.Option(help="Only count calls, tokens and dollars.")] = False,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Most dollars that these judgments may cost, earlier runs of this command included."),
    ] = None,
    price_prompt: Annotated[float | None, typer.Option(help="Dollars per million prompt tokens.")] = None,
    price_completion: Annotated[float | None, typer.Option(help="Dollars per million completion tokens.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Reply cache (default: next to the judgments).")] = None,
) -> None:
    """Judge answers. Run the same command to continue after a stop: answered calls are not repeated."""
    chosen: Any = mode
    options = Options(
        mode=chosen,
        baseline=baseline,
        repeats=repeats,
        concurrency=concurrency,
        parser=parser,
        truncated=judge_truncated,
        ask_again=ask_again,
    )
    price = _price(price_prompt, price_completion)
    budget = Budget(price, max_cost, target.most_completion_tokens, extra_prompt=len(str(target.extra_body)))
    show_origin(found)
    layout = Layout(data, found.bench)
    names = _models(layout, model or [], chosen, baseline)
    answers = {name: load_answers(layout.answers(name), keep_thoughts) for name in names}
    with ReplyCache(cache or layout.cache(target.model)) as replies:
        run = Judging(found, answers, target, replies, options)
        if dry_run:
            _show_pairs("dry run: nothing was asked", run.estimate(price))
            return
        budget.ledger = Ledger(replies.path.with_suffix(".spent.jsonl"))
        plans = Plans(plans_path(replies.path))
        try:
            if batch:
                summary = _in_batches(BatchRun(run, target, budget, budget.ledger, plans, poll, _say))
            elif plans.open():
                raise ValueError(
                    f"a batch of {sum(len(plan.calls) for plan in plans.open())} calls of an earlier command is on its "
                    f"way ({plans.path}): collect it with --batch, or give another --cache to pay for them again"
                )
            else:
                summary = _at_once(run, target, budget, keep_going)
        finally:
            budget.ledger.close()
        file = layout.judgments(target.model, options.kind, found.reference_name)
        merge_judgments(file, run.rows(summary))
    _show_summary(summary, file)
    for note in snapshot_notes(read_rows(file)):
        console.print(f"[yellow]{escape(note)}[/yellow]")
    if summary.stopped or (summary.failed and summary.failed == summary.asked):
        raise typer.Exit(EXIT_STOPPED)


def _at_once(run: Judging, target: Endpoint, budget: Budget, keep_going: bool) -> Summary:
    client = JudgeClient(target)
    try:
        with tqdm(total=len(plan_calls(run)[0]), unit="call", desc=target.model) as bar:
            return run.run(client, budget, lambda calls: _advance(bar, calls), keep_going)
    finally:
        client.close()


def _in_batches(run: BatchRun) -> Summary:
    try:
        return run.run()
    except (HopelessError, GaveUp) as error:
        run.summary.stopped = str(error).removesuffix(". Run the same command to go on")
        return run.summary
    finally:
        run.close()


def _say(line: str) -> None:
    console.print(escape(line))


def _advance(bar: Any, calls: int) -> None:
    bar.update(calls)


def _models(layout: Layout, wanted: list[str], mode: Mode, baseline: str | None) -> list[str]:
    names = wanted or layout.models()
    if not names:
        raise ValueError(f"no answers below {layout.answers('MODEL').parent}; generate some first, or set --data")
    if mode == "pair-baseline" and baseline and baseline not in names:
        names = [*names, baseline]
    for name in names:
        check_model_name(name)
    return names


def _price(prompt: float | None, completion: float | None) -> Price | None:
    if (prompt is None) != (completion is None):
        raise ValueError("--price-prompt and --price-completion go together")
    return Price(prompt, completion) if prompt is not None and completion is not None else None


def _show_pairs(title: str, values: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if name.startswith("dollars") else f"{value:,}")
    console.print(table)


def _show_summary(summary: Summary, file: Path) -> None:
    values: dict[str, Any] = {"calls made": summary.asked, "from the cache": summary.from_cache}
    values |= {name: summary.statuses[name] for name in ("graded", "unparsed", "failed")}
    values |= {"prompt tokens": summary.prompt_tokens, "completion tokens": summary.completion_tokens}
    if summary.unknown_bills:
        values["attempts with an unknown bill (counted at their most)"] = summary.unknown_bills
    if summary.dollars is not None:
        values["dollars"] = summary.dollars
    if summary.dollars_before:
        values["dollars of earlier runs"] = summary.dollars_before
    _show_pairs(f"judgments in {file}", values)
    for reason, count in summary.reasons.most_common(10):
        console.print(f"  {count} x {escape(reason)}")
    if summary.stopped:
        advice = "" if "--max-cost" in summary.stopped else ". Run the same command to go on"
        console.print(f"[bold red]stopped early:[/] {escape(summary.stopped)}{advice}.")
    elif summary.failed:
        console.print(f"{summary.failed} calls got no reply. Run the same command again to ask them again.")
