"""Moments: what a method matches at some steps of a run, for the same queries in every run on the same images, so that
steps and runs can be compared. One file each, RUN/moments/step-*.json: its fields, its writer and its reader. How they
are measured is in matches.py; pictures are not stored, since id and box find them again in the images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mls.config import Config, MLSOptions
from mls.errors import reason
from mls.files import write_atomically

FOLDER = "moments"
LEVELS = [round(0.05 * level, 2) for level in range(21)]  # of the quantiles in `Moment.scores`

Count = Annotated[int, Field(ge=0)]
Box = tuple[float, float, float, float]  # x0 y0 x1 y1 as shares of the image's width and height
Memory = str  # "features" (g), "projections" (z) or "regions" (lists of neighbours)


class Crop(NamedTuple):
    id: Count
    box: Box


class Match(NamedTuple):
    """A row of the dictionary that is near to a query."""

    id: Count
    box: Box
    age: Count  # steps since the row came
    score: float  # cosine; of "regions" the lists' own, which has no percentile
    percentile: float | None  # of the scores of all rows with all queries, how many in a hundred are lower


class Hub(NamedTuple):
    """A row that many queries match."""

    id: Count
    box: Box
    count: Count  # queries


class Share(NamedTuple):
    """A share of matches, beside what it is by chance."""

    share: float
    chance: float


# Numbers are numbers and finite, also in a file that somebody else wrote.
CHECKED = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=CHECKED)
class Query:
    id: Count
    box: Box
    matches: dict[Memory, list[Match]]  # nearest first; no rows of the query's own image
    # Of each match of "regions" the numbers of the query's region and of its own that are most alike; -1: not known.
    regions: list[tuple[int, int]] = Field(default_factory=list)


@dataclass(frozen=True, config=CHECKED)
class Labels:
    """Of the first 1, 2, … matches: precision is the share that has a class in common with the query, recall the share
    of all such rows that is among them; means over the queries."""

    precision: dict[Memory, list[float]]
    recall: dict[Memory, list[float]]
    chance: float  # the precision of random rows


@dataclass(frozen=True, config=CHECKED)
class Moment:
    step: Count
    epoch: Count
    k: Count  # matches of a query in each memory; fewer where the dictionary has fewer
    rows: Count  # in the dictionary
    seconds: float  # that this moment cost
    queries: list[Query]  # the memory that gives the labels comes first in `matches`
    random: list[Crop]  # random rows, to compare matches with
    scores: dict[Memory, list[float]]  # quantiles (LEVELS) of the scores of all rows with all queries
    hubs: dict[Memory, list[Hub]]  # most matched first
    agreement: dict[Memory, Share]  # of the rows matched by two views of an image; by chance: of two images
    agreement_of_memories: Share | None  # of the rows matched by g and by z; None: the method matches by one
    own: dict[Memory, float]  # share of the k nearest rows that are the query's own image, were they not left out
    labels: Labels | None = None  # None: the images have none


def meaning(config: Config) -> str:
    """What a match is in this run, in words.

    >>> meaning(Config())
    'the rows chosen as its positives'
    """
    chosen = isinstance(config.objective, MLSOptions) and config.objective.pseudo_labels == "matched"
    return "the rows chosen as its positives" if chosen else "its nearest rows (this run takes no positives from them)"


def path_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}.json"


def write(run: Path, moment: Moment) -> None:
    path = path_of(run, moment.step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, _fields().dump_json(moment, exclude_defaults=True))


def read(run: Path, say: Callable[[str], None] = print) -> list[Moment]:
    """All moments of a run's folder, the first step first. A file that holds none is named and left out."""
    found = []
    for path in (run / FOLDER).glob("step-*.json"):
        try:
            found.append(_fields().validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            say(f"left out {path}, which holds no moment of a run: {_first(error)}")
    return sorted(found, key=lambda moment: moment.step)


def _first(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return reason(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


@cache
def _fields() -> TypeAdapter[Moment]:
    return TypeAdapter(Moment)
