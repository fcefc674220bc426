"""Are the labels good? What the last moment of a run says of its matches in numbers, and pairs that a person judges
without knowing which are matches: `mls report --judged FILE` gives the precision of each kind."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mls.errors import DataError
from mls.eval.paired import wilson
from mls.monitor.moments import LEVELS

if TYPE_CHECKING:
    from torch import Tensor

    from mls.data import Source
    from mls.monitor.labels import LabelStatistics
    from mls.monitor.moments import Moment

PAIRS = 100
KINDS = {"matched": "matched", "pixels": "nearest in pixels", "random": "random rows"}
ANSWERS = ("y", "n", "?")
JUDGED = 1  # version of judged.json
MOST_BYTES = 1 << 24  # of judged.json; a real one has 20 kB

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Statistic:
    """`values`: by memory. `beside`: what they are compared with."""

    name: str
    values: dict[str, str]
    beside: str


NAMES = {
    "features": "backbone (g)",
    "projections": "projection (z)",
    "regions": "regions",
    "pixels": "nearest in pixels",
}


def true_labels(source: Source, table: Path | None) -> Tensor | None:
    """[images, classes]: of the source, or of a table, as training reads it; what it does not say is NaN. None: there
    are none."""
    import torch

    from mls.data.listing import FileSource
    from mls.engine.trainer import watched_labels
    from mls.eval.data.table import OwnLabels, as_truth, read_table

    if table is None:
        found = watched_labels(source)
        return None if found is None else found.cpu()
    if not isinstance(source, FileSource):
        raise DataError(f"--labels {table} names files, and {source.name} has none: leave it out")
    root = Path(os.fsdecode(source.root))
    read = read_table(table, root)
    found = torch.full((len(source), len(read.classes)), torch.nan)
    places = [(image, read.places[name]) for image, name in enumerate(source.relative_paths) if name in read.places]
    if not places:
        raise DataError(f"{table} names no image that the run has seen: give names relative to {root}")
    images, rows = map(list, zip(*places, strict=True))
    truth = torch.from_numpy(as_truth(read.cells, OwnLabels(blank="absent" if read.one_each else "unknown")))[rows]
    if not truth.all(1).any():
        raise DataError(f"{table} leaves classes of each image unknown: write 0 (-1 beside other -1) for absent ones")
    found[images] = torch.where(truth == 0, torch.nan, (truth > 0).float())
    return found


def memories(moment: Moment) -> list[str]:
    """What the run matches by; the one that gives the labels comes first."""
    return list(moment.queries[0].matches) if moment.queries else []


def statistics(moment: Moment) -> list[Statistic]:
    """Of the matches of one moment, each beside what it would be by chance."""
    scores = moment.scores  # of lists of neighbours there are none for all rows
    matches = {memory: [m for q in moment.queries for m in q.matches.get(memory, ())] for memory in memories(moment)}
    matches = {memory: found for memory, found in matches.items() if found}
    places = {n: [m.percentile for m in f if m.percentile is not None] for n, f in matches.items() if n in scores}
    found = [
        Statistic("Score of a match", {n: f"{median(m.score for m in f):.3f}" for n, f in matches.items()}, "median"),
        Statistic("Score of any row", {n: f"{scores[n][10]:.3f}" for n in matches if n in scores}, "median of all"),
        Statistic("Score of the top 5 % of all rows", {n: f"{scores[n][19]:.3f}" for n in matches if n in scores}, ""),
        Statistic("Percentile of a match", {n: f"{median(p):.1f}" for n, p in places.items()}, "median, chance 50"),
        Statistic("Age of a match", {n: f"{median(m.age for m in f):g}" for n, f in matches.items()}, "median, steps"),
    ]  # fmt: skip
    agreement = {name: f"{s.share:.3f} (chance {s.chance:.3f})" for name, s in moment.agreement.items()}
    found.append(Statistic("Two views choose the same rows", agreement, "two different images: chance"))
    if both := moment.agreement_of_memories:
        words = {"features": f"{both.share:.3f} (chance {both.chance:.3f})"}
        found.append(Statistic("g and z choose the same rows", words, "two different images: chance"))
    own = {name: f"{share:.1%}" for name, share in moment.own.items()}
    found.append(Statistic("Own image among the k nearest rows", own, "they are left out of the gallery"))
    most = {name: f"{hubs[0].count} of {len(moment.queries)}" for name, hubs in moment.hubs.items() if hubs}
    found.append(Statistic("Queries that match the most matched row", most, ""))
    different = {n: f"{len({(m.id, m.box) for m in f}) / len(f):.1%}" for n, f in matches.items()}
    found.append(Statistic("Different rows among the matches", different, "100 %: no row is matched twice"))
    return found


def score_curves(moment: Moment) -> dict[str, dict[str, list[float]]]:
    """Of the scores of all rows and of the matches which share (y, in per cent) lies below which score (x)."""
    found = {}
    for memory in [name for name in memories(moment) if name in moment.scores]:
        scores = [match.score for query in moment.queries for match in query.matches[memory]]
        if scores:
            of_matches = np.quantile(scores, LEVELS).round(4).tolist()
            for words, values in (("all rows", moment.scores[memory]), ("matches", of_matches)):
                last = dict(zip(values, (round(100 * level) for level in LEVELS), strict=True))  # of equal scores
                found[f"{NAMES.get(memory, memory)}, {words}"] = {"x": list(last), "y": list(last.values())}
    return found


KINDS_BY_RANK = {
    "precision": "precision",
    "recall": "recall",
    "pushed_away": "right rows among the others, which the loss pushes away",
    "dominance": "matches of the class that most have",
}


def by_rank(statistics: Mapping[str, LabelStatistics]) -> list[tuple[int, list[str]]]:
    """Rank, then each of KINDS_BY_RANK in each memory."""
    ranks = max((len(one.precision) for one in statistics.values()), default=0)
    shown = sorted({1, 2, 3, 5, 10, 20, 40, ranks} & set(range(1, ranks + 1)))

    def cell(values: list[float], rank: int) -> str:
        return f"{values[rank - 1]:.3f}" if rank <= len(values) else "–"

    names = [(name, kind) for kind in KINDS_BY_RANK for name in statistics]
    return [(rank, [cell(getattr(statistics[name], kind), rank) for name, kind in names]) for rank in shown]


def compared(statistics: Mapping[str, LabelStatistics]) -> list[str]:
    """The names of all statistics that were held against the precision."""
    return list(dict.fromkeys(name for one in statistics.values() for name in one.against_precision))


# -------------------------------------------------------------------------------------------------- judged by a person


@dataclass(frozen=True)
class Pair:
    """A query's crop and another one, for a person who does not know their kind."""

    kind: str
    query: tuple[int, Box]
    other: tuple[int, Box]


def pairs_to_judge(moment: Moment, pixel_nearest: Mapping[int, Sequence[tuple[int, Box]]]) -> list[Pair]:
    """PAIRS of all kinds in equal parts and in random order, which is the same each time. `pixel_nearest`: by a query's
    number crops that look alike."""
    draw = random.Random(moment.step)
    drawn = {kind: draw.sample(range(len(moment.queries)), len(moment.queries)) for kind in KINDS}
    found = []
    for number in range(PAIRS):
        kind = list(KINDS)[number % len(KINDS)]
        place = drawn[kind][number // len(KINDS) % len(moment.queries)]
        query, rank = moment.queries[place], number // len(KINDS) // len(moment.queries)
        if kind == "matched":
            others = [(match.id, match.box) for match in next(iter(query.matches.values()), ())]
        elif kind == "pixels":
            others = list(pixel_nearest.get(place, ()))
        else:
            others = [draw.choice(moment.random)] if moment.random else []
        if others:
            image, box = others[min(rank, len(others) - 1)]
            found.append(Pair(kind, (query.id, query.box), (image, box)))
    draw.shuffle(found)
    return found


def judged_table(path: Path) -> str:
    """The precision of each kind of pair, by a person's answers."""
    from mls.tables import markdown_table, terminal_width

    counts = Counter((row["kind"], row["answer"]) for row in _read_judged(path))
    lines = []
    for kind, words in KINDS.items():
        yes, no, unsure = (counts[kind, answer] for answer in ANSWERS)
        low, high = wilson(yes, yes + no)
        share = f"{yes / (yes + no):.2f} ({low:.2f}–{high:.2f})" if yes + no else "–"
        lines.append([words, share, str(yes), str(no), str(unsure)])
    header = ["pairs", "show the same (95 %)", "yes", "no", "not sure"]
    return markdown_table(header, lines, terminal_width())


def _read_judged(path: Path) -> list[dict[str, Any]]:
    from mls.files import read_json

    advice = "give the file judged.json that the page saved"
    content = read_json(path, advice, most=MOST_BYTES)
    pairs = content.get("pairs") if isinstance(content, dict) and content.get("judged") == JUDGED else None
    if not isinstance(pairs, list) or not all(_is_judged(row) for row in pairs):
        raise DataError(f"{path} holds no judged pairs: {advice}")
    return pairs


def _is_judged(row: Any) -> bool:
    return isinstance(row, dict) and row.get("kind") in KINDS and row.get("answer") in ANSWERS
