"""Judge answers: one at a time, each against a baseline, or all pairs. Every verdict is recorded.

Source: the protocol of Zheng et al. 2023 as in FastChat 0.2.36 (same prompts, same matches in the same order, pairs in
both orders).
Differs from the reference: answers that are empty, failed or truncated are not sent; replies that cannot be read and
calls without a reply are recorded as such; a run can be stopped and continued at any call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .asking import Asking
from .asking import Summary as Summary
from .cache import ReplyCache, request_key
from .client import Endpoint, JudgeClient
from .cost import Budget, Price, estimate_tokens
from .judgment_rows import RowContext, pair_row, single_row
from .matches import Answers, Match, Options, matches
from .parsers import read_rating, read_winner
from .prompts import Messages, values_for
from .questions import QuestionSet
from .store import Row
from .verdicts import Failed, Reply, Verdict


class Judging:
    """One run over a list of matches. It turns answers into judgment rows and keeps all replies in the cache."""

    def __init__(
        self, questions: QuestionSet, answers: Answers, endpoint: Endpoint, cache: ReplyCache, options: Options
    ) -> None:
        self.questions, self.answers, self.endpoint = questions, answers, endpoint
        self.cache, self.options = cache, options
        self.matches = matches(questions, sorted(answers), options)
        self.failures: dict[str, str] = {}
        self._check_complete()

    def _check_complete(self) -> None:
        for model, given in self.answers.items():
            missing = [q.question_id for q in self.questions.questions if q.question_id not in given]
            if missing:
                raise ValueError(f"{model} has no answer to questions {missing}; generate them first")

    def problem_of(self, match: Match) -> str:
        """Return why a match must not be sent to the judge, or ""."""
        judged = ("ok", "truncated") if self.options.truncated else ("ok",)
        for model in match.models:
            statuses = self.answers[model][match.question.question_id].statuses
            if len(statuses) < match.turn:
                return f"answer of {model} has {len(statuses)} turns"
            for turn, status in enumerate(statuses[: match.turn], start=1):
                if status not in judged:
                    return (
                        f"answer {turn} of {model} is {status}" if len(match.models) > 1 else f"answer {turn} {status}"
                    )
        return ""

    def messages(self, match: Match, order: tuple[str, ...]) -> Messages:
        """Return the messages for one game (one call), with the models in the given order."""
        texts = [self.answers[model][match.question.question_id].turns for model in order]
        values = values_for(match.turn, match.question.turns, texts, match.reference)
        return match.template.render(values, self.endpoint.merge_system)

    def _context(self) -> RowContext:
        """Return the settings that every row records."""
        return RowContext(
            answers=self.answers,
            questions=self.questions,
            endpoint=self.endpoint,
            parser=self.options.parser,
            user_prompt=lambda match, order: (
                "" if self.problem_of(match) else self.messages(match, order)[-1]["content"]
            ),
        )

    def games(self) -> Iterator[tuple[Match, tuple[str, ...], Messages, str]]:
        """Yield (match, order, messages, cache key) for every call that the matches need."""
        for match in self.matches:
            if not self.problem_of(match):
                for order in match.orders():
                    messages = self.messages(match, order)
                    yield match, order, messages, request_key(self.endpoint, messages, match.repeat)

    def estimate(self, price: Price | None = None) -> dict[str, float]:
        """Estimate for --dry-run the calls and tokens that are still needed, and their price.

        Ceilings are upper bounds. The estimated price assumes 200 completion tokens per call.
        """
        calls = cached = prompt = ceiling = 0
        seen: set[str] = set()
        for _, _, messages, key in self.games():
            if key in seen:
                continue
            seen.add(key)
            if key in self.cache:
                cached += 1
                continue
            calls += 1
            prompt += estimate_tokens(messages)
            ceiling += estimate_tokens(messages, ceiling=True)
        skipped = sum(1 for match in self.matches if self.problem_of(match))
        result: dict[str, float] = {
            "matches": len(self.matches), "not_judged_because_of_the_answer": skipped, "calls": calls,
            "already_cached": cached, "prompt_tokens": prompt, "prompt_tokens_ceiling": ceiling,
            "completion_tokens_ceiling": calls * self.endpoint.max_tokens,
        }  # fmt: skip
        if price is not None:
            result["dollars"] = price.of(prompt, calls * 200)
            result["dollars_ceiling"] = price.of(ceiling, calls * self.endpoint.max_tokens)
        return result

    def run(
        self,
        client: JudgeClient,
        budget: Budget | None = None,
        progress: Callable[[int], None] | None = None,
        keep_going: bool = False,
    ) -> Summary:
        """Make all calls that the cache cannot answer, at most ``concurrency`` at a time. See :mod:`asking`."""
        budget = budget or Budget(None, None, self.endpoint.most_completion_tokens)
        return Asking(self, client, budget, progress, keep_going).run()

    def known(self, key: str, match: Match, order: tuple[str, ...]) -> bool:
        """Whether the cache can answer this call. With ``ask_again``, only a reply with a readable verdict counts."""
        if key not in self.cache:
            return False
        return not self.options.ask_again or self.verdict(match, order)[0].status == "graded"

    def verdict(self, match: Match, order: tuple[str, ...]) -> tuple[Verdict, Reply | None, float, str]:
        """Return for one game: the verdict, the reply, the time at which it was stored, and the cache key."""
        problem = self.problem_of(match)
        if problem:
            return Failed(problem), None, 0.0, ""
        key = request_key(self.endpoint, self.messages(match, order), match.repeat)
        stored = self.cache.get(key)
        if stored is None:
            return Failed(self.failures.get(key, "not judged: the run was stopped")), None, 0.0, key
        texts = [text for model in order for text in self.answers[model][match.question.question_id].turns]
        read = read_rating if len(order) == 1 else read_winner
        return read(stored[0], texts, self.options.parser), stored[0], stored[1], key

    def rows(self, summary: Summary) -> Iterator[Row]:
        """Yield one row of the judgment file per match, and count statuses and reasons in ``summary``."""
        for match in self.matches:
            games = [(order, *self.verdict(match, order)) for order in match.orders()]
            row = (single_row if len(games) == 1 else pair_row)(self._context(), match, games)
            summary.statuses[row["status"]] += 1
            if row["status"] != "graded":
                summary.reasons[row["reason"]] += 1
            yield row
