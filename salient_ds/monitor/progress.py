"""What the user sees while training runs: a progress bar in a terminal, or occasional lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from salient_ds.own_files import write_object

_SMOOTHING = 0.1  # weight of the newest step in the shown loss and speed


class Progress:
    """Shows loss, tokens/s, time left and total rank of the training loop. Only the main process shows anything.

    Use it as a context manager, and call :meth:`update` after every applied step. Speed and time left are those of this
    process: steps from before a resume do not count.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        main: bool = True,
        every: int = 10,
        total_rank: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            total_steps: applied optimizer steps of the whole run.
            start_step: steps that are already done.
            main: whether this process shows anything.
            every: number of steps between two lines if ``stream`` is not a terminal.
            total_rank: sum of live ranks at the start.
            stream: output stream (default: stderr).
        """
        self.total_steps, self.start_step, self.step = total_steps, start_step, start_step
        self.main, self.every, self.total_rank = main, every, total_rank
        self.stream = stream if stream is not None else sys.stderr
        self.loss: float | None = None
        """Smoothed loss."""
        self.last_loss: float | None = None
        self.evaluated = ""
        """The last value of the metric that the run is about, such as "accuracy 0.8125"; it is shown from then on."""
        self.tokens = 0
        self.mfu: float | None = None
        """Smoothed model FLOPs utilisation; None: not known."""
        self._clock = clock
        self._started = self._latest = clock()
        self._speed: float | None = None
        self._bar: tqdm[Any] | None = None
        if main and self.stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, file=self.stream, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self, step: int, loss: float, tokens: int, total_rank: int | None = None, mfu: float | None = None
    ) -> None:
        """Show that ``step`` (1-based count of applied steps) is done.

        Args:
            loss: mean loss of the step over all processes.
            tokens: tokens that the step trained on, over all processes.
            total_rank: sum of live ranks; None if it has not changed.
            mfu: model FLOPs utilisation of the step, from 0 to 1; None if it is not known.
        """
        now = self._clock()
        speed = tokens / max(now - self._latest, 1e-9)
        self._latest = now
        self.loss, self._speed = _smooth(self.loss, loss), _smooth(self._speed, speed)
        self.mfu = self.mfu if mfu is None else _smooth(self.mfu, mfu)
        self.last_loss, self.tokens, self.step = loss, self.tokens + tokens, step
        self.total_rank = self.total_rank if total_rank is None else total_rank
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self.main and (step % self.every == 0 or step == self.total_steps):
            self._print(f"step {step}/{self.total_steps}  {self._facts()}  ETA {_duration(self.eta())}")

    def eta(self) -> float | None:
        """Estimated seconds left, at the mean speed of this process; None before its first step."""
        done = self.step - self.start_step
        if done <= 0:
            return None
        return (self._latest - self._started) / done * (self.total_steps - self.step)

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.main:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it stands; safe to call twice."""
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> dict[str, Any]:
        """Steps, tokens, seconds, speed, last losses, total rank. Tokens and seconds count from this process' start."""
        seconds = self._latest - self._started
        return {
            "steps": self.step,
            "start_step": self.start_step,
            "total_steps": self.total_steps,
            "loss": _finite(self.last_loss),
            "smoothed_loss": _finite(self.loss),
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds if seconds > 0 else None,
            "total_rank": self.total_rank,
        }

    def write_summary(self, path: Path, **more: Any) -> None:
        """Write :meth:`summary` and ``more`` as JSON, all or nothing, and print a line. Main process only."""
        if not self.main:
            return
        write_object(path, {**self.summary(), **more})
        took = _duration(self._latest - self._started)
        self.message(f"{self.step}/{self.total_steps} steps in {took}, {self._facts()}; summary in {path}")

    def _facts(self) -> str:
        parts = [f"loss {self.loss:.4f}" if self.loss is not None else "no step yet"]
        if self._speed is not None:
            parts.append(f"{_count(self._speed)} tok/s")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        if self.total_rank is not None:
            parts.append(f"total rank {self.total_rank}")
        parts += [self.evaluated] if self.evaluated else []
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None or not math.isfinite(old) else old + _SMOOTHING * (new - old)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


def _count(value: float) -> str:
    """12.3k rather than 12345."""
    return str(tqdm.format_sizeof(value)) if value >= 1000 else f"{value:.0f}"


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else str(tqdm.format_interval(seconds))
