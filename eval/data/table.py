"""`table`: labels of one's own images from a .csv or .parquet file, a column a class (1, 0, -1, blank) or in long form
(image, class, value). What is wrong with a table is one sentence with its line; lists are in class_folders.py."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int8
from numpy.typing import NDArray
from torch import Tensor

from mls.data.listing import FileSource, locate, printable, show
from mls.data.unreadable import MOST
from mls.errors import ConfigError, DataError, reason
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.own import PARTS as PART_NAMES
from mls.files import demand_pyarrow

IMAGE = ("image", "path", "file", "filename", "file_name")  # names of the column that names the image; else the first
PARTS = {word: part for part, words in PART_NAMES.items() for word in words}  # in the column split
BLANK = 2  # of a cell; zero and blank become labels once the whole table is known
VALUES = {"": BLANK, "nan": BLANK, "na": BLANK, "n/a": BLANK, "none": BLANK, "null": BLANK, "\u22121": -1}
VALUES |= {"1": 1, "+1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "-0.0": 0, "false": 0, "-1": -1, "-1.0": -1}
FORMULA = "=+-@\t\r"  # a spreadsheet runs a cell that begins so
MOST_NAME, MOST_CLASS = 4096, 200  # bytes of a path, characters of a class
HELD_OUT = 5  # of a table without a split column, about a fifth of the images is the test
SHOWN = 3  # lines in a sentence


@dataclass(frozen=True)
class OwnLabels:
    """How a file of own labels is read; the keys of the same names under `data.`."""

    labels_file: str | None = None
    answers: str | None = None
    classes: tuple[str, ...] = ()
    zero: Literal["auto", "absent", "unknown"] = "auto"
    blank: Literal["unknown", "absent"] = "unknown"
    seed: int = 1200
    most_unreadable: float = MOST
    written: tuple[int, ...] = ()  # when the files were: what was read of them is not kept for changed ones


@dataclass
class Table:
    """Cells as they stand in the file: 1, 0, -1 or BLANK."""

    file: Path
    classes: list[str]
    places: dict[bytes, int] = field(default_factory=dict)  # of each image its row
    lines: list[int] = field(default_factory=list)  # and where it is first named
    parts: list[str] = field(default_factory=list)  # train, val or test; empty without a split column
    cells: NDArray[np.int8] = field(default_factory=lambda: np.zeros((0, 0), np.int8))
    one_each: bool = False  # a class for each image, in long form without values

    @property
    def images(self) -> list[bytes]:
        return list(self.places)


def read(root: Path | None, own: OwnLabels) -> tuple[DataSet, str]:
    """The data set, and what 0 was taken for where the table does not say. Images are named relative to `root`, by
    default the table's folder. A column `split` (train, val, test) says what each is for; without one about a
    fifth is the test, by the hash of name and seed, so that a table to which images are added keeps its parts."""
    if own.labels_file is None:
        raise DataError("data.name=table needs its file: data.labels_file=labels.csv, or .parquet")
    file = locate(own.labels_file, "data.labels_file")
    folder = file.parent if root is None else root
    table = read_table(file, folder, own.classes)
    truth = torch.from_numpy((table.cells == 1).argmax(1) if table.one_each else as_truth(table.cells, own))
    if own.answers:
        answers = read_answers(locate(own.answers, "data.answers"), folder, table)
        for place, label in answers.items():  # they stand above what the table says
            truth[place] = label
    parts = np.array(table.parts or by_hash(table.images, own.seed))
    if "test" not in parts:
        parts[parts == "val"] = "test"
    images = np.array(table.images, object)

    def part(name: str) -> LabelledImages | None:
        rows = np.flatnonzero(parts == name)
        if not len(rows):
            return None
        source = FileSource(f"table {name}", folder, images[rows].tolist())
        return LabelledImages(source, truth[torch.from_numpy(rows)], table.classes)

    train, test = part("train"), part("test")
    if train is None or test is None:
        raise DataError(f"{show(file)} has no row for {'test' if train else 'train'} in its column split: add some")
    return DataSet("table", train, test, part("val")), _about_zero(table, own)


def read_table(file: Path, root: Path, only: Sequence[str] = ()) -> Table:
    """`only`: the columns that are classes; default: all but those that name the image and its part."""
    rows = rows_of(file)
    _, header = next(rows, (1, []))
    lower = [name.strip().lower() for name in header]
    if len(header) < 2:
        raise DataError(f"{show(file)} has no columns: its first line names them, such as image,cat,dog")
    image = next((lower.index(name) for name in IMAGE if name in lower), 0)
    split = lower.index("split") if "split" in lower else None
    long = "class" in lower
    reader = _Reader(file, root, image, split, header, Table(file, []))
    if long:
        value = lower.index("value") if "value" in lower else None
        reader.read_long(rows, lower.index("class"), value, only)
    else:
        columns = [n for n in range(len(header)) if n not in (image, split) and (not only or header[n].strip() in only)]
        reader.read_wide(rows, _class_columns(file, header, columns, only))
    if not reader.table.places:
        raise DataError(f"{show(file)} has a header and no rows: add some")
    reader.refuse_missing()
    return reader.table


def _class_columns(file: Path, header: Sequence[str], columns: list[int], only: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for column in columns:
        name = header[column].strip()
        _check_class(file, 1, name)
        if name in found:
            raise DataError(f"{show(file)} line 1 names the column {_short(name)} twice: rename one of them")
        found[name] = column
    if missing := [name for name in only if name not in found]:
        raise DataError(f"{show(file)} has no column {_short(missing[0])}, which data.classes names: correct it")
    if not found:
        raise DataError(f"{show(file)} has no column of a class: add some beside the one that names the image")
    return found


@dataclass
class _Reader:
    """The rows of one file become a Table."""

    file: Path
    root: Path
    image: int
    split: int | None
    header: Sequence[str]
    table: Table

    def read_wide(self, rows: Iterable[tuple[int, list[str]]], columns: dict[str, int]) -> None:
        table, found = self.table, []
        table.classes = list(columns)
        for line, row in rows:
            place = self.place(line, row)
            if place < len(found):
                raise self.wrong(line, f"names {self.shown(row)} again, first in line {table.lines[place]}: keep one")
            found.append([self.value(line, name, row[column]) for name, column in columns.items()])
        table.cells = np.array(found, np.int8).reshape(len(found), len(columns))

    def read_long(
        self, rows: Iterable[tuple[int, list[str]]], named: int, value: int | None, only: Sequence[str]
    ) -> None:
        """Without a column of values every class that is named is present."""
        table, given = self.table, dict[tuple[int, str], tuple[int, int]]()
        for line, row in rows:
            place, name = self.place(line, row), row[named].strip()
            if only and name not in only:
                continue
            _check_class(self.file, line, name)
            if (place, name) in given:
                first = given[place, name][1]
                raise self.wrong(
                    line, f"labels {_short(name)} of {self.shown(row)} again, first in line {first}: keep one"
                )
            given[place, name] = (1 if value is None else self.value(line, name, row[value]), line)
        table.classes = sorted({name for _, name in given})
        column = {name: number for number, name in enumerate(table.classes)}
        table.cells = np.full((len(table.places), len(column)), BLANK, np.int8)
        for (place, name), (label, _) in given.items():
            table.cells[place, column[name]] = label
        table.one_each = value is None and len({place for place, _ in given}) == len(given) == len(table.places)

    def place(self, line: int, row: list[str]) -> int:
        """The row of the image that a line names; a new one where it is named first."""
        if len(row) != len(self.header):
            raise self.wrong(line, f"has {len(row)} cells where the header has {len(self.header)}: correct it")
        name, table = self.named(line, row[self.image]), self.table
        part = "" if self.split is None else PARTS.get(row[self.split].strip().lower(), "")
        if self.split is not None and not part:
            raise self.wrong(line, f"is for {_short(row[self.split])!r} in the column split: write train, val or test")
        if (place := table.places.get(name)) is None:
            place = table.places[name] = len(table.places)
            table.lines.append(line)
            table.parts += [part] if part else []
        elif part and table.parts[place] != part:
            raise self.wrong(line, f"puts {self.shown(row)} into {part}, line {table.lines[place]} into "
                             f"{table.parts[place]}: an image is in one part")  # fmt: skip
        return place

    def named(self, line: int, text: str) -> bytes:
        """The path of an image below the root."""
        text = text.strip()
        if not text or "\0" in text:
            raise self.wrong(line, "names no image: give the path of one")
        name = os.fsencode(text)
        if len(name) > MOST_NAME or max(map(len, name.split(b"/"))) > 255:
            raise self.wrong(
                line, f"names an image with {len(text):,} characters ({_short(text)}): no file is called so"
            )
        path = os.path.normpath(os.path.join(os.fsencode(self.root), name))
        inside = os.path.relpath(path, os.fsencode(os.path.normpath(self.root)))
        if inside.split(b"/")[0] == b"..":
            raise self.wrong(line, f"names {_short(text)}, which lies outside {show(self.root)}: set data.root to a "
                             "folder that holds all images")  # fmt: skip
        return inside

    def value(self, line: int, column: str, cell: str) -> int:
        text = cell.strip().lower()
        if text in VALUES:
            return VALUES[text]
        what = "a formula" if text[:1] == "=" else "none of 1, 0, -1 and blank"
        advice = "save values" if text[:1] == "=" else "correct it, or name the columns of classes with data.classes"
        raise self.wrong(line, f"has {_short(cell)!r} in the column {_short(column)}, which is {what}: {advice}")

    def shown(self, row: Sequence[str]) -> str:
        return _short(row[self.image].strip())

    def wrong(self, line: int, what: str) -> DataError:
        return DataError(f"{show(self.file)} line {line} {what}")

    def refuse_missing(self) -> None:
        table = self.table
        gone = [
            (line, name)
            for line, name in zip(table.lines, table.places, strict=True)
            if not os.path.isfile(os.path.join(os.fsencode(self.root), name))
        ]
        if gone:
            first = ", ".join(f"line {line} {_short(printable(name))}" for line, name in gone[:SHOWN])
            more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
            raise DataError(
                f"{show(self.file)} names images that are not under {show(self.root)}: {first}{more}; correct these "
                "lines, or set data.root to the folder of the images"
            )


def _check_class(file: Path, line: int, name: str) -> None:
    if not name or len(name) > MOST_CLASS or not name.isprintable() or name[0] in FORMULA:
        why = "no name" if not name else "a formula to a spreadsheet" if name[0] in FORMULA else "no class's name"
        raise DataError(f"{show(file)} line {line} has the class {_short(name)!r}, which is {why}: rename it")


def rows_of(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells, the header first; of a parquet file the rows are counted as lines below it."""
    if file.suffix.lower() == ".parquet":
        yield from _rows_of_parquet(file)
        return
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{show(file)} line {line} is not UTF-8 text: save the table as CSV in UTF-8") from None
    first = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        for row in lines:
            if any(row):
                yield lines.line_num, row
    except csv.Error as error:
        raise DataError(f"{show(file)} line {lines.line_num + 1} is no CSV ({error}): correct it") from None


def _rows_of_parquet(file: Path) -> Iterator[tuple[int, list[str]]]:
    demand_pyarrow(file)
    from pyarrow import ArrowException  # pyright: ignore
    from pyarrow.parquet import read_table as read_parquet  # pyright: ignore

    try:
        found = read_parquet(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{show(file)} is no parquet file ({reason(error)[:200]}): write it again") from None
    yield 1, found.column_names
    columns = [column.to_pylist() for column in found.columns]
    for number, row in enumerate(zip(*columns, strict=True), start=2):
        yield number, ["" if cell is None else str(cell) for cell in row]


# ------------------------------------------------------------------------------------------------------ what cells mean


def as_truth(cells: Int8[np.ndarray, "images classes"], own: OwnLabels) -> Int8[np.ndarray, "images classes"]:
    """+1 present, -1 absent, 0 unknown. A zero is a known absence, unless the table has -1 for that.

    >>> as_truth(np.array([[1, 0, 2]], np.int8), OwnLabels()).tolist()
    [[1, -1, 0]]
    >>> as_truth(np.array([[1, 0, -1]], np.int8), OwnLabels()).tolist()
    [[1, 0, -1]]
    """
    blank = -1 if own.blank == "absent" else 0
    zero = -1 if zero_means(cells, own) == "absent" else 0
    return np.select([cells == BLANK, cells == 0], [blank, zero], cells).astype(np.int8)


def zero_means(cells: Int8[np.ndarray, "images classes"], own: OwnLabels) -> str:
    return own.zero if own.zero != "auto" else "unknown" if (cells == -1).any() else "absent"


def summary(data: DataSet) -> str:
    """What a user should know before anything is trained: classes, counts, how much is unknown."""
    train, parts = data.train, {"train": data.train, "val": data.val, "test": data.test}
    sizes = ", ".join(f"{len(images):,} {part}" for part, images in parts.items() if images is not None)
    lines = [f"{data.name}: {len(train.class_names)} classes; images: {sizes}"]
    if train.single_label:
        counts = torch.bincount(train.truth, minlength=len(train.class_names))
        return "\n".join([*lines, f"  images of a class in train: {_spread(counts, train)}"])
    for part, images in parts.items():
        if images is not None:
            present, absent = (int((images.truth == sign).sum()) for sign in (1, -1))
            unknown = 1 - (present + absent) / images.truth.numel()
            lines.append(f"  {part}: {present:,} labels present, {absent:,} absent, {unknown:.1%} unknown")
    lines.append(f"  positives of a class in train: {_spread((train.truth > 0).sum(0), train)}")
    for part, images in parts.items():
        if images is not None and (none := int((~(images.truth > 0).any(0)).sum())):
            does = "cannot be learnt" if part == "train" else "count 0 in map and are left out of map_class"
            lines.append(f"  {none} of the classes are present in no image of {part}: they {does}")
    return "\n".join(lines)


def _spread(counts: Tensor, images: LabelledImages) -> str:
    low, high = int(counts.argmin()), int(counts.argmax())
    few, many = (f"{int(counts[at]):,} ({_short(images.class_names[at])})" for at in (low, high))
    return f"{few} to {many}, median {int(counts.median()):,}"


def _about_zero(table: Table, own: OwnLabels) -> str:
    if own.zero != "auto" or table.one_each or not (table.cells == 0).any():
        return ""
    means = zero_means(table.cells, own)
    why = "no -1 stands in the table" if means == "absent" else "-1 stands for absent"
    other = "unknown" if means == "absent" else "absent"
    return f"{show(table.file)}: 0 is read as {means}, since {why} (data.zero={other} reads it otherwise)"


def by_hash(images: Sequence[bytes], seed: int) -> list[str]:
    """The test has the images whose hash lies in the lowest fifth of the range of hashes; each part has one at least.

    >>> by_hash([b"a.jpg", b"b.jpg", b"c.jpg"], 0)
    ['test', 'train', 'test']
    """
    hashes = [int.from_bytes(hashlib.sha1(b"%d/%s" % (seed, name)).digest(), "big") for name in images]
    lowest, *rest = sorted(hashes)
    limit = min([max(2**160 // HELD_OUT, lowest + 1), *rest[-1:]])
    return ["test" if one < limit else "train" for one in hashes]


def refuse_unmeasurable(data: DataSet) -> None:
    """Before anything is trained that could not be tested."""
    test, truth = data.test, data.test.truth
    if truth.ndim == 2 and not ((truth > 0).any(0) & (truth < 0).any(0)).any():
        raise DataError(
            f"{data.name}: among the {len(test)} test images no class is known to be present in one and absent in "
            "another, so nothing can be measured: write 0 where a class is absent, or say data.blank=absent"
        )


# ------------------------------------------------------------------------------------------------------------- answers


def read_answers(file: Path, root: Path, table: Table) -> dict[tuple[int, int], int]:
    """A filled-in list (image, class, value): for (image, class) of the table 1 present, 0 or -1 absent; what is still
    blank is left out."""
    if table.one_each:
        raise ConfigError(f"data.answers are for images with several classes: {show(table.file)} gives each image one")
    found = read_table(file, root)
    column = {name: number for number, name in enumerate(table.classes)}
    given: dict[tuple[int, int], int] = {}
    for name, place in found.places.items():
        if name not in table.places:
            line = found.lines[place]
            raise DataError(f"{show(file)} line {line} answers {_short(printable(name))}, which is not in {table.file}")
        for number, label in enumerate(found.classes):
            if (cell := int(found.cells[place, number])) == BLANK:
                continue
            if label not in column:
                raise DataError(
                    f"{show(file)} line {found.lines[place]} answers {_short(label)}, no class of {table.file}"
                )
            given[table.places[name], column[label]] = 1 if cell == 1 else -1
    return given


def cell_text(text: str) -> str:
    """A path for a CSV that a spreadsheet may open: no formula, and the same path.

    >>> cell_text("=1.jpg"), cell_text("a/b.jpg")
    ('./=1.jpg', 'a/b.jpg')
    """
    return f"./{text}" if text[:1] in FORMULA else text


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"


DOWNLOAD = "name your table with data.labels_file=labels.csv"
register("table", Layout(lambda _: read(None, OwnLabels())[0], "", DOWNLOAD, own=True))
