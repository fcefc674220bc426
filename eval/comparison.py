"""A suite's tables: our numbers and the paper's."""

from __future__ import annotations

from collections.abc import Sequence

from mls import tables
from mls.eval.suite import Comparison, Row, paper_row_of
from mls.tables import Table, Value


def as_tables(found: Comparison) -> list[Table]:
    """A blank cell was not run, or the paper has no number for it. The notes stand below the last table."""
    return _of_backbones(found) if found.suite.compares == "backbones" else [_of_methods(found)]


def notes(found: Comparison) -> list[str]:
    counts = {len(values) for values in found.values.values()}
    seeds = f", mean ± std over {max(counts)} runs" if counts and max(counts) > 1 else ", one run" * bool(counts)
    lines = [f"{found.suite.title}, in per cent{seeds}."]
    papers = found.suite.source and any(row.paper for row in found.rows)
    if papers:
        lines[0] += f" The paper's numbers: {found.suite.source}."
    if found.overrides:
        lines.append(f"Our columns were run with {' '.join(found.overrides)}.")
    if found.tiny and papers:
        lines.append("Our columns are the embedded scenes: the papers' columns are other data and another network.")
    replaced = sorted({row.network for row in found.rows if row.made_of and row.network})
    if replaced and not found.tiny:
        lines.append(f"The paper's columns are its own networks ({', '.join(replaced)}), not the one that a row names.")
    if found.dates:
        count = sum(map(len, found.values.values()))
        days = " to ".join(dict.fromkeys((min(found.dates), max(found.dates))))
        lines.append(f"{len(found.dates)} of {count} numbers: measured on {days}, not run again; --again runs them.")
    for (row, column), chosen in found.chosen.items():
        if chosen:
            lines.append(f"{row}, {column}: {', '.join(chosen)}, best on the validation part.")
    left_out: dict[str, list[str]] = {}
    for what, why in [*found.missing.items(), *found.absent.items()]:
        left_out.setdefault(why, []).append(what)
    return lines + [f"{', '.join(what)}: left out. {why}" for why, what in left_out.items()]


def as_text(found: Comparison, format: tables.Format = tables.Format.markdown, width: int | None = None) -> str:
    parts = [tables.render(table, format, width=width) for table in as_tables(found)]
    if format is tables.Format.markdown:
        return "\n\n".join(parts) + "\n\n" + "\n".join(notes(found)) + "\n"
    comments = [f"% {note}\n" for note in notes(found)] if format is tables.Format.latex else []
    return "".join(comments) + "\n\n".join(parts)


def _of_methods(found: Comparison) -> Table:
    """Our columns, then the paper's."""
    published = [row.paper or [None] * len(found.suite.columns) for row in found.rows]
    papers = {
        place: f"paper: {column.name}"
        for place, column in enumerate(found.suite.columns)
        if any(numbers[place] is not None for numbers in published)
    }
    rows = []
    for row, numbers in zip(found.rows, published, strict=True):
        known = {papers[place]: number for place, number in enumerate(numbers) if number is not None}
        rows.append(tables.Row((row.name,), _measured(found, row) | known))
    headings = [*(column.name for column in found.columns), *papers.values()]
    return Table([""], [tables.Column(heading) for heading in headings], rows)


def _of_backbones(found: Comparison) -> list[Table]:
    """For each heading of the columns one table of what was measured, the paper's rows above ours, and one of
    differences. Rows without a number there are left out."""
    headings = dict.fromkeys(column.table for column in found.columns)
    return [table for heading in headings for table in _under(heading, found)]


def _under(heading: str, found: Comparison) -> list[Table]:
    columns = [tables.Column(column.name) for column in found.columns if column.table == heading]
    ours = {row.name: row for row in found.rows if _measured(found, row)}
    published = [] if found.tiny else [row for row in found.rows if row.paper]
    rows = [tables.Row((f"{row.name} (paper)",), _published(found, row)) for row in published]
    measured = {name: tables.Row((name,), _measured(found, row)) for name, row in ours.items()}
    means = {name: [row.mean(column) for column in columns] for name, row in measured.items()}
    differences = []
    for name, row in ours.items():
        against: dict[str, Sequence[float | None]] = {}
        paper = None if found.tiny else paper_row_of(row, found.suite)
        if paper is not None:
            numbers = _published(found, paper)
            against[f"the paper's {paper.name}"] = [numbers.get(column.name) for column in columns]
        for other in ours.values():
            floor = other.method == "random" or (other.method == "supervised" and row.method != "random")
            if floor and other.method != row.method:
                against[other.name] = means[other.name]
        for what, numbers in against.items():
            texts = dict(zip((c.name for c in columns), map(difference, means[name], numbers), strict=True))
            differences.append(tables.Row((f"{name} − {what}",), texts))
    shown = [row for row in [*rows, *measured.values()] if any(column.name in row.values for column in columns)]
    told = [row for row in differences if any(row.values.values())]
    return [Table([heading], columns, shown), *([Table(["difference"], columns, told)] if told else [])]


def _measured(found: Comparison, row: Row) -> dict[str, Value]:
    places = [(row.name, column.name) for column in found.columns]
    return {place[1]: found.values[place] for place in places if place in found.values}


def _published(found: Comparison, row: Row) -> dict[str, float]:
    numbers = zip(found.columns, row.paper, strict=True)
    return {column.name: number for column, number in numbers if number is not None}


def difference(one: float | None, other: float | None) -> str:
    """
    >>> difference(71.25, 70.0), difference(None, 70.0)
    ('+1.2', '')
    """
    return "" if one is None or other is None else f"{one - other:+.1f}"
