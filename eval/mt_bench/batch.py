"""Judge through a batch interface like OpenAI's: one file with all calls, answered within a day at a lower price.

    POST /files, POST /batches, GET /batches/ID (until it ended), GET /files/ID/content

Every step is on disk before the next one starts, so a killed command goes on where it was, and no batch is ordered
twice: a plan is written first, its name goes along as metadata, and a plan without a batch is looked for at the server.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .asking import Call, Games, Summary, count_earlier, plan_calls
from .batch_service import PATH, BatchService, Plan, Plans, id_of
from .completion import NoCompletion, first_choice, read_body, to_reply, usage_of
from .cost import Budget
from .endpoint import Endpoint
from .ledger import Ledger
from .refusals import UNBILLED_STATUSES, HopelessError, refusal_in
from .transport import HttpTransport

MOST_CALLS, MOST_BYTES_OF_CALLS = 50_000, 150 << 20
"""OpenAI takes 50,000 calls and 200 MB in one batch."""
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class BatchRun:
    """Judges the calls of one run in batches. ``sleep`` waits between two looks at a batch (seconds)."""

    judging: Games
    endpoint: Endpoint
    budget: Budget
    ledger: Ledger
    plans: Plans
    poll_s: float = 30.0
    say: Callable[[str], None] = print
    sleep: Callable[[float], None] = time.sleep
    summary: Summary = field(default_factory=Summary)

    def __post_init__(self) -> None:
        if self.endpoint.service != "openai" or self.endpoint.stream:
            raise ValueError("--batch goes with --service openai, and without --stream")
        self._transport = HttpTransport(self.endpoint)
        self._service = BatchService(self.endpoint, self._transport, self.sleep)

    def close(self) -> None:
        self._transport.close()

    def run(self) -> Summary:
        """Collect batches of earlier runs, order one with what is missing, and wait for it.

        Raises:
            HopelessError: the server refuses batches, or the order.
        """
        summary = self.summary
        for plan in self.plans.open():
            self._finish(plan)
        calls, keys, summary.from_cache = plan_calls(self.judging)
        count_earlier(self.budget, self.judging, keys)
        summary.dollars_before = self.budget.before
        for part in self._parts(calls):
            plan = Plan(uuid.uuid4().hex, {call.key: self.ledger.open(call.key, most) for call, most, _ in part})
            self.plans.write(plan, calls=plan.calls)
            self._order(plan, b"".join(line for _, _, line in part))
            self._finish(plan)
        self._count(keys)
        return summary

    def _parts(self, calls: Iterable[Call]) -> Iterator[list[tuple[Call, tuple[int, int], bytes]]]:
        """Yield the calls of each batch with their most tokens and their lines, as far as the cost limit allows."""
        part: list[tuple[Call, tuple[int, int], bytes]] = []
        reserved, size = self.budget.before, 0
        for call in calls:
            messages = self.judging.messages(call.match, call.order)
            most = self.budget.ceiling(messages)
            if self.budget.limit is not None and self.budget.price is not None:
                wanted = self.budget.price.of(*most)
                if reserved + wanted > self.budget.limit:
                    self.summary.stopped = (
                        f"--max-cost {self.budget.limit:g} would be passed by the next call: it can cost {wanted:.4f} "
                        f"dollars, and {reserved:.4f} are spent or ordered. Give a higher --max-cost to go on"
                    )
                    break
                reserved += wanted
            body = {"model": self.endpoint.model, "messages": messages, **self.endpoint.parameters()}
            line = json.dumps({"custom_id": call.key, "method": "POST", "url": PATH, "body": body}).encode() + b"\n"
            if part and (len(part) == MOST_CALLS or size + len(line) > MOST_BYTES_OF_CALLS):
                yield part
                part, size = [], 0
            part.append((call, most, line))
            size += len(line)
        if part:
            yield part

    def _order(self, plan: Plan, lines: bytes) -> None:
        try:
            plan.batch = self._service.order(plan, lines)
        except HopelessError:
            self._end(plan)
            raise
        self.plans.write(plan, batch=plan.batch)
        self.say(f"batch {plan.batch}: {len(plan.calls)} calls ordered")

    def _finish(self, plan: Plan) -> None:
        """Wait until the plan's batch has ended, and store its replies."""
        if not plan.batch:
            plan.batch = self._service.find(plan)
            if not plan.batch:  # killed before the order: nothing was bought
                self._end(plan)
                return
            self.plans.write(plan, batch=plan.batch)
        shown = ""
        while True:
            found = self._service.status(plan.batch)
            status = id_of(found, "status")
            counts = _dict(found.get("request_counts"))
            line = f"batch {plan.batch}: {status}, {counts.get('completed', 0)} of {len(plan.calls)} done"
            if line != shown:
                self.say(line)
            shown = line
            if status in ENDED:
                break
            self.sleep(self.poll_s)
        left = dict(plan.calls)
        for name in ("output_file_id", "error_file_id"):
            file = found.get(name)
            if isinstance(file, str) and file:
                self._store(left, self._service.results(id_of(found, name)))
        reason = _batch_errors(found) or f"the batch is {status} and has no answer to this call"
        for key, entry in left.items():
            self._fail(key, reason)
            if status != "completed":  # what was not answered is not billed
                self.ledger.close_entry(entry, (0, 0))
        self._end(plan, close=False)
        if status == "failed":
            raise HopelessError(f"batch {plan.batch} failed: {reason}")

    def _store(self, left: dict[str, str], data: bytes) -> None:
        """Write the replies of a result file into the cache, and remove their calls from ``left``."""
        for line in data.split(b"\n"):
            try:
                row = read_body(line) if line.strip() else None
            except NoCompletion:
                continue
            key = row.get("custom_id") if isinstance(row, dict) else None
            if not isinstance(row, dict) or not isinstance(key, str) or key not in left:
                continue
            entry = left.pop(key)
            response = _dict(row.get("response"))
            body, status = response.get("body"), response.get("status_code")
            refusal = refusal_in(status if isinstance(status, int) else 502, body)
            if row.get("error") or refusal is not None or first_choice(body) is None:
                problem = refusal_in(400, {"error": row["error"]}) if row.get("error") else refusal
                self._fail(key, problem.words() if problem else "reply is no completion")
                if row.get("error") or (isinstance(status, int) and status in UNBILLED_STATUSES):
                    self.ledger.close_entry(entry, (0, 0))
                continue
            try:
                reply = to_reply(body, 0.0, 1)
            except NoCompletion as error:
                self._fail(key, str(error))
                continue
            self.judging.cache.put(key, reply, {"batch": True})
            self.summary.asked += 1
            prompt, completion = usage_of(body)
            if prompt is None or completion is None:
                self.summary.unknown_bills += 1  # stays at its ceiling
                continue
            self.ledger.close_entry(entry, (prompt, completion))
            self.summary.prompt_tokens += prompt
            self.summary.completion_tokens += completion

    def _fail(self, key: str, reason: str) -> None:
        self.judging.failures[key] = reason
        self.summary.failed += 1
        self.summary.asked += 1

    def _end(self, plan: Plan, close: bool = True) -> None:
        """Write that a plan is done. ``close``: nothing was bought, so its calls cost nothing."""
        for entry in plan.calls.values() if close else ():
            self.ledger.close_entry(entry, (0, 0))
        plan.done = True
        self.plans.write(plan, done=True)

    def _count(self, keys: set[str]) -> None:
        if self.budget.price is not None:
            before = self.summary.dollars_before
            self.summary.dollars = max(0.0, self.budget.price.of(*self.ledger.spent_on(keys)) - before)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _batch_errors(found: dict[str, Any]) -> str:
    errors = found.get("errors")
    entries = errors.get("data") if isinstance(errors, dict) else None
    said = [str(entry.get("message") or entry) for entry in entries or [] if isinstance(entry, dict)]
    return "; ".join(said)[:300]
