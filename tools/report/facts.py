"""What `mls report` says of a run in words and numbers: its state, speed and end, what its recipe expects, results of
its weights, what was changed. Curves are in curves.py, pictures in gallery.py."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mls.engine import events
from mls.engine.run import compared, computes, probe_of
from mls.engine.status import state_of
from mls.tools.report.curves import Axis, Log, read_log

if TYPE_CHECKING:
    from mls.config import Config
    from mls.engine import Run

IDENTITY = {"run.name", "run.root", "run.recipe"}  # keys that tell runs apart and change nothing
LONGEST = 300  # characters of a text that is somebody's
Change = tuple[str, Any, Any]  # key, value there, value here


def clip(text: str) -> str:
    """
    >>> clip("a" * 1000) == "a" * 150 + " … " + "a" * 147
    True
    """
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[3 - LONGEST // 2 :]}"


@dataclass
class Card:
    """What the page says about one run."""

    label: str
    run: Run
    log: Log = field(default_factory=Log)
    events: list[dict[str, Any]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)  # sentences about files that cannot be read
    labels: Path | None = None  # a table with labels of some images

    @classmethod
    def of(cls, run: Run, label: str, labels: Path | None = None) -> Card:
        card = cls(clip(label), run, read_log(run.path / "metrics.jsonl"), events.read(run.path / "events.jsonl"))
        card.labels = labels
        if card.log.odd:
            first = f"the first is line {card.log.first_odd}"
            card.odd.append(f"metrics.jsonl: left out {card.log.odd} lines that hold no row, {first}")
        return card

    @cached_property
    def config(self) -> Config:
        return self.run.config

    @cached_property
    def saved(self) -> tuple[int, int | None]:
        """The step of the exported weights, and the steps of the whole run as their card tells."""
        file = self.run.path / "backbone.json"
        try:
            facts = json.loads(file.read_bytes()) if file.is_file() else {"step": 0, "epochs": 0}
            step, epochs = int(facts["step"]), facts["epochs"]
            return step, round(self.config.optim.epochs * step / epochs) if epochs else None
        except (ValueError, RecursionError, KeyError, TypeError, OverflowError, OSError):
            self.odd.append("backbone.json cannot be read: how far the run is follows from metrics.jsonl alone")
            return 0, None

    @property
    def reached(self) -> int:
        return max(self.saved[0], self.log.step)

    @cached_property
    def total(self) -> int | None:
        """Of all epochs, where something tells it."""
        told = [row["total"] for row in self.events if type(row.get("total")) is int and row["total"] > 0]
        return told[-1] if told else self.saved[1]

    @property
    def axis(self) -> Axis:
        per_epoch = self.total / self.config.optim.epochs if self.total else None
        return Axis(self.config.data.batch_size, per_epoch, _pauses(self.events))

    @cached_property
    def heard(self) -> float | None:
        """When the run last wrote something, in seconds since 1970."""
        file = self.run.path / "metrics.jsonl"
        times = [events.seconds(row) for row in self.events[-1:]] + [self.log.last_time]
        known = [one for one in times if one]
        return max(known) if known else file.stat().st_mtime if file.is_file() else None

    @cached_property
    def speed(self) -> float | None:
        """Images a second, the median of the later half."""
        values = self.late("images_per_second")
        return median(values) if values and median(values) > 0 else None

    def late(self, metric: str) -> list[float]:
        series = self.log.series.get(metric)
        known: list[float] = [value for value in series.points()[1] if value is not None] if series else []
        return known[len(known) // 2 :]

    @property
    def left(self) -> float | None:
        """Seconds to the end, at this speed."""
        if self.total is None or self.speed is None:
            return None
        return max(0, self.total - self.reached) * self.config.data.batch_size / self.speed

    @cached_property
    def from_recipe(self) -> list[Change] | str:
        """What was changed; a sentence where there is nothing to compare with."""
        from mls.config import differences
        from mls.recipes import load_config, recipes

        if self.config.run.recipe not in recipes():
            return "unknown, because the recipe does not ship with mls"
        changes = differences(load_config(self.config.run.recipe), self.config)
        return [change for change in changes if change[0] not in IDENTITY]


def _pauses(happened: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    found, before = [], 0.0
    for row in happened:
        now = events.seconds(row)
        if row["event"] == "resume" and 0 < before < now:
            found.append((before, now))
        before = now or before
    return found


def state(card: Card) -> tuple[str, str]:
    """In one word, as `mls runs` says it, and more about it."""
    epochs = card.config.optim.epochs
    of = f" of {card.total:,}" if card.total else f", epoch {card.log.epoch:,} of {epochs:,}"
    word, why = state_of(card.run, card.events)
    if word == "done":
        return word, f"{card.reached:,} steps, {epochs:,} epochs"
    if word == "new" and card.reached:  # of version 0.1, which told no events
        return "silent", f"not finished: step {card.reached:,}{of}"
    return word, f"step {card.reached:,}{of}: {clip(why)}"


def next_command(card: Card) -> str:
    """What to paste next, shell-quoted."""
    import shlex

    path, scenes = str(card.run.path), card.config.data.source == "scenes"
    if state(card)[0] == "running":
        return shlex.join(["mls", "report", path])
    if not card.run.done:
        return shlex.join(["mls", "pretrain", "--resume", path])
    # Other images may have no labels to probe with, neighbours they have.
    words = ["eval", "run", *probe_of(card.config), "--weights", path] if scenes else ["neighbours", path, "--figure"]
    return shlex.join(["mls", *words])


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""
    command: bool = False


def tiles(card: Card, now: float | None = None) -> list[Tile]:
    from mls.progress import duration

    now = time.time() if now is None else now
    word, more = state(card)
    found = [Tile("State", word, more)]
    if card.heard is not None:
        ago = "" if word == "done" else f"{duration(max(0, now - card.heard))} ago"
        found.append(Tile("Last heard", time.strftime("%Y-%m-%d %H:%M", time.localtime(card.heard)), ago))
    if card.left and word != "done":
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + card.left))
        found.append(Tile("To come", duration(card.left), f"{at} if it trains on now"))
    if card.speed:
        found.append(Tile("Images/s", f"{card.speed:,.0f}", _whole_time(card)))
    if wait := card.late("data_wait"):
        found.append(Tile("Data wait", f"{median(wait):.1%}", "of the time"))
    found += [*_results(card), Tile("Next", next_command(card), command=True)]
    return found


def _whole_time(card: Card) -> str:
    from mls.progress import duration

    if card.total is None or card.speed is None:
        return ""
    batch = card.config.data.batch_size
    return f"{card.total:,} steps of {batch:,} images take {duration(card.total * batch / card.speed)} at this speed"


def _results(card: Card) -> list[Tile]:
    """What came out beside what the recipe expects, where this run is the recipe's."""
    names = {"linear/map": "linear mAP", "linear/top1": "linear top-1", "knn/map": "kNN mAP", "knn/top1": "kNN top-1"}
    names["dense/miou"] = "dense mIoU"
    last = {words: card.log.series[key].last for key, words in names.items() if key in card.log.series}
    known = {words: value for words, value in last.items() if value is not None}
    got = ", ".join(f"{words} {100 * value:.1f}" for words, (value, _) in known.items())
    at = f"step {max((step for _, step in known.values()), default=0):,}"
    notes = notes_of_recipe(card.config.run.recipe)
    other = not_the_recipes(card, notes) if notes else ""
    found = [Tile("Result", got, f"online probes at {at}, on images held out")] if got else []
    if other:
        return [*found, Tile("Expected", "–", f"the recipe’s numbers are not for this run: {other}")]
    return [*found, *(Tile(name, "", words) for name, words in notes.items())]


def notes_of_recipe(recipe: str) -> dict[str, str]:
    from mls.recipes import find_recipe, recipes

    if recipe not in recipes():
        return {}
    text = find_recipe(recipe).read_text(encoding="utf-8")
    found = re.findall(r"^# (Cost|Expected): *(.+(?:\n#  +.+)*)", text, re.MULTILINE)  # continued lines are indented
    return {name: re.sub(r"\s*\n#\s*", " ", words) for name, words in found}


def not_the_recipes(card: Card, of_recipe: Mapping[str, str]) -> str:
    """In what a run differs from its recipe that changes its numbers; "" where it does not. Other images are told by
    the number of their steps."""
    changes = [] if isinstance(card.from_recipe, str) else card.from_recipe
    keys = [key for key, _, _ in changes if computes(key) and key != "run.seed"]
    if keys:
        return f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} changed"
    steps = re.search(r"([\d,]+) steps of", of_recipe.get("Cost", ""))
    if steps is None or card.total == int(steps[1].replace(",", "")):
        return ""
    if card.total is None:
        return "how many images it has is not known yet"
    return f"its data make {card.total:,} steps, not {steps[1]}"


def differing(cards: Sequence[Card]) -> list[tuple[str, list[Any]]]:
    """The keys that change what is computed in which some run differs from the first, with the value of every run."""
    from mls.config import NOT_A_KEY, flatten

    values = [dict(flatten(card.config)) for card in cards]
    changed = {key for card in cards for key, _, _ in compared(cards[0].config, card.config)}
    keys = dict.fromkeys(key for own in values for key in own if key in changed)
    return [(key, [own.get(key, NOT_A_KEY) for own in values]) for key in keys]


def last_values(cards: Sequence[Card]) -> list[tuple[str, list[tuple[float, int] | None]]]:
    """Every metric's last value and its step, for every run."""
    last = [{name: series.last for name, series in card.log.series.items()} for card in cards]
    return [
        (name, [values.get(name) for values in last]) for name in sorted({name for values in last for name in values})
    ]


def stored_results(card: Card) -> list[Mapping[str, Any]]:
    """The numbers that were measured on this run's weights, the newest of each."""
    import hashlib

    from mls import card as weights_card
    from mls.errors import UserError
    from mls.files import runs_folder
    from mls.results import Results, newest

    weights, digest = card.run.path / "backbone.safetensors", None
    try:
        read = weights_card.read(weights) if weights.is_file() else None
        digest = hashlib.sha256(read[0]).hexdigest()[:16] if read else None
    except UserError as error:
        card.odd.append(str(error))
    places = dict.fromkeys(folder.resolve() / "results.jsonl" for folder in (card.run.path.parent, runs_folder()))
    rows = newest(row for place in places for row in Results(place).read())
    here = {card.run.path.resolve(), weights.resolve()}

    def of_this_run(row: Mapping[str, Any]) -> bool:
        if digest is not None and row.get("weights_hash") == digest:
            return True
        name = row.get("weights")
        return isinstance(name, str) and len(name) < 4096 and Path(name).expanduser().resolve() in here

    return [row for row in rows if of_this_run(row)]


def surroundings(card: Card) -> list[tuple[str, str]]:
    """Versions, machine and restarts, as the events tell."""
    starts = [row for row in card.events if row["event"] in ("start", "resume")]
    if not starts:
        return []
    last = starts[-1]
    told = [("Versions", ", ".join(f"{name} {version}" for name, version in dict(last.get("versions") or {}).items()))]
    device = f", {last['device']}" if last.get("device") else ""
    told.append(("Machine", f"{last.get('host', 'unknown')}, {last.get('world', 1)} processes{device}"))
    if isinstance(code := last.get("code"), dict):
        told.append(("Commit", f"{code.get('commit')}{' with changes' if code.get('dirty') else ''}"))
    stops = [f"step {row.get('step')}: {row.get('reason')}" for row in card.events if row["event"] == "stop"]
    told.append(("Restarts", f"{len(starts) - 1}" + (f" (stops: {'; '.join(stops[-8:])})" if stops else "")))
    return [(name, clip(words)) for name, words in told if words]
