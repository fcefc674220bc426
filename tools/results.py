"""`mls results`: what `mls eval` has stored, as a table of means over seeds or number by number for other programs. The
store itself is mls/results.py; a paper's table with the paper's numbers beside is `mls eval suite`."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from mls.errors import ConfigError, DataError, unknown_name
from mls.files import runs_folder

FIELDS = ("protocol", "loss", "weights", "settings")  # runs that have them in common differ in their seed alone
MOST_METRICS = 8  # columns of a table; more do not fit on a screen
MOST_NAMED = 12  # values of a field in a sentence
# What a backslash before it does not make readable.
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}

Row = Mapping[str, Any]


class Format(str, Enum):
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"


@dataclass
class Cell:
    """One run of a protocol: its numbers by metric."""

    row: Row  # the first of its rows, for what they have in common
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Series:
    """Runs that differ in their seed alone."""

    of: dict[str, str]  # FIELDS, and `run` where one stands alone
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Line:
    values: dict[str, list[float]] = field(default_factory=dict)  # of each column, in per cent
    runs: list[int] = field(default_factory=list)  # how many in each mean
    seconds: float = 0.0  # of all runs


@dataclass(frozen=True)
class Table:
    names: list[str]  # the columns that say what a line is about
    metrics: list[str]
    lines: dict[tuple[str, ...], Line]
    note: str


def results(
    filters: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Only these; * and ? stand for any text.")
    ] = None,
    store: Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="Default: $MLS_RUNS, else ./runs.")] = None,
    format: Annotated[Format, typer.Option(help="csv and json: every stored number with all its fields.")] = (
        Format.markdown
    ),
    by: Annotated[
        str | None, typer.Option(help=f"A line for each of one field, the rest side by side: {', '.join(FIELDS)}.")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="A line for each run instead of means over seeds.")] = False,
    bold: Annotated[bool, typer.Option("--bold", help="Set the best of each column in bold.")] = False,
) -> None:
    """Show what `mls eval` has stored: by default a line for each protocol and weights, mean ± std over seeds.

    Filters on different fields must all hold, of several on one field any. Where a run was measured again, the newest
    numbers count. `time` is that of all runs of a line together.

    Examples:

        mls results

        mls results "metric=*/map" "metric=*/top1" --by weights --bold --format latex

        mls results protocol=spml_scenes "weights=*mls*" seed=0 --long

        mls results --store /data/runs --format csv > results.csv
    """
    from mls.results import Results

    if by is not None and by not in FIELDS:
        raise unknown_name("field for --by", by, FIELDS)
    path = store_file(store)
    stored, torn = Results(path).read()
    rows = newest(row for row in stored if isinstance(row.get("value"), (int, float)) and "metric" in row)
    if torn:
        say(f"{path}: left out {torn} torn line{'s' * (torn > 1)}, whose writer was killed or is still writing")
    if not rows:
        say(f"{path} holds no numbers of a protocol: `mls eval run` and `mls eval suite` store them")
    wanted = parse(filters or [], rows) if rows else {}
    found = [row for row in rows if all(matches(row, key, patterns) for key, patterns in wanted.items())]
    if rows and not found:
        say(nothing(rows, wanted))
    if format is Format.csv:
        print(as_csv(found, fields_of(rows)), end="")
    elif format is Format.json:
        print("[" + ",\n".join(json.dumps(row) for row in found) + "]")
    elif found:
        table = tabulate(averaged(found, long), by)
        print(as_latex(table, bold) if format is Format.latex else as_markdown(table, bold))


def say(text: str) -> None:
    """Beside what a program reads."""
    typer.echo(text, err=True)


def store_file(given: Path | None) -> Path:
    path = given.expanduser() if given else runs_folder()
    path = path / "results.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"there are no results in {path}: run `mls eval run` first, or say where they are with --store")
    return path


def newest(rows: Iterable[Row]) -> list[Row]:
    """Each number of a cell once.

    >>> [row["value"] for row in newest({"cell": "a", "metric": "voc07/map", "value": v} for v in (0.1, 0.2))]
    [0.2]
    """
    return list({(row.get("cell", number), row["metric"]): row for number, row in enumerate(rows)}.values())


def flat(row: Row) -> dict[str, Any]:
    """
    >>> flat({"seed": 0, "versions": {"mls": "0.1.0"}})
    {'seed': 0, 'versions.mls': '0.1.0'}
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def fields_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in flat(row)))


def text_of(row: Row, key: str) -> str:
    value = flat(row).get(key)
    return "" if value is None else str(value)


def parse(filters: Sequence[str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The patterns of each field."""
    wanted: dict[str, list[str]] = {}
    for one in filters:
        key, separator, value = one.partition("=")
        if not separator:
            raise ConfigError(f"'{one}' is not KEY=VALUE: name the field it is about, for example 'metric=*{one}*'")
        if key not in (known := fields_of(rows)):
            raise unknown_name("field", key, known)
        wanted.setdefault(key, []).append(value)
    return wanted


def matches(row: Row, key: str, patterns: Sequence[str]) -> bool:
    text = text_of(row, key)
    return any(text == pattern or fnmatchcase(text, pattern) for pattern in patterns)


def nothing(rows: Sequence[Row], wanted: Mapping[str, Sequence[str]]) -> str:
    for key, patterns in wanted.items():
        if not any(matches(row, key, patterns) for row in rows):
            values = sorted({text_of(row, key) for row in rows} - {""})
            more = f" and {len(values) - MOST_NAMED} more" if len(values) > MOST_NAMED else ""
            asked = " or ".join(f"{key}={pattern}" for pattern in patterns)
            return f"no result has {asked}: there are {', '.join(values[:MOST_NAMED])}{more}"
    return f"none of the {len(rows)} results matches all of these together: leave one out, or try a wider pattern"


def averaged(rows: Sequence[Row], long: bool) -> list[Series]:
    """The cells of each mean. One stands alone where it is asked for, or where a mean would mix what is not alike."""
    cells: dict[Any, Cell] = {}
    for number, row in enumerate(rows):
        cells.setdefault(row.get("cell", number), Cell(row)).values[row["metric"]] = float(row["value"])
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells.values():
        alike.setdefault(tuple(text_of(cell.row, name) for name in FIELDS), []).append(cell)
    found: list[Series] = []
    mixed = []
    for key, group in sorted(alike.items()):
        of = dict(zip(FIELDS, key, strict=True))
        # Two cells of one seed differ in something that their rows do not say: nobody knows which seeds go with which.
        unclear = len({text_of(cell.row, "seed") for cell in group}) < len(group)
        if unclear and not long:
            mixed.append(", ".join(filter(None, key)))
        if unclear or long:
            found += [Series(of | {"run": text_of(cell.row, "run")}, [cell]) for cell in group]
        else:
            found.append(Series(of | {"run": ""}, group))
    if mixed:
        say(f"not averaged, since runs of one seed differ in their settings or their weights: {'; '.join(mixed)}")
    return found


def tabulate(series: Sequence[Series], by: str | None) -> Table:
    """With `by`, the names of the columns tell what the lines leave open, as far as it varies."""
    shown = [name for name in FIELDS if needed(name, series)]
    names = [*(shown if by is None else [by]), *(["run"] if any(one.of["run"] for one in series) else [])]
    beside = {name: sorted({one.of[name] for one in series}) for name in shown if name not in names}
    lines: dict[tuple[str, ...], Line] = {}
    for one in series:
        line = lines.setdefault(tuple(one.of[name] for name in names), Line())
        prefix = [one.of[name] for name, values in beside.items() if len(values) > 1 and one.of[name]]
        line.runs.append(len(one.cells))
        for cell in one.cells:
            line.seconds += float(cell.row.get("duration") or 0)
            for metric, value in cell.values.items():
                line.values.setdefault(" ".join([*prefix, metric]), []).append(100 * value)
    metrics = columns(list(dict.fromkeys(metric for line in lines.values() for metric in line.values)))
    several = any(count > 1 for line in lines.values() for count in line.runs)
    note = "In per cent" + ", mean ± std over the runs" * several
    constant = [f"{name} {values[0]}" for name, values in beside.items() if len(values) == 1]
    return Table(names, metrics, dict(sorted(lines.items())), "; ".join([note, *constant]) + ".")


def needed(name: str, series: Sequence[Series]) -> bool:
    """Whether a field tells anything that the others do not."""
    if name == "settings":
        all_told = [tuple(value for key, value in one.of.items() if key != name) for one in series]
        return len(set(all_told)) < len(all_told)
    return name != "loss" or any(one.of[name] for one in series)


def columns(metrics: Sequence[str]) -> list[str]:
    """The metrics of a data set side by side; of too many, each data set's first ones, which come first in a protocol.

    >>> columns(["voc07/map", "cub/top1", "voc07/f1"])
    ['cub/top1', 'voc07/map', 'voc07/f1']
    """
    sets: dict[str, list[str]] = {}
    for metric in metrics:
        sets.setdefault(metric.rpartition("/")[0], []).append(metric)
    rank = {metric: place for group in sets.values() for place, metric in enumerate(group)}
    kept = sorted(metrics, key=lambda metric: rank[metric])[:MOST_METRICS]
    left_out = [metric for metric in metrics if metric not in kept]
    if left_out:
        example = left_out[0].rpartition(" ")[2]
        say(f"left out {', '.join(left_out)}: choose columns with a filter, for example 'metric={example}'")
    return [metric for _, group in sorted(sets.items()) for metric in group if metric in kept]


def texts(table: Table, bold: str = "", escape: Callable[[str], str] = str) -> list[list[str]]:
    """What stands in the lines; `bold` is how the best mean of each metric is written."""
    from mls.monitor.progress import duration

    means: dict[str, dict[tuple[str, ...], float]] = {metric: {} for metric in table.metrics}
    for key, line in table.lines.items():
        for metric in set(table.metrics) & set(line.values):
            mean = statistics.fmean(line.values[metric])
            if not math.isnan(mean):
                means[metric][key] = mean
    found = []
    for key, line in table.lines.items():
        numbers = []
        for metric in table.metrics:
            text = escape(mean_and_std(line.values.get(metric, [])))
            best = key in means[metric] and means[metric][key] == max(means[metric].values())
            numbers.append(bold % text if bold and best else text)
        runs = "–".join(str(count) for count in sorted({min(line.runs), max(line.runs)}))
        found.append([*map(escape, key), *numbers, runs, duration(line.seconds)])
    return found


def mean_and_std(values: Sequence[float]) -> str:
    from mls.tools.studies import spread

    # statistics.stdev takes no NaN, which is what the mean over an empty group of classes is.
    return "nan" if any(map(math.isnan, values)) else spread(values, digits=2)


def as_markdown(table: Table, bold: bool) -> str:
    from mls.tools.studies import markdown_table

    header = [*table.names, *table.metrics, "runs", "time"]
    return f"{markdown_table(header, texts(table, '**%s**' * bold))}\n\n{table.note}"


def as_latex(table: Table, bold: bool) -> str:
    header = [escaped(name) for name in (*table.names, *table.metrics, "runs", "time")]
    lines = [" & ".join(line) + r" \\" for line in [header, *texts(table, r"\textbf{%s}" * bold, escaped)]]
    columns = "l" * len(table.names) + "r" * (len(table.metrics) + 2)
    top = [f"% {table.note} Needs \\usepackage{{booktabs}}.", f"\\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*top, lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])


def escaped(text: str) -> str:
    r"""
    >>> print(escaped("50 % of voc07/map_11pt ± 0.1 ~ C:\\"))
    50 \% of voc07/map\_11pt $\pm$ 0.1 \textasciitilde{} C:\textbackslash{}
    """
    return re.sub(r"[\\&%$#_{}~^±–]", lambda found: LATEX.get(found[0], f"\\{found[0]}"), text)


def as_csv(rows: Sequence[Row], fields: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(flat, rows))
    return text.getvalue()
