"""What runs inside a job. Submitit pickles a `Job`, which is no more than the name of a folder; everything else is read
from files when it starts, so a requeued job, or one that lost its node, goes on from what is on disk."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError

from mls.errors import EXIT_MISTAKE, EXIT_SAVED, Stopped, UserError
from mls.files import write_atomically
from mls.slurm import meeting, order, scheduler


class Job:
    """Call what FOLDER/submission/order.json says; once that is done, return at once."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again: the same folder. Training has saved by itself before this is asked."""
        return submitit.helpers.DelayedSubmission(Job(self.folder))

    def __call__(self) -> None:
        todo = order.read(self.folder)
        if todo.done:
            return
        requeue = signal.getsignal(submitit.JobEnvironment._usr_sig())  # submitit's; training puts its own in its place
        task = _task() if todo.cluster != "debug" else meeting.Task(0, 1, 0, 1, str(os.getpid()))
        todo = replace(todo, job=task.job)  # the file learns it only after the submission
        with contextlib.suppress(FileNotFoundError):  # a folder of the login node only: absolute paths still hold
            os.chdir(todo.directory)
        todo.note("started", rank=task.rank, node=os.environ.get("SLURMD_NODENAME"), code=_code())
        # Until training listens for itself, there is nothing to save: leave at once, not when SLURM loses patience.
        early = Stopped("a signal came before training began", EXIT_SAVED)
        signal.signal(signal.SIGTERM, lambda number, frame: _leave(todo, task, early, requeue))
        try:
            meeting.tell_torch(task, todo.place)
            _call(todo)
        except Stopped as stopped:
            _leave(todo, task, stopped, requeue)
        except UserError as mistake:
            todo.note("failed", rank=task.rank, error=str(mistake))
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            sys.exit(EXIT_MISTAKE)
        except Exception as error:
            # Not raised further: submitit would print it once more, as a failure of its own.
            todo.note("failed", rank=task.rank, error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            sys.stderr.flush()
            sys.exit(1)
        if task.rank == 0:
            todo.note("done", rank=0)
            if not todo.done:
                write_atomically(Path(todo.folder) / "DONE", b"done\n")


def _call(todo: order.Order) -> None:
    module, _, function = todo.call.partition(":")
    try:
        getattr(importlib.import_module(module), function)(**todo.arguments)
    finally:
        if "torch" in sys.modules:
            from mls import distributed

            distributed.stop()


def _leave(todo: order.Order, task: meeting.Task, stopped: Stopped, requeue: Any) -> None:
    """Nothing more is to be saved. Rank 0 asks for the next start; the others end quietly: another exit code than 0
    would end rank 0 before it has asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # queueing again sends one, too
    if task.rank:
        sys.exit(0)
    todo.note("stopped", rank=0, message=str(stopped))
    print(stopped, file=sys.stderr, flush=True)
    # 0 is engine.max_steps, 130 Ctrl-C: nobody asked for more.
    if stopped.exit_code != EXIT_SAVED or todo.cluster == "debug" or not scheduler.wants_requeue():
        sys.exit(stopped.exit_code)
    try:
        requeue(submitit.JobEnvironment._usr_sig(), None)
    except UncompletedJobError as refused:
        reason = f"{refused} Submit it again: `mls submit pretrain --resume {todo.folder}`"
        todo.note("failed", rank=0, error=reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(EXIT_MISTAKE)


def _task() -> meeting.Task:
    here = submitit.JobEnvironment()
    local_world = here.num_tasks // here.num_nodes
    return meeting.Task(here.global_rank, here.num_tasks, here.local_rank, local_world, here.job_id)


def _code() -> str:
    """The folder from which `mls` was imported."""
    import mls

    return str(Path(mls.__path__[0]).parent)
