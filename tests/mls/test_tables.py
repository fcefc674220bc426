"""The one table of the toolkit: what stands in it in each format, and that it fits a terminal."""

import csv
import io
import json
import math

from hypothesis import given
from hypothesis import strategies as st

from mls.tables import Column, Format, Row, Table, markdown_table, render

TABLE = Table(
    ["method"],
    [Column("VOC"), Column("overlap", scale=1, digits=3), Column("paper: VOC"), Column("time")],
    [
        Row(["AN"], {"VOC": [0.5, 0.52], "overlap": [0.25], "paper: VOC": 85.89, "time": "0:30"}),
        Row(["EM"], {"VOC": [0.6], "paper: VOC": 89.0}),
        Row(["GR"], {"VOC": [math.nan, 0.9], "time": ""}),
    ],
    "In per cent.",
)


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_measured_numbers_are_means_of_shares_and_published_ones_stand_as_printed() -> None:
    text = render(TABLE, bold=True)
    assert cells(text) == [
        ["method", "VOC", "overlap", "paper: VOC", "time"],
        ["AN", "51.0 ± 1.4", "**0.250**", "85.89", "0:30"],
        ["EM", "**60.0**", "", "89", ""],
        ["GR", "nan", "", "", ""],
    ]
    assert text.endswith("|\n\nIn per cent.")


def test_json_and_csv_hold_every_seed_and_say_which_numbers_are_published() -> None:
    records = json.loads(render(TABLE, Format.json))
    assert [(one["method"], one["column"], one["seeds"]) for one in records] == [
        ("AN", "VOC", 2),
        ("AN", "overlap", 1),
        ("AN", "paper: VOC", None),
        ("EM", "VOC", 1),
        ("EM", "paper: VOC", None),
        ("GR", "VOC", 2),
    ]
    assert records[0]["values"] == [50.0, 52.0] and records[2]["values"] == [85.89]
    table = list(csv.DictReader(io.StringIO(render(TABLE, Format.csv))))
    assert [(one["method"], one["column"]) for one in table] == [(one["method"], one["column"]) for one in records]
    assert float(table[0]["mean"]) == 51.0 and table[2]["seeds"] == ""


LINES = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(st.text("ab ±", max_size=30), min_size=size, max_size=size), min_size=2, max_size=5)
)


@given(LINES, st.integers(70, 140), st.integers(1, 2))
def test_a_table_fits_the_terminal_and_loses_no_number(lines: list[list[str]], width: int, labels: int) -> None:
    lines = [[cell.strip() for cell in line] for line in lines]
    text = markdown_table(lines[0], lines[1:], width, labels)
    assert all(len(line) <= width for line in text.splitlines())
    blocks = [cells(block) for block in text.split("\n\n")]
    for number, line in enumerate(lines):
        assert [cell for block in blocks for cell in block[number][labels:]] == line[labels:]
        for block in blocks:  # each block names its rows
            for found, label in zip(block[number][:labels], line, strict=False):
                start, _, end = found.partition("…")
                assert label.startswith(start.strip()) and label.endswith(end.strip())
