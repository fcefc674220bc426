"""Progress for people: two live lines on a terminal, plain lines in a log file. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY = 5.0  # seconds between two plain lines
MOMENT = 2.0  # seconds that need no bar
SPARE = 4  # columns left free: a terminal shows Ctrl-C as ^C, and a line that it breaks could not be drawn over
LEAST_BAR, MOST_BAR = 6, 40  # columns
SPEED = ("img/s", "data wait")  # of what `for_people` gives: they stand in the first line
PROBES = ("kNN", "linear")  # begin the names of what is measured rarely, of which a line stays


class TrainingProgress:
    """`update` at every log step; `say` prints a sentence above the live lines. A number stays until there is a newer
    one."""

    def __init__(self, total: int, start: int, title: str, show: bool) -> None:
        self.total, self.start, self.title, self.show = total, start, title, show
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.done, self.epoch, self.doing, self.numbers = start, 0, "", dict[str, str]()
        self.began = self.printed = time.monotonic()
        self.left: float | None = None  # seconds, where somebody knows better than this clock

    def __enter__(self) -> TrainingProgress:
        if self.show and self.console.is_terminal:
            self.live = Live(self, console=self.console)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def step(self, step: int) -> None:
        self.done, self.doing = step, ""

    def update(self, step: int, epoch: int, numbers: Mapping[str, str]) -> None:
        self.done, self.epoch, known = step, epoch, list(NAMES.values())
        place = lambda item: known.index(item[0]) if item[0] in known else len(known)
        self.numbers = dict(sorted((self.numbers | dict(numbers)).items(), key=place))  # what matters most comes first
        probes = {name: value for name, value in numbers.items() if name.startswith(PROBES)}
        if probes and self.live is not None:
            self.say(f"epoch {epoch}  step {step}  {_joined(probes)}")
        due = time.monotonic() - self.printed >= PLAIN_EVERY or step == self.total or probes
        if self.show and self.live is None and due:
            self.printed = time.monotonic()
            place = f"{self.title}  epoch {epoch}  step {step}/{self.total}  eta {self.eta()}"
            self.say(f"{place}  {_joined(self.numbers)}")

    def note(self, what: str, done: int, of: int) -> None:
        """How far something is that comes between two steps."""
        self.doing = f"{what} of {done} of {of} images"
        if self.live is None and time.monotonic() - self.printed >= PLAIN_EVERY:
            self.printed = time.monotonic()
            self.say(f"{self.title}  {self.doing}")

    def say(self, text: str) -> None:
        if self.show:
            self.console.print(text, markup=False)

    def eta(self) -> str:
        """At the mean speed since the start."""
        if self.left is not None:
            return duration(self.left)
        if self.done == self.start:
            return "-:--" if self.done < self.total else duration(0)
        return duration((time.monotonic() - self.began) / (self.done - self.start) * (self.total - self.done))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The live lines. The step and the time left are always there; where columns are few, the bar is shorter, then
        the speed goes, then a part of the name."""
        room = options.max_width - SPARE
        place = f"{self.done}/{self.total}  eta {self.eta()}"
        speed = "  ".join(f"{name} {self.numbers[name]}" for name in SPEED if name in self.numbers)
        name = min(len(self.title), max(room - len(place) - LEAST_BAR - 4, 0))
        with_speed = f"{place}  {speed}" if speed else place
        if len(with_speed) + LEAST_BAR + min(name, room // 4) + 4 <= room:
            place, name = with_speed, min(name, room - len(with_speed) - LEAST_BAR - 4)
        title = self.title if name == len(self.title) else self.title[: max(0, name - 1)] + "…" * (name > 0)
        bar = max(0, min(room - len(place) - len(title) - 4, MOST_BAR))
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(Text(title), ProgressBar(self.total, self.done, width=bar), Text(place), Text(""))
        shown = [self.doing] if self.doing else [f"epoch {self.epoch}"] if self.epoch else []
        texts = [f"{name} {value}" for name, value in self.numbers.items() if name not in SPEED]
        if len("  ".join([*shown, *texts])) > room:  # every number is worth more than what some are by chance
            texts = [text.split(" (")[0] for text in texts]
        for text in texts:
            if len("  ".join([*shown, text])) <= room:
                shown.append(text)
        yield Group(line, Text("  ".join(shown)[:room], no_wrap=True))


def _joined(numbers: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in numbers.items())


NAMES = {
    "loss/info_nce": "info_nce",
    "loss/windows": "windows",
    "loss/dense": "dense",
    "loss/grouping": "grouping",
    "loss/slots": "slots",
    "loss/multi_label": "multi_label",
    "loss/words": "words",
    "knn/map": "kNN mAP",
    "knn/top1": "kNN top-1",
    "linear/map": "linear mAP",
    "linear/top1": "linear top-1",
    "dense/miou": "dense mIoU",
    "labels/overlap": "overlap",
    "dictionary/fill": "dictionary",
}
# What a number would be by chance: the loss of a network that tells nothing apart, of random rows as positives, of an
# untrained network, …
CHANCE = {
    "loss/info_nce": "chance/info_nce",
    "loss/windows": "chance/windows",
    "loss/dense": "chance/dense",
    "loss/multi_label": "loss/multi_label_random_rows",
    "loss/words": "chance/words",
    "labels/overlap": "labels/overlap_chance",
    "dense/miou": "dense/miou_untrained",
}


WORDS = {"random_rows": "random rows", "untrained": "untrained"}


def names_of(logged: Collection[str]) -> dict[str, str]:
    """What is told of a log: each term of the loss, or the loss where it has no terms."""
    return NAMES if any(name in logged for name in NAMES if name.startswith("loss/")) else {"loss": "loss", **NAMES}


def for_people(values: Mapping[str, float]) -> dict[str, str]:
    """The few numbers of a log line that are worth a glance, beside what they are by chance: a loss of a network that
    tells nothing apart, the multi-label loss of random rows as positives.

    >>> for_people({"loss/info_nce": 5.0, "chance/info_nce": 7.69, "lr": 0.1})
    {'info_nce': '5.000 (chance 7.69)'}
    >>> for_people({"loss": 0.5, "lr": 0.1})
    {'loss': '0.500'}
    """
    numbers = {short: f"{values[name]:.3f}" for name, short in names_of(values).items() if name in values}
    for name, by_chance in CHANCE.items():
        if name in values and by_chance in values:
            word = next((word for end, word in WORDS.items() if by_chance.endswith(end)), "chance")
            numbers[NAMES[name]] += f" ({word} {values[by_chance]:.2f})"
    if "images_per_second" in values:
        numbers["img/s"] = f"{values['images_per_second']:.0f}"
        numbers["data wait"] = f"{values['data_wait']:.0%}"
    return numbers


def summary(rows: Sequence[Mapping[str, float | None]]) -> list[list[str]]:
    """Of a run's log, what is worth a glance: its name, the first and the last value, and what it is by chance.

    >>> summary([{"loss/info_nce": 6.0, "chance/info_nce": 7.62}, {"loss/info_nce": 5.0}, {"knn/map": 0.374}])
    [['info_nce', '6.000', '5.000', '7.620'], ['kNN mAP', '0.374', '0.374', '']]
    """
    found = []
    for name, short in names_of({name for row in rows for name in row}).items():
        values = [value for row in rows if (value := row.get(name)) is not None]
        by_chance = [value for row in rows if (value := row.get(CHANCE.get(name, ""))) is not None]
        if values and name != "dictionary/fill":
            found.append([short, *(f"{value:.3f}" for value in (values[0], values[-1], *by_chance[-1:]))])
            found[-1] += [""] * (4 - len(found[-1]))
    return found


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
