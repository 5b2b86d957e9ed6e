"""Answer the questions with a model in this process. Under a launcher, each process answers its share."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answer_file import AnswerJournal, answer_row, remove_answers
from .answering import Prompter, answer_batch, fixed_batches, turn_seed
from .questions import Question
from .store import Row

WAIT_MINUTES = 2880.0
"""How long processes wait for the slowest one, which may have got all the long answers."""


@dataclass(frozen=True)
class Job:
    """What to ask, how, and where to store the answers. ``settings`` must be the same when a run is continued."""

    model_id: str
    path: Path
    questions: tuple[Question, ...]
    temperatures: dict[int, float] | None
    """By question; None: the server's default."""
    seed: int
    settings: Row
    overwrite: bool = False

    def seed_of(self, question_id: int, turn: int) -> int:
        """Return the random seed of one turn."""
        return turn_seed(self.seed, question_id, turn)

    @property
    def ids(self) -> list[int]:
        return [question.question_id for question in self.questions]


def global_rank_and_size() -> tuple[int, int]:
    """Return this process's number and the number of processes; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined_processes(together: bool) -> Iterator[Callable[[], None]]:
    """Join the launcher's processes and yield a barrier. It uses gloo, also on GPUs, unless one model is split."""
    if global_rank_and_size()[1] == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    if together:
        from .tensor_parallel import join_group

        join_group(WAIT_MINUTES)
    else:
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=WAIT_MINUTES))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


def answer_locally(
    job: Job, prompter: Prompter, load: Callable[[], Any], batch_size: int, together: bool = False
) -> list[Row] | None:
    """Answer all questions that are not answered yet. The answer file is written when the last process is done.

    Args:
        load: makes the LocalAnswerer. It is not called if nothing is left to answer.
        together: all processes run all batches, because one model is split over them. Otherwise each runs its share.

    Returns:
        The rows of the answer file on the main process, None on the others.

    Raises:
        ValueError: AnswerJournal raised it, the GPU's memory is too small for the batch, or the nodes do not share the
            answer folder.
    """
    global_rank, size = global_rank_and_size()
    lengths = {question.question_id: len(prompter.tokens(question, ())) for question in job.questions}
    batches = fixed_batches(job.questions, lengths, batch_size)
    shares = 1 if together else size
    with joined_processes(together) as barrier:
        if job.overwrite and global_rank == 0:
            remove_answers(job.path)
        barrier()
        with AnswerJournal(job.path, job.settings, global_rank) as journal:
            share = batches[global_rank % shares :: shares]
            mine = [batch for batch in share if any(q.question_id not in journal.done for q in batch)]
            _answer(job, mine, prompter, load, journal, writes=not together or global_rank == 0)
            barrier()
            rows = journal.merge(job.ids) if global_rank == 0 else None
        barrier()
    if global_rank == 0 and rows is None:
        raise ValueError(
            f"{job.path.parent} lacks the answers of other processes: on several nodes it must be a shared folder"
        )
    return rows


def _answer(
    job: Job, batches: list[list[Question]], prompter: Prompter, load: Callable[[], Any], journal: AnswerJournal,
    writes: bool,
) -> None:  # fmt: skip
    """Run whole batches, even if some of their questions are answered already (see :func:`fixed_batches`)."""
    if not batches:
        return
    assert job.temperatures is not None, "only a server has temperatures of its own"
    import torch

    model = load()
    count = sum(map(len, batches))
    with tqdm(total=count, unit="question", desc=job.model_id, disable=journal.global_rank > 0) as bar:
        for batch in batches:
            try:
                results = answer_batch(batch, prompter, model, job.temperatures, job.seed_of)
            except torch.cuda.OutOfMemoryError:
                raise ValueError(
                    f"the GPU's memory is too small for batches of {len(batch)}: lower --batch-size; what is answered "
                    "is kept"
                ) from None
            for number, turns in results.items():
                if number not in journal.done and writes:
                    journal.add(answer_row(job.model_id, number, turns, job.settings))
            bar.update(len(batch))
