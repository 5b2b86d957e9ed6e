"""A worker: claims runs of a sweep one after the other until none is left. Any number of them share the queue."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from salient_ds.config.run import RunConfig, load_config
from salient_ds.run.exits import RUN_ERROR, print_problems
from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import arm_runs, fingerprint, fresh_data, job_run
from salient_ds.sweep.folder import SweepFolder, write_whole
from salient_ds.sweep.plan import Job, Outcome, plan, waiting
from salient_ds.sweep.queue import Claim, Heartbeat, Queue
from salient_ds.sweep.spec import SweepSpec
from salient_ds.sweep.stopping import Watch

if TYPE_CHECKING:
    import torch

ATTEMPTS = 3
"""A run that ended its worker so many times in one session is given up."""
POLL = 1.0
"""Seconds between two looks for work."""
INTERRUPTED = 130
"""Exit status of a worker that was asked to stop."""
PARENT = "SALIENT_SWEEP_PARENT"
"""Environment variable with the pid of the process that leads the sweep. Its worker stops when that is gone."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def alone() -> dict[str, str]:
    """This process' environment without what makes a process a member of a launched group."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHED}


class Worker:
    """One process that works on a sweep."""

    def __init__(self, spec: SweepSpec, spec_path: Path, folder: SweepFolder) -> None:
        """
        Raises:
            ConfigError: the sweep was not started yet, or with other arms.
        """
        self.spec, self.folder = spec, folder
        self.arms = arm_runs(spec, spec_path)
        self.fresh_data = fresh_data(spec, spec_path)
        known = folder.saved().get("arms")
        changed = folder.changed_arms({name: fingerprint(run, self.fresh_data) for name, run in self.arms.items()})
        if known is None or changed or set(self.arms) - set(known):
            raise ConfigError(
                [f"{folder.path} was not started with these arms: start salient-ds sweep without --worker first"]
            )
        self.queue: Queue = folder.queue()
        self.stopping = False
        self._device: torch.device | None = None
        self._read_inputs: Any = None
        self._parent = int(os.environ.get(PARENT, 0))

    def ask_to_stop(self, *_: object) -> None:
        """Handler of signals: the run at work saves a checkpoint after its step."""
        self.stopping = True

    def should_stop(self) -> bool:
        return self.stopping or bool(self._parent and os.getppid() != self._parent)

    def work(self) -> int:
        """Work until every run of the sweep has ended.

        Returns:
            The exit status: 0, or :data:`INTERRUPTED`.
        """
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self.ask_to_stop) for number in numbers]
        try:
            return self._until_all_ended()
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _until_all_ended(self) -> int:
        while not self.should_stop():
            outcomes = self.folder.outcomes()
            plans = plan(self.spec, outcomes)
            jobs = waiting(plans, outcomes)
            if not jobs and all(state.complete for state in plans.values()):
                return 0
            claimed = next(((job, claim) for job in jobs if (claim := self.queue.claim(job.key)) is not None), None)
            if claimed is None:
                time.sleep(POLL)
                continue
            self._one(*claimed)
        return INTERRUPTED

    def _one(self, job: Job, claim: Claim) -> None:
        if job.key in self.folder.outcomes():  # it ended between the look and the claim
            claim.release()
            return
        if claim.attempt > ATTEMPTS:
            reason = f"its process ended {ATTEMPTS} times without an answer (out of memory?)"
            self.folder.put(Outcome(job.arm, job.lr, job.seed, job.phase, "failed", reason))
            return
        fresh = True
        with Heartbeat(claim, self.queue.lease) as heart:
            run_file = self._write_run(job)
            with logged(self.folder.log_file(job)):
                outcome, fresh = self._train(job, run_file, heart)
                if outcome is not None:
                    print(f"sweep: {outcome.status} {outcome.reason}".rstrip(), file=sys.stderr, flush=True)
            if outcome is not None and not heart.lost:
                self.folder.put(outcome)
        if not heart.lost:
            claim.release()
        if not fresh and not self.should_stop():
            restart()

    def _write_run(self, job: Job) -> Path:
        path = self.folder.run_file(job)
        held_out = self.fresh_data if job.phase == "fresh" else None
        run = job_run(self.arms[job.arm], job.lr, job.seed, self.folder.run_directory(job), held_out)
        hint = f"# salient-ds train {path} --gpus 1\n"
        write_whole(path, hint + yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
        return path

    def _train(self, job: Job, run_file: Path, heart: Heartbeat) -> tuple[Outcome | None, bool]:
        """The outcome (None: the run has not ended), and whether this process can take another run."""
        from salient_ds.sweep.one_run import Interrupted, LeaseLost, leaves_traces, run_job

        try:
            config = load_config(run_file)
            device = self._start(config)
            stop = self.spec.stop if job.phase != "fresh" else None
            outcome = run_job(
                job, config, self.spec.metric, device,
                read_inputs=self._read_inputs,
                watch=None if stop is None else lambda steps: Watch(self.folder.mark_folder, job, stop, steps),
                interrupted=self.should_stop, lost=lambda: heart.lost,
            )  # fmt: skip
            return outcome, not leaves_traces(config, device)
        except (Interrupted, LeaseLost) as error:
            print(f"sweep: {error}", file=sys.stderr, flush=True)
            return None, False
        except Exception as error:  # whatever it is, the other runs go on
            traceback.print_exc()
            return Outcome(job.arm, job.lr, job.seed, job.phase, "failed", _in_a_line(error)), False

    def _start(self, config: RunConfig) -> torch.device:
        """This process' device. Its process group, of which it is the only member, lasts for all runs."""
        if self._device is None:
            from salient_ds.sweep.one_run import DataCache
            from salient_ds.zero.environment import start

            self._device, self._read_inputs = start(config.train.timeout_minutes), DataCache()
        return self._device


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = type(error).__name__
    remedy = ": lower per_gpu or train.micro_batch_size" if kind == "OutOfMemoryError" else ""
    return f"{kind}: {text[:400]}{remedy}"


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send this process' standard streams to the end of a file, those of libraries in other languages too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(stream) for stream in (1, 2)]
    with open(path, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def restart() -> None:
    """Replace this process by a fresh one with the same command line, which goes on with the next run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, alone())


def run_worker(spec: SweepSpec, spec_path: Path) -> int:
    """``salient-ds sweep SPEC.yaml --worker``: work until every run has ended, and return the exit status."""
    try:
        worker = Worker(spec, spec_path, SweepFolder(Path(spec.output_dir)))
    except ConfigError as error:
        print_problems(error.problems)
        return RUN_ERROR
    return worker.work()
