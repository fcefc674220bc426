"""Tables of numbers over seeds: rows, columns, mean ± std, and the same table as markdown, LaTeX, CSV or JSON. Where
the numbers come from is not known here."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

# What a backslash before it does not make readable.
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}

# A list is measured: a number for each seed. A single number is a published one and is shown as its source printed it.
# Anything else is shown as it is.
Value = Sequence[float] | float | str


class Format(str, Enum):
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"


@dataclass(frozen=True)
class Column:
    heading: str
    key: str = ""  # of a row's values; default: the heading
    digits: int = 1
    scale: float = 100.0  # measured numbers are shares, tables show per cent

    @property
    def name(self) -> str:
        return self.key or self.heading


@dataclass(frozen=True)
class Row:
    labels: Sequence[str]
    values: Mapping[str, Value] = field(default_factory=dict)

    def mean(self, column: Column) -> float | None:
        """Of what was measured, on the column's scale; None where nothing was."""
        values = self.values.get(column.name)
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            return None
        return column.scale * statistics.fmean(values)

    def text(self, column: Column) -> str:
        value = self.values.get(column.name, "")
        if isinstance(value, str):
            return value
        if isinstance(value, Sequence):
            return mean_and_std([column.scale * one for one in value], column.digits)
        return f"{value:g}"


@dataclass(frozen=True)
class Table:
    labels: Sequence[str]  # the headings of what names a row
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    @property
    def header(self) -> list[str]:
        return [*self.labels, *(column.heading for column in self.columns)]

    def with_column(self, column: Column, values: Sequence[Value]) -> Table:
        """One value for each row."""
        rows = [Row(row.labels, {**row.values, column.name: one}) for row, one in zip(self.rows, values, strict=True)]
        return replace(self, columns=[*self.columns, column], rows=rows)

    def texts(self, bold: str = "", escape: Callable[[str], str] = str) -> list[list[str]]:
        """What stands in the rows; `bold` is how the best mean of each column is written."""
        best = {}
        for column in self.columns if bold else ():
            means = [mean for row in self.rows if not math.isnan(mean := _number(row.mean(column)))]
            best[column] = max(means, default=math.nan)
        found = []
        for row in self.rows:
            numbers = []
            for column in self.columns:
                text = escape(row.text(column))
                numbers.append(bold % text if bold and _number(row.mean(column)) == best[column] else text)
            found.append([*map(escape, row.labels), *numbers])
        return found


def _number(mean: float | None) -> float:
    return math.nan if mean is None else mean


def mean_and_std(values: Sequence[float], digits: int = 1) -> str:
    """
    >>> mean_and_std([51.0, 53.0]), mean_and_std([51.0]), mean_and_std([])
    ('52.0 ± 1.4', '51.0', '')
    """
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {_std(values):.{digits}f}" if len(values) > 1 else mean


def _std(values: Sequence[float]) -> float:
    """statistics.stdev takes no NaN, which is what the mean over an empty group of classes is."""
    return math.nan if any(map(math.isnan, values)) else statistics.stdev(values)


# ------------------------------------------------------------------------------------------------------- as text


def render(table: Table, format: Format = Format.markdown, bold: bool = False, width: int | None = None) -> str:
    """The table as text that ends without a newline. `width`: columns that a line of markdown may take."""
    if format is Format.latex:
        return _latex(table, bold)
    if format is Format.csv:
        fields = [*map(_label, table.labels), "column", "seeds", "mean", "std", "values"]
        return as_csv(_records(table), fields).rstrip()
    if format is Format.json:
        return "[" + ",\n".join(json.dumps(record) for record in _records(table)) + "]"
    text = markdown_table(table.header, table.texts("**%s**" * bold), width, len(table.labels))
    return f"{text}\n\n{table.note}" if table.note else text


def show(table: Table, file: Path) -> None:
    """Print it as wide as the terminal is, and keep it whole."""
    file.write_text(render(table) + "\n")
    print(render(table, width=terminal_width()))


def terminal_width() -> int | None:
    """How wide a printed table may be; None where no person reads along."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None, labels: int = 1
) -> str:
    """A table that reads well as text and as markdown. One wider than `width` is cut into several below each other,
    each with the first `labels` columns, which name the rows.

    >>> print(markdown_table(["loss", "VOC", "COCO"], [["AN", "85.9", "64.9"]], width=16))
    | loss | VOC  |
    |------|------|
    | AN   | 85.9 |
    <BLANKLINE>
    | loss | COCO |
    |------|------|
    | AN   | 64.9 |
    """
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    while width is not None and sum(widths[:labels]) > max(width // 2, 10 * labels):
        widths[widths.index(max(widths[:labels]))] -= 1  # labels leave half of the line to the numbers
    lines = [[*map(_shortened, line[:labels], widths), *line[labels:]] for line in lines]
    if width is not None:  # a cell may be as long as a sentence
        room = max(10, width - sum(min(widths[place], width) + 3 for place in range(labels)) - 4)
        lines = [[*line[:labels], *(_shortened(cell, room) for cell in line[labels:])] for line in lines]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    blocks: list[list[int]] = [list(range(min(labels, len(header))))]
    for place in range(labels, len(header)):
        wide = sum(widths[one] + 3 for one in [*blocks[-1], place]) + 1
        if width is not None and wide > width and len(blocks[-1]) > labels:
            blocks.append(list(range(labels)))
        blocks[-1].append(place)
    return "\n\n".join(_block([[line[place] for place in block] for line in lines]) for block in blocks)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(markdown_table(header, rows, terminal_width()))


def _block(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    line = lambda cells: "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
    rule = "|" + "|".join("-" * (size + 2) for size in widths) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def _shortened(text: str, size: int) -> str:
    """
    >>> _shortened("pretrain:mls_scenes_tiny", 11)
    'pretr…_tiny'
    """
    end = (size - 1) // 2
    return text if len(text) <= size else f"{text[: size - 1 - end]}…{text[-end:]}"


def _latex(table: Table, bold: bool) -> str:
    header = [escaped(name) for name in table.header]
    lines = [" & ".join(line) + r" \\" for line in [header, *table.texts(r"\textbf{%s}" * bold, escaped)]]
    columns = "l" * len(table.labels) + "r" * len(table.columns)
    top = [f"% {line}" for line in f"{table.note} Needs \\usepackage{{booktabs}}.".strip().splitlines()]
    top += [f"\\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*top, lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])


def escaped(text: str) -> str:
    r"""
    >>> print(escaped("50 % of voc07/map_11pt ± 0.1 ~ C:\\"))
    50 \% of voc07/map\_11pt $\pm$ 0.1 \textasciitilde{} C:\textbackslash{}
    """
    return re.sub(r"[\\&%$#_{}~^±–]", lambda found: LATEX.get(found[0], f"\\{found[0]}"), text)


def _records(table: Table) -> list[dict[str, Any]]:
    """A record for each number of the table, with its seeds one by one."""
    found = []
    for row in table.rows:
        labels = dict(zip(map(_label, table.labels), row.labels, strict=True))
        for column in table.columns:
            value = row.values.get(column.name, "")
            if isinstance(value, str) or (isinstance(value, Sequence) and not value):
                continue
            values = [column.scale * one for one in value] if isinstance(value, Sequence) else [float(value)]
            std = _std(values) if len(values) > 1 else None
            facts = {"seeds": len(values), "mean": statistics.fmean(values), "std": std, "values": values}
            if not isinstance(value, Sequence):
                facts["seeds"] = None  # a published number
            found.append({**labels, "column": column.heading, **facts})
    return found


def _label(heading: str) -> str:
    return heading or "row"


def as_csv(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
