"""A suite's table as text: our numbers and the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mls.eval.suite import Row, Table, like
from mls.tools.studies import markdown_table, spread


def as_text(table: Table, tiny: bool, name: str) -> str:
    """A blank cell was not run, or the paper has no number for it."""
    lines = of_backbones(table, tiny) if table.suite.compares == "backbones" else of_methods(table)
    counts = {len(values) for values in table.values.values()}
    seeds = f"mean ± std over {max(counts)} runs" if counts and max(counts) > 1 else "one run"
    notes = [f"{table.suite.title}, in per cent, {seeds}."]
    papers = table.suite.source and any(row.paper for row in table.rows)
    if papers:
        notes[0] += f" The paper's numbers: {table.suite.source}."
    if tiny and papers:
        notes.append("Our columns are the embedded scenes: the papers' columns are other data and another network.")
    for (row, column), chosen in table.chosen.items():
        if chosen:
            notes.append(f"{row}, {column}: {', '.join(chosen)}, best on the validation part.")
    notes += [f"{what}: left out. {why}" for what, why in [*table.missing.items(), *table.absent.items()]]
    return "\n\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def of_methods(table: Table) -> list[str]:
    """Our columns, then the paper's."""
    numbers = [row.paper or [None] * len(table.suite.columns) for row in table.rows]
    told = [place for place, _ in enumerate(table.suite.columns) if any(row[place] is not None for row in numbers)]
    papers = [table.suite.columns[place] for place in told]
    header = ["", *(f"{column.name}" for column in table.columns), *(f"paper: {column.name}" for column in papers)]
    lines = []
    for row, known in zip(table.rows, numbers, strict=True):
        ours = [spread(table.values.get((row.name, column.name), [])) for column in table.columns]
        paper = ["" if known[place] is None else f"{known[place]:g}" for place in told]
        lines.append([row.name, *ours, *paper])
    return [markdown_table(header, lines)]


def of_backbones(table: Table, tiny: bool) -> list[str]:
    """One table of what was measured, the paper's rows above ours; one of differences."""
    header = ["", *(column.name for column in table.columns)]
    paper = [] if tiny else [row for row in table.rows if row.paper]
    ours = {row.name: row for row in table.rows if any((row.name, c.name) in table.values for c in table.columns)}
    lines = [[f"{row.name} (paper)", *("" if n is None else f"{n:g}" for n in row.paper)] for row in paper]
    lines += [[name, *(spread(table.values.get((name, c.name), [])) for c in table.columns)] for name in ours]
    parts = [markdown_table(header, lines)]
    differences = []
    for name, row in ours.items():
        against: dict[str, Sequence[float | None]] = {}
        found = None if tiny else like(row, table.suite)
        if found is not None:
            against[f"the paper's {found.name}"] = found.paper
        for other in table.rows:
            floor = other.method == "random" or (other.method == "supervised" and row.method != "random")
            if floor and other.name in ours and other.method != row.method:
                against[other.name] = [mean(table, other, column.name) for column in table.columns]
        for what, numbers in against.items():
            own = [mean(table, row, column.name) for column in table.columns]
            differences.append([f"{name} − {what}", *map(difference, own, numbers)])
    if differences:
        parts.append(markdown_table(["difference", *header[1:]], differences))
    return parts


def mean(table: Table, row: Row, column: str) -> float | None:
    values = table.values.get((row.name, column))
    return statistics.mean(values) if values else None


def difference(one: float | None, other: float | None) -> str:
    """
    >>> difference(71.25, 70.0), difference(None, 70.0)
    ('+1.2', '')
    """
    return "" if one is None or other is None else f"{one - other:+.1f}"
