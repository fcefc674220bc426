"""What every training loop does around its step: signals, agreement of the processes, saving, progress, events, resume.
The loop takes its step and calls `end_step`; what a step is, and what its state is made of, is its own business."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mls import distributed
from mls.engine.checkpoint import BackgroundWriter, Checkpoints, snapshot
from mls.engine.events import EventLog, commit, device_name, versions
from mls.errors import EXIT_LOST, Stopped
from mls.progress import TrainingProgress
from mls.signals import StopFlag


class Training(Protocol):
    """What a session knows of the loop. It gives back `state_dict` from `Session.restore`."""

    step: int  # steps taken

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs. Every rank is asked at the same step, so it may hold collectives."""
        ...


@dataclass(frozen=True)
class Saving:
    """Where a session saves and how often: after so many minutes at the latest, and every so many steps."""

    checkpoints: Checkpoints
    events: Path
    minutes: float = 10.0
    steps: int | None = None  # None: by time alone
    check: Callable[[dict[str, Any]], None] | None = None  # raises where a snapshot must not be written
    export: Callable[[dict[str, Any]], None] | None = None  # writes more from the snapshot that was saved

    @classmethod
    def in_folder(cls, folder: Path | None, seconds: float) -> Saving | None:
        """Of a training whose state is removed with its folder once it has a result."""
        return None if folder is None else cls(Checkpoints(folder, keep_last=1), folder / "events.jsonl", seconds / 60)


class Session:
    """
    state = session.restore()                # None, or what state_dict() gave
    with session.running(title):             # signals, progress and events; at the end all is saved
        while ...:
            training.step += 1
            ...
            session.end_step()               # saves where it is due; raises Stopped after a signal

    A save copies the state to host memory, and a thread writes it while training goes on. At most one is being written:
    the next save waits for it. A failure to write is raised at the next step, on all ranks.
    """

    def __init__(
        self,
        training: Training,
        total: int,
        saving: Saving | None,
        device: torch.device,
        how_to_resume: str = "the same call goes on",
    ) -> None:
        self.training, self.total, self.saving, self.device = training, total, saving, device
        self.how_to_resume = how_to_resume
        self.main = distributed.rank() == 0
        self.writer = BackgroundWriter()
        self.events = EventLog(saving.events if saving is not None and self.main else None)
        self.stop = StopFlag()
        self.doubtful = False  # is it in doubt whether this state is a good one?
        self.ended = "finished"  # the reason in events.jsonl; a loop that ends early may give another
        self._agreement: tuple[int, bool] | None = None

    def restore(self) -> dict[str, Any] | None:
        """The state in the newest whole checkpoint, if there is one."""
        return None if self.saving is None else self.saving.checkpoints.newest(self.say)

    @contextlib.contextmanager
    def running(self, title: str = "", quiet: bool = False) -> Iterator[None]:
        step, show = self.training.step, self.main and not quiet
        with self.stop, TrainingProgress(self.total, step, title, show) as self.progress:
            on = {"device": device_name(self.device), "versions": versions(), "code": commit()}
            self.events.write("resume" if step else "start", step=step, total=self.total, **on)
            if self.saving is not None and self.main:
                self.saving.checkpoints.remove_unfinished()
            # A process that died between its checkpoint and the export of it noted no save: then step is saved again.
            (half,) = distributed.largest([float(self.main and self.events.last_saved != step)], self.device)
            self.saved_step, self.saved_at = -1 if half else step, time.monotonic()
            if step:
                self.say(f"{title} resumed after step {step} of {self.total}")
            try:
                with distributed.telling_lost_processes(f"{self.how_to_resume} from the last checkpoint"):
                    yield
                    self.finish()
                self.events.write("stop", reason=self.ended, step=self.training.step)
            except BaseException as error:
                self._abandon(error)
                raise

    # ------------------------------------------------------------------------------------------------ every step

    def agree(self, *flags: bool) -> list[bool]:
        """Whether any rank raised each of these flags. The one exchange of a step, which also settles whether to save
        and to stop: a loop that has flags of its own calls it once in its step, otherwise `end_step` does."""
        due = self.main and self.saving is not None and time.monotonic() - self.saved_at >= self._patience()
        own = [float(self.stop.exit_code), float(due), float(self.writer.error is not None), *map(float, flags)]
        code, due, failed, *agreed = distributed.largest(own, self.device)
        if failed:
            self._raise_failure()
        self._agreement = (int(code), bool(due))
        return [bool(flag) for flag in agreed]

    @property
    def stopping(self) -> bool:
        """Have the processes agreed to stop?"""
        return self._agreement is not None and self._agreement[0] != 0

    def end_step(self, milestone: bool = False, doubtful: bool = False) -> None:
        """Save if it is time to. After a signal, which may have reached another rank, save and raise `Stopped`. A state
        in doubt is saved only where there is no other time to, and then beside all good ones."""
        self.doubtful = doubtful
        if self._agreement is None:
            self.agree()
        assert self._agreement is not None
        (code, due), self._agreement = self._agreement, None
        step, every = self.training.step, self.saving and self.saving.steps
        self.progress.step(step)
        asked = milestone or (not doubtful and (due or (every and step % every == 0)))
        if asked or (code and self.saved_step != step):  # after a refresh that a signal ended the step is saved already
            self.save(milestone)
        if code:
            self._settle()
            raise Stopped(self.farewell("a signal came"), code)

    def farewell(self, why: str) -> str:
        saved = "everything is saved" if self.saving is not None else "nothing was to be saved"
        return f"{why}: stopped after step {self.training.step} of {self.total}, {saved}; {self.how_to_resume}"

    def say(self, text: str) -> None:
        if hasattr(self, "progress"):
            self.progress.say(text)
        elif self.main:  # before the training runs
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Of what is amiss, also where nobody watches."""
        self.events.write("warning", step=self.training.step, text=text)
        self.say(text)

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, milestone: bool = False) -> None:
        """Copy the state now, write it beside what follows. Every rank calls this: sharded memories are gathered."""
        step, began = self.training.step, time.monotonic()
        self.saved_step, self.saved_at = step, began
        if self.saving is None:
            return
        self.writer.wait()  # at most one snapshot is in memory
        copying = time.monotonic()
        state = self.training.state_dict()
        if self.main and self.writer.error is None:
            state = snapshot(state)
            facts = {"step": step, "copy_seconds": round(time.monotonic() - copying, 3)}
            self.writer.start(partial(self._write, self.saving, state, facts, milestone, not self.doubtful))

    def finish(self) -> None:
        """Returns when everything up to this step is on the disk, on all ranks."""
        if self.saved_step != self.training.step:
            self.save()
        self._settle()

    def _write(
        self, saving: Saving, state: dict[str, Any], facts: dict[str, Any], milestone: bool, prune: bool
    ) -> None:
        began = time.monotonic()
        if saving.check is not None:
            saving.check(state)
        saving.checkpoints.save(facts["step"], state, milestone, prune)
        if saving.export is not None:
            saving.export(state)
        self.events.write("save", **facts, write_seconds=round(time.monotonic() - began, 3))

    def _patience(self) -> float:
        """Seconds between two snapshots. What a kill may cost also holds the time until the second one is written."""
        assert self.saving is not None
        longest = 60 * self.saving.minutes
        return max(longest / 2, longest - self.writer.seconds)

    def _settle(self) -> None:
        """Wait for the last write; whether it failed is learnt by all ranks."""
        self.writer.wait()
        (failed,) = distributed.largest([float(self.writer.error is not None)], self.device)
        if failed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self.writer.error is not None:
            raise self.writer.error
        raise Stopped("rank 0 could not save", EXIT_LOST)

    def _abandon(self, error: BaseException) -> None:
        """The loop ends by an error or a signal: let the last write end, and note why."""
        if not isinstance(error, KeyboardInterrupt):  # a second Ctrl-C waits for nothing
            self.writer.wait()
        self.events.write("stop", reason=self._reason(error), step=self.training.step)
        failure = self.writer.error
        if failure is not None and failure is not error:
            self.say(f"the last checkpoint could not be written either: {failure}")

    def _reason(self, error: BaseException) -> str:
        if not isinstance(error, Stopped):
            return f"{type(error).__name__}: {error}"
        if error.exit_code == EXIT_LOST:
            return str(error) or "another process is gone"
        return (self.stop.name or "a signal to another process") if error.exit_code else str(error).partition(":")[0]
