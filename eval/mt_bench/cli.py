"""The commands generate, judge, report, agree and doctor, available as ``salient-ds mt-bench``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .answering import Prompter
from .cli_common import (
    EXIT_CHECK_FAILED,
    Data,
    console,
    escape,
    judge_endpoint,
    plainly,
    question_set,
    show_origin,
    takes,
)
from .client import Endpoint, JudgeClient
from .generate import generate, sample_prompter
from .judge_command import judge
from .questions import QuestionSet
from .store import Layout

if TYPE_CHECKING:
    from .agree import Agreement
    from .report import Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # local variables may hold answers; no output may show a key
    help="Generate and judge answers to MT-Bench style questions, and report the scores.",
)
app.command()(plainly(generate))
app.command()(judge)


@app.command()
@plainly
@takes(found=question_set)
def report(
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and pictures.")],
    found: QuestionSet,
    data: Data = Path("data"),
    judge_model: Annotated[
        list[str] | None, typer.Option(help="Judge to report; several of them are a panel (default: gpt-4).")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to report (repeatable; default: all).")] = None,
    baseline: Annotated[str | None, typer.Option(help="Only show comparisons against this model.")] = None,
    max_failure_rate: Annotated[
        float, typer.Option(help="Give no average if more than this share is not graded.")
    ] = 0.05,
    max_cell_failure_rate: Annotated[float, typer.Option(help="The same for the mean of a single category.")] = 0.5,
    one_snapshot: Annotated[
        bool, typer.Option("--one-snapshot", help="Refuse judgments that several snapshots of the judge gave.")
    ] = False,
    draws: Annotated[int, typer.Option(help="Bootstrap draws.")] = 2000,
    price_prompt: Annotated[float | None, typer.Option(help="Dollars per million prompt tokens of the judge.")] = None,
    price_completion: Annotated[float | None, typer.Option(help="Dollars per million completion tokens.")] = None,
) -> None:
    """Write tables, pictures and one HTML page from the judgments; for a panel, one folder per judge and panel.md."""
    from . import report as reports
    from .panel import build_panel, judge_folder, write_panel
    from .report_options import ReportOptions

    layout = Layout(data, found.bench)
    options = ReportOptions(
        max_failure_rate, draws, baseline, tuple(model or ()), {q.question_id: q.category for q in found.questions},
        max_cell_failure_rate, one_snapshot,
        None if price_prompt is None or price_completion is None else (price_prompt, price_completion),
    )  # fmt: skip
    judges = list(dict.fromkeys(judge_model or ["gpt-4"]))
    results = {name: reports.build_report(layout, name, found.reference_name, options) for name in judges}
    for name, result in results.items():
        folder = out if len(judges) == 1 else judge_folder(out, name)
        _write_report(result, folder, layout, found)
    if len(judges) > 1:
        panel = build_panel(results, layout, found.reference_name, draws)
        console.print(escape(write_panel(panel, out)))
        console.print(f"written: {out / 'panel.md'}, panel.json")


def _write_report(result: Report, out: Path, layout: Layout, found: QuestionSet) -> None:
    """Write every file of one judge's report and print its head."""
    from . import html, markdown, plots
    from . import report as reports

    out.mkdir(parents=True, exist_ok=True)
    reports.write_json(result, out / "report.json")
    text = markdown.to_markdown(result)
    (out / "report.md").write_text(text, encoding="utf-8")
    cases = html.collect_cases(layout, result, found.reference_name, {q.question_id: q for q in found.questions})
    (out / "report.html").write_text(html.to_html(result, cases), encoding="utf-8")
    plots.write_plots(result, out)
    console.print(escape(text.split("## Category")[0]))
    console.print(
        f"written: {out / 'report.html'}, report.md, report.json" + (", radar and bars" if "single" in result else "")
    )


@app.command()
@plainly
def agree(
    first: Annotated[Path, typer.Argument(help="File with the judgments or votes of one judge.")],
    second: Annotated[Path | None, typer.Argument(help="File of the other; default: agree within the first.")] = None,
    first_judge: Annotated[str | None, typer.Option(help="Only use judges with this name prefix.")] = None,
    second_judge: Annotated[str | None, typer.Option(help="The same for the second file.")] = None,
    tie_margin: Annotated[float, typer.Option(help="Largest score difference of a tie.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure the agreement of two judges, or of a judge and people, with and without ties, and Cohen's kappa."""
    from .agree import agreement, load_votes  # imports scipy, which is slow

    mine = load_votes(first, first_judge, tie_margin)
    other = load_votes(second, second_judge, tie_margin) if second else None
    found = [agreement(mine, other, turn) for turn in (1, 2, None)]
    table = Table("turn", "with ties", "n", "without ties", "n", "kappa", "95 % interval")
    for result in found:
        table.add_row(*_agreement_row(result))
    console.print(table)
    if not found[-1].total_with_ties:
        raise ValueError(f"{first} and {second} have no comparison in common (same question, turn and models)")
    if out:
        out.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n", encoding="utf-8")


def _agreement_row(result: Agreement) -> list[str]:
    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.1%}"

    interval = result.kappa_interval
    return [
        "both" if result.turn is None else str(result.turn),
        share(result.with_ties), str(result.total_with_ties),
        share(result.without_ties), str(result.total_without_ties),
        "none" if result.kappa is None else f"{result.kappa:.3f}",
        "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
    ]  # fmt: skip


@app.command()
@plainly
@takes(found=question_set, target=judge_endpoint(attempts=3), rendered=sample_prompter)
def doctor(
    found: QuestionSet,
    target: Endpoint,
    rendered: tuple[Prompter, str] | None,
    show_samples: Annotated[bool, typer.Option("--samples/--no-samples", help="Print one prompt per template.")] = True,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Ask the judge 14 questions with known answers.")
    ] = True,
) -> None:
    """Check files, prompts and the judge. With --model, also show how that model is prompted."""
    from . import doctor as checks

    show_origin(found)
    results = checks.file_checks(found)
    shown = list(checks.samples(found, target.merge_system)) if show_samples else []
    if rendered is not None:
        prompter, template = rendered
        shown += checks.model_samples(prompter, found) if show_samples else []
        console.print(f"  {escape(template)}")
        results.append(checks.Check("the model's template", True, "as in training, if known", prompter.template.name))
    for name, messages in shown:
        console.rule(name)
        for message in messages:
            console.print(f"[bold]{message['role']}[/]\n{escape(message['content'])}")
    if probe:
        client = JudgeClient(target)
        results += checks.probe(client, found)
        client.close()
    table = Table("", "check", "expected", "found", title="doctor")
    for check in results:
        mark = "ok" if check.passed else "[bold red]NO[/]"
        table.add_row(mark, *map(escape, (check.name, check.expected, check.found)))
    console.print(table)
    if not all(check.passed for check in results):
        raise typer.Exit(EXIT_CHECK_FAILED)
