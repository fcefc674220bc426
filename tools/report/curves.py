"""The curves of `mls report`: which there are, and their points from a log of any length in bounded memory. uPlot draws
them in the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from mls.monitor.log import LARGEST, LARGEST_STEP

MOST_POINTS = 400  # of a curve; at most twice as many are kept
BLOCK = 1 << 16  # bytes that are parsed at a time: larger ones fall out of a processor's cache
ROWS = 4096  # that are added to the curves at a time
Tables = dict[tuple[str, ...], list[NDArray[np.float64]]]  # of rows, by the metrics that they hold
PLACES = ("step", "epoch", "time")  # of a row; all other numbers are metrics


class Series:
    """Means of consecutive values of one metric: when there are too many, each two become one. Of each mean the sum,
    how many values it holds, how many lines of the log it stands for, and where (PLACES) the last of them is."""

    def __init__(self) -> None:
        self.means = np.zeros((0, 3 + len(PLACES)))
        self.new: list[NDArray[np.float64]] = []
        self.last: tuple[float, int] | None = None  # the last finite value as it was logged, and its step
        self.width = 1  # lines in one mean
        self.rows = 0

    def add(self, values: NDArray[np.float64], places: NDArray[np.float64]) -> None:
        known = np.isfinite(values)
        self.rows += len(values)
        if known.any():
            place = int(known.nonzero()[0][-1])
            self.last = float(values[place]), int(places[place, 0])
        columns = np.where(known, values, 0.0), known, np.ones(len(values))
        self.new.append(np.column_stack([*columns, places]))
        if sum(map(len, self.new)) + len(self.means) >= 2 * MOST_POINTS:
            self.merge()

    def merge(self) -> None:
        """The newest may stand for fewer lines than the others."""
        raw, self.new = np.concatenate([np.zeros((0, self.means.shape[1])), *self.new]), []
        if len(self.means) and len(raw) and self.means[-1, 2] < self.width:  # fill up the last one first
            missing = int(self.width - self.means[-1, 2])
            self.means[-1] = _joined(np.concatenate([self.means[-1:], raw[:missing]]), 1 + missing)[0]
            raw = raw[missing:]
        self.means = np.concatenate([self.means, _joined(raw, self.width)])
        while len(self.means) >= 2 * MOST_POINTS:
            self.means, self.width = _joined(self.means, 2), 2 * self.width

    def points(self) -> tuple[NDArray[np.float64], list[float | None]]:
        """Places [points, 3] and values; None: none was finite."""
        self.merge()
        values = [total / count if count else None for total, count in self.means[:, :2].tolist()]
        return self.means[:, 3:], values


def _joined(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    if width == 1 or not len(rows):
        return rows
    starts = np.arange(0, len(rows), width)
    ends = np.minimum(starts + width, len(rows)) - 1
    return np.concatenate([np.add.reduceat(rows[:, :3], starts), rows[ends, 3:]], axis=1)


@dataclass
class Log:
    """A run's metrics.jsonl."""

    series: dict[str, Series] = field(default_factory=dict)
    rows: int = 0
    step: int = 0  # the last one
    epoch: int = 0
    first_time: float | None = None
    last_time: float | None = None
    odd: int = 0  # lines that hold no row
    first_odd: int = 0

    def steps_and_values(self) -> dict[str, list[tuple[int, float | None]]]:
        found = {name: series.points() for name, series in self.series.items()}
        return {n: [(int(step), v) for step, v in zip(p[:, 0], vs, strict=True)] for n, (p, vs) in found.items()}


def read_log(path: Path) -> Log:
    """What rows and lines are is defined in mls/monitor/log.py, which reads them all at once."""
    log, number = Log(), 0
    if not path.is_file():
        return log
    tables: Tables = {}
    rows = 0  # in the tables
    with open(path, "rb") as file:
        while block := file.read(BLOCK) + file.readline():
            found = _parsed(block)
            known = [*filter(_is_row, found)]
            if len(known) < len(found):
                log.odd += len(found) - len(known)
                log.first_odd = log.first_odd or number + 1 + [*map(_is_row, found)].index(False)
            number += len(found)
            _collect(tables, known, rows)
            rows += len(known)
            if rows >= ROWS:
                _add(log, tables, rows)
                rows, tables = 0, {}
    _add(log, tables, rows)
    return log


def _parsed(block: bytes) -> list[Any]:
    """What each line holds: all at once, which is quicker, unless one of them is odd."""
    block = block.removesuffix(b"\n")
    try:
        rows = from_json(b"[" + block.replace(b"\n", b"\n,") + b"]")
        if len(rows) == block.count(b"\n") + 1:
            return rows
    except (ValueError, RecursionError):
        pass
    return [*map(_parsed_line, block.split(b"\n"))]


def _parsed_line(line: bytes) -> Any:
    try:
        return from_json(line)
    except (ValueError, RecursionError):
        return None


def _is_row(row: Any) -> bool:
    if type(row) is not dict:
        return False
    step, epoch = row.get("step", -1), row.get("epoch", -1)
    return type(step) is type(epoch) is int and 0 <= step < LARGEST_STEP and 0 <= epoch < LARGEST_STEP


def _collect(tables: Tables, rows: list[dict[str, Any]], first: int) -> None:
    """Rows that hold the same metrics, as most do, make one table, whose first column is the row's number."""
    alike: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for number, row in enumerate(rows, start=first):
        alike.setdefault(tuple(row), []).append((number, *row.values()))
    for names, table in alike.items():
        tables.setdefault(names, []).append(_numbers(table))


def _numbers(table: list[tuple[Any, ...]]) -> NDArray[np.float64]:
    """What is no number is NaN."""
    if set(map(type, chain.from_iterable(table))) <= {int, float, type(None)}:
        with suppress(OverflowError):
            values = np.array(table, dtype=np.float64)
            return np.where(np.abs(values) < LARGEST, values, np.nan)
    plain = [[v if type(v) in (int, float) and abs(v) < LARGEST else np.nan for v in row] for row in table]
    return np.array(plain, dtype=np.float64)


def _add(log: Log, tables: Tables, rows: int) -> None:
    if not rows:
        return
    columns: dict[str, list[NDArray[np.float64]]] = {}  # [rows, 2]: the row's number and its value
    for names, parts in tables.items():
        table = np.concatenate(parts)
        for column, name in enumerate(names, start=1):
            columns.setdefault(name, []).append(table[:, [0, column]])
    places = np.full((rows, len(PLACES)), np.nan)
    for column, name in enumerate(PLACES):
        for part in columns.pop(name, ()):
            places[part[:, 0].astype(int), column] = part[:, 1]
    for name, parts in columns.items():
        values = np.concatenate(parts)
        values = values[values[:, 0].argsort()] if len(parts) > 1 else values
        log.series.setdefault(name, Series()).add(values[:, 1], places[values[:, 0].astype(int)])
    log.rows += rows
    log.step, log.epoch = max(log.step, int(places[:, 0].max())), int(places[-1, 1])
    times = places[np.isfinite(places[:, 2]), 2]
    if len(times):
        log.first_time, log.last_time = log.first_time or float(times[0]), float(times[-1])


# ------------------------------------------------------------------------------------------------------ what is drawn


REFERENCES = ("chance", "untrained")  # labels, as page.js knows them


@dataclass(frozen=True)
class Chart:
    """`curves`: labels and metrics; those of REFERENCES mark what a curve is beside. The value axis spans at least
    `span`, so that noise does not look like a change, and holds `low` and `high`."""

    title: str
    note: str
    curves: Mapping[str, str]
    unit: str = ""
    span: float = 0.0
    low: float | None = None
    high: float | None = None
    log: bool = False

    @property
    def id(self) -> str:
        """
        >>> Chart("Gradient of each part", "", {}).id
        'chart-gradient-of-each-part'
        """
        return "chart-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


CHARTS = {
    "Objective": [
        Chart("InfoNCE loss", "Telling the own key from the dictionary. Chance: nothing can be told from anything.",
              {"InfoNCE": "loss/info_nce", "chance": "chance/info_nce"}, "nats", span=0.5),
        Chart("Multi-label loss", "Pulling towards all matches at once. Random rows: the same loss with as many random "
              "rows in place of the matches. Chance: every cosine is 0.",
              {"multi-label": "loss/multi_label", "random rows": "loss/multi_label_random_rows",
               "chance": "chance/multi_label"}, span=0.05),
        Chart("Windows loss", "Telling small windows apart.", {"windows": "loss/windows", "chance": "chance/windows"},
              "nats", span=0.5),
        Chart("Words loss", "Telling which words an image's regions are. Chance: one answer for all images. At best: "
              "each bag told exactly.",
              {"words": "loss/words", "chance": "chance/words", "at best": "floor/words"}, "nats"),
        Chart("Loss", "What the optimizer minimises: all parts together.", {"loss": "loss"}, span=0.5),
        Chart("Cosine similarity", "Of a query to its own key, its positives and all rows.",
              {"own key": "cosine/own_key", "positives": "cosine/positives", "all rows": "cosine/rows"}, "cosine",
              span=0.2),
        Chart("Gradient of each part", "Norm at the network’s outputs, logarithmic: how hard each part pulls.",
              {"InfoNCE": "gradient/info_nce", "multi-label": "gradient/multi_label",
              "words": "gradient/words"}, "norm", log=True),
        Chart("Gradient norm", "Over all parameters, at the logged steps.", {"norm": "gradient/norm"}, "norm", low=0),
    ],
    "Pseudo-labels and representation": [
        Chart("Pseudo-label overlap", "Mean cosine of the true labels of a query and its matches. Chance: all rows.",
              {"overlap": "labels/overlap", "chance": "labels/overlap_chance"}, "cosine", span=0.1),
        Chart("Pseudo-label precision", "Share of matches that share a true label with the query. Chance: all rows.",
              {"precision": "labels/precision", "chance": "labels/precision_chance"}, "share", span=0.1),
        Chart("Online probes", "How well features predict true labels, on images held out; never used to train.",
              {"kNN mAP": "knn/map", "linear mAP": "linear/map", "kNN top-1": "knn/top1",
               "linear top-1": "linear/top1"}, "share", span=0.1),
        Chart("Dense probe", "mIoU of images held out, segmented by the nearest labelled patches of others; masks are "
              "never used to train. Untrained: the same network as initialised.",
              {"dense mIoU": "dense/miou", "untrained": "dense/miou_untrained"}, "share", span=0.1),
        Chart("Spread of a coordinate", "Over the dictionary’s rows: 1 is uniform on the sphere, 0 is collapse.",
              {"backbone": "health/backbone_std", "projection": "health/projection_std"}, low=0, high=1),
        Chart("Mean cosine of two rows", "0 is spread over the sphere, 1 is collapse.",
              {"backbone": "health/backbone_cosine", "projection": "health/projection_cosine"}, "cosine",
              low=0, high=1),
        Chart("Effective rank", "RankMe: how many directions the rows use; 1 is collapse.",
              {"backbone": "health/backbone_rank", "projection": "health/projection_rank"}, "directions", low=0),
    ],
    "Training": [
        Chart("Learning rate", "As scheduled, scaled with the batch.", {"rate": "lr"}, low=0),
        Chart("Dictionary fill", "Share of the rows that hold a key.", {"fill": "dictionary/fill"}, "share", low=0,
              high=1),
        Chart("Speed", "Over all processes.", {"images/s": "images_per_second"}, "images/s", low=0),
        Chart("Data wait", "Share of the time that training stood waiting for images.", {"wait": "data_wait"}, "share",
              low=0, span=0.1),
        Chart("Monitoring", "Share of the time that went into what every run measures of itself, and into the online "
              "probes.", {"monitoring": "monitoring", "online probes": "probes"}, "share", low=0, span=0.02),
        Chart("Device memory", "The most that was in use.", {"memory": "gpu_memory_gib"}, "GiB", low=0),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """What turns a row's place into epochs, images and hours."""

    batch: int
    steps_per_epoch: float | None
    pauses: Sequence[tuple[float, float]] = ()  # from stop to resume, in seconds since 1970

    def columns(self, places: NDArray[np.float64], start: float | None) -> dict[str, list[float | None]]:
        step, epoch, time = places.T
        if self.steps_per_epoch:
            epoch = step / self.steps_per_epoch
        found = {"step": step, "epoch": epoch, "images": step * self.batch}
        if start is not None and np.isfinite(time).all():
            found["hours"] = (self._trained(time) - self._trained(np.asarray(start))) / 3600
        return {name: rounded(column.tolist()) for name, column in found.items()}

    def _trained(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds without those that lie in pauses."""
        return time - sum((np.clip(time, begin, end) - begin for begin, end in self.pauses), np.zeros_like(time))


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """To six digits: what a screen can show, and what keeps the page small."""
    return [None if value is None else int(value) if value == int(value) else float(f"{value:.6g}") for value in values]


def drawn(logs: Sequence[Log], axes: Sequence[Axis], labels: Sequence[str]) -> dict[str, Any]:
    """All points for the page; `labels` name the runs. Metrics that were logged at the same steps share their `x`."""
    xs: list[dict[str, Any]] = []
    runs = []
    for log, axis in zip(logs, axes, strict=True):
        known: dict[bytes, int] = {}
        curves = {}
        for name in {metric for chart in _charts() for metric in chart.curves.values()} & log.series.keys():
            places, values = log.series[name].points()
            if all(value is None for value in values):
                continue
            key = places.tobytes()
            if key not in known:
                known[key] = len(xs)
                xs.append(axis.columns(places, log.first_time))
            curves[name] = {"x": known[key], "y": rounded(values)}
        runs.append(curves)
    sections = {}
    for title, charts in CHARTS.items():
        if found := [_described(chart, logs, labels) for chart in charts if _has(chart, runs)]:
            sections[title] = found
    return {"xs": xs, "runs": runs, "sections": sections}


def _charts() -> Iterator[Chart]:
    return (chart for charts in CHARTS.values() for chart in charts)


def _has(chart: Chart, runs: Sequence[Mapping[str, Any]]) -> bool:
    return any(metric in curves for label, metric in chart.curves.items() for curves in runs if label not in REFERENCES)


def _described(chart: Chart, logs: Sequence[Log], labels: Sequence[str]) -> dict[str, Any]:
    """`words`: for who cannot see the curves."""
    words, most = [], 1
    for log, run in zip(logs, labels, strict=True):
        for label, series in ((label, log.series.get(metric)) for label, metric in chart.curves.items()):
            places, values = ([], []) if series is None else series.points()
            known = [(int(p[0]), value) for p, value in zip(places, values, strict=True) if value is not None]
            if series is None or not known:
                continue
            most = max(most, series.width)
            (first, start), (last, end) = known[0], known[-1]
            name = f"{run}: {label}" if len(logs) > 1 else label
            words.append(f"{name} {start:.4g} at step {first:,}" + (f", {end:.4g} at step {last:,}" * (last > first)))
    known = {label: metric for label, metric in chart.curves.items() if any(metric in log.series for log in logs)}
    return {**vars(chart), "curves": known, "id": chart.id, "averaged": most, "words": "; ".join(words)}
