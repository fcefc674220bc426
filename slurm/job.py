"""What runs inside a job. Submitit pickles a `Job`, which is no more than the name of a folder; everything else is read
from files when it starts, so a requeued job, or one that lost its node, goes on from what is on disk."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError

from mls import plugins
from mls.errors import EXIT_MISTAKE, EXIT_SAVED, Stopped, UserError, command, of_the_machine
from mls.files import write_atomically
from mls.signals import end_with_data_workers
from mls.slurm import job_spec, rendezvous, scheduler

PAUSES = (2.0, 10.0, 30.0)  # seconds before SLURM is asked again


class Job:
    """Call the function that FOLDER/submission/job_spec.json names; if it is done already, return at once."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again: the same folder. Training has saved by itself before submitit calls this."""
        return submitit.helpers.DelayedSubmission(Job(self.folder))

    def __call__(self) -> None:
        spec = job_spec.read(self.folder)
        if spec.done:
            return
        requeue = signal.getsignal(submitit.JobEnvironment._usr_sig())  # submitit's handler; training replaces it
        task = _task() if spec.cluster != "debug" else rendezvous.Task(0, 1, 0, 1, str(os.getpid()))
        spec = replace(spec, job=task.job)  # the file gets the number only after the submission
        with contextlib.suppress(FileNotFoundError):  # it exists on the login node only: absolute paths still work
            os.chdir(spec.directory)
        spec.record("started", rank=task.rank, node=os.environ.get("SLURMD_NODENAME"), code=_code())
        # Until training handles signals itself, there is nothing to save: end at once, not at SLURM's SIGKILL.
        before_training = Stopped("a signal came before training began", EXIT_SAVED)
        signal.signal(signal.SIGTERM, lambda number, frame: _end(spec, task, before_training, requeue))
        try:
            rendezvous.set_torch_environment(task, spec.submission)
            _call(spec)
        except Stopped as stopped:
            _end(spec, task, stopped, requeue)
        except Exception as error:
            if mistake := error if isinstance(error, UserError) else of_the_machine(error):
                spec.record("failed", rank=task.rank, error=str(mistake))
                print(f"error: {mistake}", file=sys.stderr, flush=True)
                end_with_data_workers()
                sys.exit(EXIT_MISTAKE)
            # Not raised further: submitit would print it once more, as a failure of its own.
            spec.record("failed", rank=task.rank, error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            sys.stderr.flush()
            sys.exit(1)
        if task.rank == 0:
            spec.record("done", rank=0)
            if not spec.done:
                write_atomically(Path(spec.folder) / "DONE", b"done\n")


def _call(spec: job_spec.JobSpec) -> None:
    plugins.load(spec.plugins, spec.plugins)
    module, _, function = spec.call.partition(":")
    try:
        getattr(importlib.import_module(module), function)(**spec.arguments)
    finally:
        if "torch" in sys.modules:
            from mls import distributed

            distributed.stop()


def _end(spec: job_spec.JobSpec, task: rendezvous.Task, stopped: Stopped, requeue: Any) -> None:
    """End this process after all was saved. Rank 0 has the job queued again; the others exit with 0: any other code
    would make SLURM kill rank 0 before it has done so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `scontrol requeue` sends one, too
    if task.rank:
        sys.exit(0)
    spec.record("stopped", rank=0, message=str(stopped))
    print(stopped, file=sys.stderr, flush=True)
    # Exit codes 0 (engine.max_steps) and 130 (Ctrl-C): the job is not queued again.
    if stopped.exit_code != EXIT_SAVED or spec.cluster == "debug" or not scheduler.wants_requeue():
        sys.exit(stopped.exit_code)
    try:
        _until_slurm_answers(lambda: requeue(submitit.JobEnvironment._usr_sig(), None))
    except (UncompletedJobError, subprocess.SubprocessError) as refused:
        reason = f"{refused} Submit it again: {command('mls submit pretrain --resume', spec.folder)}"
        spec.record("failed", rank=0, error=reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(EXIT_MISTAKE)


def _until_slurm_answers(action: Callable[[], None]) -> None:
    """A controller that is busy or restarts refuses `scontrol requeue` for a while."""
    for pause in PAUSES:
        try:
            return action()
        except subprocess.SubprocessError as error:
            print(f"{error}: once more in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    action()


def _task() -> rendezvous.Task:
    job = submitit.JobEnvironment()
    return rendezvous.Task(job.global_rank, job.num_tasks, job.local_rank, job.num_tasks // job.num_nodes, job.job_id)


def _code() -> str:
    """The folder from which `mls` was imported."""
    import mls

    return str(Path(mls.__path__[0]).parent)
