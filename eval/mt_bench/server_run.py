"""Answer all questions through an OpenAI-compatible server."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .answer_file import (
    AnswerJournal,
    TurnResult,
    answer_row,
    no_first_answer,
    prompt_too_long,
    remove_answers,
    with_text_status,
)
from .answering import Prompter, conversation
from .client import Body, CallFailed, Endpoint, GaveUp, HopelessError, JudgeClient
from .local_run import Job
from .questions import Question
from .refusals import FEW, Streak
from .reply import outcome_of
from .store import Row

MOST_IN_A_ROW = 3
"""After this many consecutive questions without a reply, the server counts as unreachable."""


@dataclass(frozen=True)
class ServerAnswerer:
    """Asks one question at a time. Several threads may use it.

    With a prompter, our own rendered prompt is sent to ``/completions``, where the server adds no template. Without
    one, messages are sent to ``/chat/completions``, and the server applies its template. ``window`` is the model's
    context window, if known. Fewer tokens are requested where prompt and answer would exceed it, because some servers
    refuse such requests.
    """

    client: JudgeClient
    prompter: Prompter | None
    job: Job
    window: int | None = None

    def answer(self, question: Question) -> tuple[list[TurnResult], CallFailed | None]:
        """Return the results of all turns, and the server's refusal if it refused one of them.

        Raises:
            GaveUp: no reply; ask again later.
            HopelessError: no later call would succeed either.
        """
        results: list[TurnResult] = []
        refusal: CallFailed | None = None
        for turn in range(1, len(question.turns) + 1):
            result = no_first_answer(results[-1]) if results else None
            try:
                result = result or self._turn(question, [r.text for r in results], turn)
            except GaveUp:
                raise
            except CallFailed as error:
                refusal, result = error, TurnResult("", "failed", str(error))
            results.append(with_text_status(result))
        return results, refusal

    def _turn(self, question: Question, answers: list[str], turn: int) -> TurnResult:
        size, room = self._room(question, answers)
        if room < 1:
            return prompt_too_long(size, self.window)
        body = self._body(question, answers, turn, room)
        reply = self.client.post("/completions" if "prompt" in body else "/chat/completions", body)
        used = (reply.prompt_tokens, reply.completion_tokens)
        outcome = outcome_of(reply)
        said: dict[str, Any] = {
            "thought": outcome.thought,
            "thought_tokens": reply.thought_tokens,
            "cleaned": reply.cleaned,
        }
        if outcome.ended == "broken" or (outcome.ended == "truncated" and not outcome.text):
            return TurnResult("", "failed", outcome.reason, *used, **said)
        if outcome.ended == "truncated":
            asked_less = room < self.client.endpoint.max_tokens
            reason = f"cut at the end of the model's window of {self.window}" if asked_less else "cut by the server"
            return TurnResult(outcome.text, "truncated", reason, *used, **said)
        return TurnResult(outcome.text, "ok" if outcome.text else "empty", outcome.reason, *used, **said)

    def _room(self, question: Question, answers: list[str]) -> tuple[int, int]:
        """Return (tokens of the prompt, or 0 if unknown; maximum tokens of the answer)."""
        most = self.client.endpoint.max_tokens
        if self.prompter is None or self.window is None:
            return 0, most
        size = len(self.prompter.tokens(question, answers))
        return size, min(most, self.window - size)

    def _body(self, question: Question, answers: list[str], turn: int, room: int) -> Body:
        endpoint = self.client.endpoint
        body: Body = {
            "model": endpoint.model,
            **extra_parameters(endpoint),
            "seed": self.job.seed_of(question.question_id, turn) % 2**31,
        }
        if endpoint.token_parameter != "none":
            body[endpoint.token_parameter] = room
        if self.job.temperatures is not None:
            body |= {"temperature": self.job.temperatures[question.question_id], "top_p": 1.0}
        if self.prompter is None:
            return body | {"messages": conversation(question, answers).messages()}
        text = self.prompter.text(question, answers)
        if self.prompter.puts_bos:  # the server's tokenizer adds it too
            text = text.removeprefix(str(self.prompter.tokenizer.bos_token))
        body["prompt"] = text
        return body | ({"stop": list(self.prompter.stops)} if self.prompter.stops else {})


def extra_parameters(endpoint: Endpoint) -> Body:
    """Return the parameters that the user adds to each request."""
    effort = {} if endpoint.reasoning_effort is None else {"reasoning_effort": endpoint.reasoning_effort}
    return effort | endpoint.extra_body


def answer_from_server(job: Job, server: ServerAnswerer, concurrency: int) -> tuple[list[Row] | None, str]:
    """Ask all questions that are not answered yet.

    Returns:
        The rows of the answer file and "". If some questions got no reply, or all calls were refused, None and the
        reason; they are asked again next time.
    """
    if job.overwrite:
        remove_answers(job.path)
    with AnswerJournal(job.path, job.settings) as journal:
        missing = [question for question in job.questions if question.question_id not in journal.done]
        stopped = _ask(job, missing, server, concurrency, journal)
        rows = journal.merge(job.ids)
    return rows, stopped


def _ask(job: Job, questions: list[Question], server: ServerAnswerer, concurrency: int, journal: AnswerJournal) -> str:
    """Return why questions got no answer, or "". After an error or Ctrl-C it still waits for the calls in flight."""
    with (
        tqdm(total=len(questions), unit="question", desc=job.model_id) as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            return _collect(
                job, deque(questions), server=server, pool=pool, concurrency=concurrency, journal=journal, bar=bar
            )
        except BaseException:
            server.client.stop()
            raise


def _collect(
    job: Job, questions: deque[Question], *, server: ServerAnswerer, pool: ThreadPoolExecutor, concurrency: int,
    journal: AnswerJournal, bar: tqdm[Any],
) -> str:  # fmt: skip
    """Ask questions and store the answers, until all are answered or the server counts as unreachable.

    Finished calls are handled before new questions are started.

    Returns:
        Why answers are missing, or "".
    """
    problem, in_a_row, stopped = "", 0, False
    streak, refused = Streak(), dict[Question, list[TurnResult]]()
    streak.any_reply = bool(journal.done)
    waiting: dict[Future[tuple[list[TurnResult], CallFailed | None]], Question] = {}
    while waiting or (questions and not stopped):
        most = concurrency if streak.any_reply else min(concurrency, FEW)
        while questions and not stopped and len(waiting) < most:
            question = questions.popleft()
            waiting[pool.submit(server.answer, question)] = question
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            question = waiting.pop(future)
            try:
                turns, refusal = future.result()
            except (GaveUp, HopelessError) as error:
                hopeless, in_a_row = isinstance(error, HopelessError), in_a_row + 1
                if not stopped and (hopeless or not problem):
                    problem = str(error)
                if not stopped and (hopeless or in_a_row == MOST_IN_A_ROW):
                    stopped = True
                    server.client.stop()
                continue
            in_a_row = 0
            bar.update()
            if refusal is None:
                streak.reply()
                journal.add(answer_row(job.model_id, question.question_id, turns, job.settings))
                continue
            refused[question] = turns
            reason = streak.refused(refusal)
            if reason and not stopped:
                problem, stopped = reason, True
                server.client.stop()
    if stopped:
        return problem
    if refused and not streak.any_reply:
        problem = next(turn.reason for turns in refused.values() for turn in turns if turn.reason)
    else:
        for question, turns in refused.items():
            row = answer_row(job.model_id, question.question_id, turns, job.settings)
            journal.add({**row, "refused": True})
    return problem
