"""`mls results`: what `mls eval` has stored, as a table of means over seeds or number by number for other programs. The
store itself is mls/results.py; a paper's table with the paper's numbers beside is `mls eval suite`."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from mls.errors import ConfigError, DataError, unknown_name
from mls.files import runs_folder
from mls.results import Results, StoredCell, newest, stored_cells
from mls.tables import Column, Format, Table, as_csv, render, terminal_width
from mls.tables import Row as TableRow

# Runs that have these in common differ in their seed alone.
FIELDS = ("protocol", "loss", "data", "weights", "step", "settings")
MOST_METRICS = 8  # columns of a table; more do not fit on a screen
MOST_NAMED = 12  # values of a field in a sentence

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone."""

    of: dict[str, str]  # FIELDS, and `run` where one stands alone
    cells: list[StoredCell]


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
    if by is not None and by not in FIELDS:
        raise unknown_name("field for --by", by, FIELDS)
    path = store_file(store)
    gc.disable()  # looking for cycles among many thousand rows, which have none, takes a quarter of the time
    rows = newest(map(corrected, Results(path).read()))
    if not rows:
        say(f"{path} holds no numbers of a protocol: `mls eval run` and `mls eval suite` store them")
    wanted = parse(filters or [], rows) if rows else {}
    found = [row for row in rows if all(matches(row, key, patterns) for key, patterns in wanted.items())]
    if rows and not found:
        say(nothing(rows, wanted))
    if format is Format.csv:
        print(as_csv([flat(row) for row in found], fields_of(rows)), end="")
    elif format is Format.json:
        print("[" + ",\n".join(json.dumps(row) for row in found) + "]")
    elif found:
        print(render(tabulate(averaged(found, long), by), format, bold, terminal_width()))


def say(text: str) -> None:
    """Beside what a program reads."""
    typer.echo(text, err=True)


def store_file(store: Path | None) -> Path:
    path = store.expanduser() if store else runs_folder()
    path = path / "results.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"there are no results in {path}: run `mls eval run` first, or say where they are with --store")
    return path


def corrected(row: Row) -> Row:
    """Version 0.1 stored random networks of timm under the name of timm's published weights."""
    random = "content" not in row and str(row.get("weights", "")).startswith("timm:")
    return {**row, "weights": f"random:{row['weights']}"} if random else row


def data_names(rows: Iterable[Row]) -> dict[tuple[str, ...], str]:
    """What tells data apart that the metric's own name does not: of folders their name, and where several data sets
    of one name differ, the first letters of their content."""
    known = {(text_of(row, "dataset"), text_of(row, "root"), text_of(row, "content")) for row in rows}
    folder = lambda root: Path(root).name or "unknown"
    alike: dict[tuple[str, str], set[str]] = {}
    for dataset, root, content in known:
        alike.setdefault((dataset, folder(root)), set()).add(content)
    names: dict[tuple[str, ...], str] = {}
    for dataset, root, content in known:
        contents = alike[dataset, folder(root)] - {""}
        several = len(contents) > 1 and not dataset.startswith("scenes")  # whose content is a setting
        names[dataset, root, content] = " ".join(
            filter(None, [folder(root) * (dataset == "folder"), content[:6] * several])
        )
    return names


def weights_names(rows: Iterable[Row]) -> dict[tuple[str, ...], str]:
    """Of weights and their step, with the first letters of their hash where one place has held several. Each seed of a
    recipe has weights of its own."""
    known = {(text_of(row, "weights"), text_of(row, "step"), text_of(row, "weights_hash")) for row in rows}
    digests = Counter((weights, step) for weights, step, _ in known)
    names: dict[tuple[str, ...], str] = {}
    for weights, step, digest in known:
        several = digests[weights, step] > 1
        names[weights, step, digest] = f"{weights} {digest[:6]}" if several and weights[:9] != "pretrain:" else weights
    return names


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
    value = row.get(key)
    if value is None and "." in key:
        outer, _, inner = key.partition(".")
        value = row[outer].get(inner) if isinstance(row.get(outer), dict) else None
    return "" if value is None or isinstance(value, dict) else str(value)


def parse(filters: Sequence[str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The patterns of each field."""
    wanted: dict[str, list[str]] = {}
    known = fields_of(rows) if filters else []
    for one in filters:
        key, separator, value = one.partition("=")
        if not separator:
            raise ConfigError(f"'{one}' is not KEY=VALUE: name the field it is about, for example 'metric=*{one}*'")
        if key not in known:
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
    """The runs of each mean. One stands alone where that is wanted, or where a mean would mix what is not alike."""
    alike: dict[tuple[str, ...], list[StoredCell]] = {}
    cells = stored_cells(rows)
    of_data, of_weights = (names([cell.row for cell in cells]) for names in (data_names, weights_names))
    for cell in cells:
        text = lambda *keys, row=cell.row: tuple(text_of(row, key) for key in keys)
        fields = dict(zip(FIELDS, text(*FIELDS), strict=True))
        fields["data"] = of_data[text("dataset", "root", "content")]
        fields["weights"] = of_weights[text("weights", "step", "weights_hash")]
        alike.setdefault(tuple(fields.values()), []).append(cell)
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
    """With `by`, the names of the columns tell what the rows leave open, as far as it varies."""
    from mls.progress import duration

    shown = [name for name in FIELDS if needed(name, series)]
    names = [*(shown if by is None else [by]), *(["run"] if any(one.of["run"] for one in series) else [])]
    beside = {name: sorted({one.of[name] for one in series}) for name in shown if name not in names}
    rows: dict[tuple[str, ...], list[Series]] = {}
    values: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for one in series:
        labels = tuple(one.of[name] for name in names)
        rows.setdefault(labels, []).append(one)
        prefix = [one.of[name] for name, several in beside.items() if len(several) > 1 and one.of[name]]
        for cell in one.cells:
            for metric, value in cell.values.items():
                column = values.setdefault(labels, {}).setdefault(" ".join([*prefix, metric]), [])
                column.append(value)
    metrics = columns(list(dict.fromkeys(metric for found in values.values() for metric in found)))
    found = []
    for labels, group in sorted(rows.items()):
        counts = sorted({len(one.cells) for one in group})
        seconds = sum(float(cell.row.get("duration") or 0) for one in group for cell in one.cells)
        runs = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        found.append(TableRow(labels, {**values[labels], "runs": runs, "time": duration(seconds)}))
    note = "In per cent" + ", mean ± std over the runs" * any(len(one.cells) > 1 for one in series)
    constant = [f"{name} {several[0]}" for name, several in beside.items() if len(several) == 1]
    headings = [*(Column(metric, digits=2) for metric in metrics), Column("runs"), Column("time")]
    return Table(names, headings, found, "; ".join([note, *constant]) + ".")


def needed(name: str, series: Sequence[Series]) -> bool:
    """Whether a field tells anything that the others do not."""
    if name == "settings":
        others = [tuple(value for key, value in one.of.items() if key != name) for one in series]
        return len(set(others)) < len(others)
    return name not in ("loss", "data", "step") or any(one.of[name] for one in series)


def columns(metrics: Sequence[str]) -> list[str]:
    """The metrics of a data set side by side; of too many, each data set's first ones, which come first in a protocol.

    >>> columns(["voc07/map", "cub/top1", "voc07/f1"])
    ['cub/top1', 'voc07/map', 'voc07/f1']
    """
    sets: dict[str, list[str]] = {}
    for metric in metrics:
        sets.setdefault(metric.rpartition("/")[0], []).append(metric)
    rank = {metric: place for group in sets.values() for place, metric in enumerate(group)}
    fitting = sorted(metrics, key=lambda metric: rank[metric])[:MOST_METRICS]
    left_out = [metric for metric in metrics if metric not in fitting]
    if left_out:
        example = left_out[0].rpartition(" ")[2]
        say(f"left out {', '.join(left_out)}: choose columns with a filter, for example 'metric={example}'")
    return [metric for _, group in sorted(sets.items()) for metric in group if metric in fitting]
