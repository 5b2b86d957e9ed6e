"""The command ``generate``: let a local model, or a model behind a server, answer all questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.table import Table

from .answering import Prompter, end_text, question_temperatures
from .cli_common import (
    EXIT_STOPPED,
    Attempts,
    BenchName,
    Data,
    ExtraBody,
    Header,
    KeyEnv,
    KeyHeader,
    ReasoningEffort,
    Source,
    SourcePath,
    Stream,
    Timeout,
    TokenParameter,
    console,
    escape,
    make_endpoint,
    show_origin,
)
from .client import Endpoint, JudgeClient
from .local_run import Job, answer_locally, global_rank_and_size
from .sources import ModelSource, choose_template, context_window, default_name, find_source, origin_of
from .store import ANSWER_STATUSES, Layout, Row, check_model_name
from .user_sets import NO_REFERENCES, SetOptions, load_questions

SERVER_TEMPLATE = "server"
"""Name of the template if the server applies its own."""

Base = Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")]
TokenizerName = Annotated[str | None, typer.Option(help="Tokenizer (default: the adapter's or the base's).")]
TemplateName = Annotated[
    str | None, typer.Option(help="For models without a template record. Else it must be that of training.")
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
]


def generate(
    model: Annotated[
        str | None, typer.Argument(help="Run directory, adapter directory, merged or base model, or hub name.")
    ] = None,
    model_id: Annotated[str | None, typer.Option(help="Name of the answers (default: taken from MODEL).")] = None,
    base: Base = None,
    tokenizer: TokenizerName = None,
    template: TemplateName = None,
    trust_remote_code: TrustRemoteCode = False,
    data: Data = Path("data"),
    questions: Source = "mt_bench",
    bench_name: BenchName = None,
    questions_path: SourcePath = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of one answer.")] = 1024,
    temperature: Annotated[
        str, typer.Option(help="mt_bench (by category), a number, or category=number,... For a server also none.")
    ] = "mt_bench",
    seed: Annotated[int, typer.Option(help="Sampling seed. Use another --model-id for another seed.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that also ends an answer (repeatable).")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered in one batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Split one model over this many processes (all processes of the launcher).")
    ] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace existing answers.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Ask this OpenAI-compatible server instead.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name at the server.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent questions to a server.")] = 8,
    token_parameter: TokenParameter = "max_tokens",
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    api_key_header: KeyHeader = None,
    header: Header = None,
    reasoning_effort: ReasoningEffort = None,
    extra_body: ExtraBody = None,
    stream: Stream = False,
    timeout: Timeout = 600.0,
    attempts: Attempts = 8,
) -> None:
    """Answer all questions in two turns. Run the same command to continue after a stop."""
    global_rank, size = global_rank_and_size()
    console.quiet = global_rank > 0
    if (model is None and endpoint is None) or (endpoint is None) != (model_name is None):
        raise ValueError("give a MODEL to load, or the --endpoint of a server with --model-name")
    if endpoint is not None and size > 1:
        raise ValueError(f"--endpoint is for one process, and the launcher started {size}")
    if tensor_parallel not in (1, size):
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} must be the launcher's number of processes, {size}, or 1"
        )
    found = load_questions(SetOptions(questions, questions_path, NO_REFERENCES, bench_name))
    show_origin(found)
    source = find_source(model, base, tokenizer, trust_remote_code) if model is not None else None
    prompter, record = _template(source, template, tokenizer, stop or [], endpoint is not None)
    name = model_id or default_name(model or str(model_name))
    check_model_name(name)
    settings: Row = {
        **record, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": stop or [],
        "questions_sha256": next(value for key, value in found.sha256.items() if key.endswith("question.jsonl")),
    }  # fmt: skip
    temperatures = (
        None if endpoint is not None and temperature == "none" else question_temperatures(temperature, found.questions)
    )
    job = Job(name, Layout(data, found.bench).answers(name), found.questions, temperatures, seed, settings, overwrite)
    if endpoint is None:
        assert source is not None and prompter is not None
        rows = _from_model(
            job,
            source,
            prompter=prompter,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            split=tensor_parallel > 1,
        )
    else:
        server = make_endpoint(
            model=model_name, base_url=endpoint, api_key_env=api_key_env, api_key_header=api_key_header, header=header,
            reasoning_effort=reasoning_effort, extra_body=extra_body, stream=stream, max_tokens=max_new_tokens,
            token_parameter=token_parameter, timeout_s=timeout, max_attempts=attempts,
        )  # fmt: skip
        rows = _from_server(job, prompter, server, concurrency, context_window(source) if source else None)
    if rows is not None:
        show_answers(job, rows)


def sample_prompter(
    model: Annotated[
        str | None, typer.Option(help="Run, adapter or model whose prompts are shown and whose template is checked.")
    ] = None,
    base: Base = None,
    tokenizer: TokenizerName = None,
    template: TemplateName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> tuple[Prompter, str] | None:
    """Return how ``generate`` would prompt a model, and a text about its template. None without a model.

    Raises:
        ValueError: as for ``generate``.
    """
    if model is None:
        return None
    source = find_source(model, base, tokenizer, trust_remote_code)
    prompter, record = _template(source, template, tokenizer, [], server=False)
    assert prompter is not None
    origin = "as in training" if source.record else "nothing recorded at training"
    return prompter, f"sha256 {record['template_sha256']}  template {record['template']} ({origin})"


def _template(
    source: ModelSource | None, wanted: str | None, tokenizer: str | None, stops: Sequence[str], server: bool
) -> tuple[Prompter | None, Row]:
    """Return (prompter, or None if the server applies its template; the entries about it in the answer file)."""
    record = source.record if source else None
    if server and (wanted == SERVER_TEMPLATE or (wanted is None and source is None)):
        if record is not None:
            raise ValueError(
                f'trained with template "{record.name}", asked for the server\'s own: leave --template out, and our '
                "rendered prompt goes to /completions"
            )
        if stops:
            raise ValueError("--stop does not go with the server's own template")
        return None, {"template": SERVER_TEMPLATE, "template_sha256": None}
    where = source.tokenizer if source else tokenizer
    if where is None:
        raise ValueError(f"--template {wanted} needs a tokenizer to be rendered with: give --tokenizer, or MODEL")
    loaded = _load_tokenizer(where, source)
    template, used = choose_template(record, wanted, loaded)
    ends = [text for text in [end_text(template, loaded), *stops] if text]
    return Prompter(template, loaded, tuple(ends)), {"template": used.name, "template_sha256": used.sha256}


def _load_tokenizer(where: str, source: ModelSource | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            where,
            revision=source.revision if source and where == source.base else None,
            trust_remote_code=bool(source and source.trust_remote_code),
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {where}: {error}; give --tokenizer") from None


def _from_model(
    job: Job, source: ModelSource, *, prompter: Prompter, dtype: str, max_new_tokens: int, batch_size: int, split: bool
) -> list[Row] | None:
    import torch

    from .local_model import DTYPES, LocalAnswerer, load_answering, local_device

    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    kind = dtype if dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"
    job.settings.update(model=source.identity(), dtype=kind)
    if origin := origin_of(source):
        job.settings.update(origin=origin)

    def load() -> LocalAnswerer:
        model = load_answering(source, DTYPES[kind], local_device(), split)
        return LocalAnswerer(model, prompter.tokenizer, prompter.stops, max_new_tokens, together=split)

    return answer_locally(job, prompter, load, batch_size, together=split)


def _from_server(
    job: Job, prompter: Prompter | None, endpoint: Endpoint, concurrency: int, window: int | None
) -> list[Row]:
    from .server_run import ServerAnswerer, answer_from_server, extra_parameters

    job.settings.update(endpoint=endpoint.base_url, model=endpoint.model)
    if extra := extra_parameters(endpoint):
        job.settings.update(parameters=extra)
    client = JudgeClient(endpoint)
    try:
        rows, problem = answer_from_server(job, ServerAnswerer(client, prompter, job, window), concurrency)
    finally:
        client.close()
    if rows is None:
        console.print(f"[bold red]stopped early:[/] {escape(problem)}. Run the same command to go on.")
        raise typer.Exit(EXIT_STOPPED)
    return rows


def show_answers(job: Job, rows: Sequence[Row]) -> None:
    """Print the number of turns by status, their mean length, and the most frequent reasons for failures."""
    table = Table("turn", *ANSWER_STATUSES, "mean characters", title=f"answers in {job.path}")
    for turn in range(max(len(row["statuses"]) for row in rows)):
        at = [row for row in rows if len(row["statuses"]) > turn]
        counts = Counter(row["statuses"][turn] for row in at)
        lengths = [len(row["choices"][0]["turns"][turn]) for row in at if row["statuses"][turn] in ("ok", "truncated")]
        shown = f"{mean(lengths):,.0f}" if lengths else "none"
        table.add_row(str(turn + 1), *(str(counts[status]) for status in ANSWER_STATUSES), shown)
    console.print(table)
    reasons = Counter(reason for row in rows for reason in row["reasons"] if reason)
    for reason, count in reasons.most_common(5):
        console.print(f"  {count} x {escape(reason)}")
    refused = sum(bool(row.get("refused")) for row in rows)
    if refused:
        console.print(f"The server refused {refused} questions. Run the same command again to ask them again.")
