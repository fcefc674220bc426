"""Progress for people: a live bar on a terminal, plain lines in a log file. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 5.0  # seconds between two plain lines
MOMENT = 2.0  # seconds that need no bar


class TrainingProgress:
    """`update` at every log step; `say` prints a sentence without disturbing the bar."""

    def __init__(self, total: int, start: int, title: str, show: bool) -> None:
        self.total, self.start, self.title, self.show = total, start, title, show
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        if self.show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, numbers="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def update(self, step: int, epoch: int, numbers: Mapping[str, str]) -> None:
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=text)
        elif self.show and (time.monotonic() - self.printed >= PLAIN_EVERY or step == self.total):
            self.printed = time.monotonic()
            left = (self.printed - self.began) / max(1, step - self.start) * (self.total - step)
            self.say(f"{self.title}  epoch {epoch}  step {step}/{self.total}  eta {duration(left)}  {text}")

    def note(self, what: str, done: int, of: int) -> None:
        """How far something is that comes between two steps."""
        text = f"{what} of {done} of {of} images"
        if self.bar is not None:
            self.bar.update(self.task, numbers=text)
        elif time.monotonic() - self.printed >= PLAIN_EVERY:
            self.printed = time.monotonic()
            self.say(f"{self.title}  {text}")

    def say(self, text: str) -> None:
        if self.show:
            self.console.print(text, markup=False)


NAMES = {
    "loss/info_nce": "info_nce",
    "loss/windows": "windows",
    "loss/multi_label": "multi_label",
    "dictionary/fill": "dictionary",
}
NAMES |= {"labels/overlap": "overlap", "knn/map": "kNN mAP", "knn/top1": "kNN top-1"}
NAMES |= {"linear/map": "linear mAP", "linear/top1": "linear top-1"}


def for_people(values: Mapping[str, float]) -> dict[str, str]:
    """The few numbers of a log line that are worth a glance, each loss beside the value of knowing nothing.

    >>> for_people({"loss/info_nce": 5.0, "chance/info_nce": 7.69, "lr": 0.1})
    {'info_nce': '5.000 (chance 7.69)'}
    """
    numbers = {short: f"{values[name]:.3f}" for name, short in NAMES.items() if name in values}
    for loss in ("info_nce", "windows", "multi_label"):
        if loss in numbers and f"chance/{loss}" in values:
            numbers[loss] += f" (chance {values['chance/' + loss]:.2f})"
    if "labels/overlap" in values:
        numbers["overlap"] += f" (chance {values['labels/overlap_chance']:.2f})"
    if "images_per_second" in values:
        numbers["img/s"] = f"{values['images_per_second']:.0f}"
        numbers["data wait"] = f"{values['data_wait']:.0%}"
    return numbers


@contextmanager
def counting(text: str, total: int, show: bool = True, start: int = 0) -> Iterator[Callable[..., None]]:
    """Gives a function that takes how many are done (and of how many, where that was not known before): a bar on a
    terminal, a line every few seconds elsewhere; on stderr, and only where the work takes longer than a moment."""
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(text, total=total, completed=start)
    began = printed = time.monotonic()

    def advance(done: int, of: int = total) -> None:
        nonlocal printed
        now = time.monotonic()
        # Not before worker processes have started either: they would inherit the lock of the bar's thread.
        if show and console.is_terminal and not bar.live.is_started and now - began > MOMENT:
            bar.start()
        bar.update(task, completed=done, total=of)
        if show and not console.is_terminal and now - printed > PLAIN_EVERY:
            printed = now
            left = (now - began) / max(1, done - start) * (of - done)
            console.print(f"{text}: {done} of {of}, eta {duration(left)}", markup=False)

    try:
        yield advance
    finally:
        if bar.live.is_started:  # stopping prints a line even where nothing was shown
            bar.stop()


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(3700), duration(90000)
    ('0:59', '1:01:40', '1d 1:00:00')
    """
    days, rest = divmod(int(seconds), 86400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    clock = f"{hours}:{minutes:02d}:{rest % 60:02d}" if hours or days else f"{minutes}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
