"""`mls labels doctor`: what is missing in one's own table of labels, and a list to fill in, which the table reader
takes back. The statistics are in mls/eval/labels_doctor.py."""

from __future__ import annotations

import base64
import csv
import html
import io
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mls.eval.data import LabelledImages
    from mls.eval.labels_doctor import Missing, Ranked
    from mls.eval.protocol import Frozen

app = typer.Typer(help="What is missing in your own labels.", no_args_is_help=True)

COLUMNS: tuple[str, ...] = ("image", "class", "value", "likely", "chance")
SIDE, SHOWN = 160, 8  # pixels of a picture on the page; classes in the printed table
STYLE = """body{font:14px sans-serif;margin:24px;max-width:1200px}table{border-collapse:collapse}
td,th{padding:2px 12px 2px 0;text-align:left}ol{display:flex;flex-wrap:wrap;gap:12px;padding:0;list-style:none}
li{width:160px;overflow-wrap:anywhere;font-size:12px}img{display:block;max-width:160px}"""


@app.command("doctor")
def doctor(
    arguments: Annotated[
        list[str], typer.Argument(metavar="TABLE KEY=VALUE", help="A .csv or .parquet file; data.root=, data.zero=, …")
    ],
    weights: Annotated[str | None, typer.Option(help="A run, a file or a name; default: torchvision:resnet50.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: labels/TABLE in $MLS_RUNS.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Of the likeliest missing positives so many are listed.")] = 200,
    sample: Annotated[int, typer.Option(min=0, help="And about so many unknown cells, drawn by chance.")] = 100,
) -> None:
    """Say how much is missing in a table of labels, where, which loss copes best, and which cells to look at.

    A linear layer is trained on frozen features, five times on four fifths. Fill in DIR/answers.csv (1 present, 0
    absent) and run the same command again: answers stand above the table. For training: data.answers=DIR/answers.csv.
    The test part of the table is not looked at.

    Examples:

        mls labels doctor labels.csv --weights runs/my-run

        mls labels doctor labels.csv data.zero=unknown data.root=/data/images --weights torchvision:resnet50
    """
    from mls.eval import labels_doctor, load_protocol
    from mls.files import runs_folder
    from mls.recipes import override

    file, *overrides = arguments
    out = runs_folder() / "labels" / Path(file).stem if out is None else out.expanduser()
    answers = out / "answers.csv"
    _claim(out, Path(file).expanduser().resolve())
    if answers.is_file():
        overrides.append(override("data.answers", answers.absolute()))
    protocol = load_protocol("linear", ["data.name=table", override("data.labels_file", file), *overrides])
    images, table, features, asked = _features(protocol, weights or protocol.model.weights)
    if images.single_label or not bool((images.truth == 0).any()):
        raise ConfigError("no label is unknown, so none is missing: data.zero=unknown asks whether the zeros are right")
    missing = labels_doctor.examine(features, images.truth, table)
    likely = labels_doctor.likelihood(missing, images.truth)
    before = _read(answers) if answers.is_file() else []
    lines = [*_rate_lines(missing, images), *_audit_lines(before)]
    print("\n".join(["", *lines, ""]))
    classes = _class_rows(missing, images)
    ranked = labels_doctor.ranked(features, images.truth, *asked)
    tables = [_table(CLASSES, classes[:SHOWN]), _table(LOSSES, _loss_rows(ranked))]
    print("\n\n".join(tables))
    suspects = likely.flatten().topk(min(count, int((likely > 0).sum()))).indices.tolist()
    rows = [divmod(place, likely.shape[1]) for place in suspects]
    _write(answers, before, rows, _sample(likely, images, sample, before), likely, images)
    (out / "suspects.html").write_text(_page(lines, [_table(CLASSES, classes), tables[1]], rows, likely, images))
    print(f"\n{answers}: {len(rows)} likeliest missing positives and a sample, to fill in: 1 present, 0 absent")
    print(f"{out / 'suspects.html'}: their pictures")


def _features(protocol: Frozen, weights: str) -> tuple[LabelledImages, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The training images, their labels without answers, their features, and those of the validation part with its
    labels."""
    from dataclasses import replace

    from mls.eval.extraction import features_of
    from mls.eval.frozen import build_backbone
    from mls.eval.regimes import split
    from mls.eval.splits import load
    from mls.eval.supervised import with_statistics_of

    protocol = with_statistics_of(weights, protocol)
    data = load(protocol.data)
    rows, held = split(len(data.train), protocol.data.validation, protocol.data.seed)
    if data.val is None and not len(held):
        share = f"data.validation={protocol.data.validation:g}"
        raise ConfigError(f"{share} of {len(data.train)} training images leaves none to compare losses on: raise it")
    before = load(replace(protocol.data, answers=None)).train.truth if protocol.data.answers else data.train.truth
    backbone = build_backbone(protocol, weights, 0, data.train)
    whole = features_of(backbone, data.train, protocol, f"of {data.name} train").features.float()
    if data.val is not None:
        asked = features_of(backbone, data.val, protocol, f"of {data.name} val").features.float()
        return data.train, before, whole, (asked, data.val.truth)
    return data.train.part(rows), before[rows], whole[rows], (whole[held], data.train.truth[held])


# ------------------------------------------------------------------------------------------------------ what is said


def _rate_lines(missing: Missing, images: LabelledImages) -> list[str]:
    from mls.eval.labels_doctor import HIDDEN

    present, unknown = (images.truth > 0).sum().item(), (images.truth == 0).float().mean().item()
    if not missing.rate.of:
        return [
            f"{present:,} labels present, {unknown:.1%} unknown: too few positives of any class to say what is missing"
        ]
    return [
        f"{len(images):,} images, {present:,} labels present, {unknown:.1%} unknown",
        f"missing: at most {missing.rate} of the positives, by {missing.rate.of} cells that score highest",
        "  if positives are labelled whatever they look like; exact if all of those cells are positives",
        f"  control, {HIDDEN:.0%} of the labels hidden: {missing.control}; expected {100 * missing.expected:.0f} %",
        f"  in images without another label {missing.alone}, with one {missing.beside}",
        *(
            ["  these differ: by a rule, such as one label an image, or by wrong high scores"]
            if _apart(missing)
            else []
        ),
    ]


def _apart(missing: Missing) -> bool:
    return missing.alone.low > missing.beside.high or missing.beside.low > missing.alone.high


def _audit_lines(before: Sequence[dict[str, str]]) -> list[str]:
    """What the sample says that a person has answered: an estimate without any assumption."""
    from mls.eval.labels_doctor import audited

    drawn = [row for row in before if row["chance"]]
    answered = [row for row in drawn if _answer(row) is not None]
    if not drawn:
        return []
    if len(answered) < len(drawn):
        return [
            f"{len(answered)} of the {len(drawn)} sampled cells are answered: once all are, they say what is missing"
        ]
    total, low, high = audited([(_answer(row) == 1, float(row["chance"])) for row in answered])
    words = f"{sum(_answer(row) == 1 for row in answered)} of {len(answered)} sampled cells are present"
    return [
        f"{words}: {total:.0f} missing positives ({low:.0f} to {high:.0f}) at the time of the draw, whatever the model"
    ]


CLASSES = ["class", "labelled", "missing, at most", "95 % interval", "of cells"]
LOSSES = ["loss", "mAP, validation part", "to an", "95 % interval"]


def _class_rows(missing: Missing, images: LabelledImages) -> list[list[str]]:
    """The most incomplete first."""
    rows = sorted(missing.by_class.items(), key=lambda item: -item[1].low)
    counts = (images.truth > 0).sum(0)
    return [
        [images.class_names[column], f"{counts[column]:,}", f"{100 * share.value:.0f} %",
         f"{100 * share.low:.0f} to {100 * share.high:.0f}", str(share.of)]
        for column, share in rows
    ]  # fmt: skip


def _loss_rows(ranked: Sequence[Ranked]) -> list[list[str]]:
    interval = lambda one: f"{100 * one.low:+.1f} to {100 * one.high:+.1f}" if one.name != "an" else ""
    return [[one.name, f"{100 * one.value:.1f}", f"{100 * one.difference:+.1f}", interval(one)] for one in ranked]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from mls.tables import markdown_table, terminal_width

    return markdown_table(list(heads), [list(row) for row in rows], terminal_width())


# ------------------------------------------------------------------------------------------------------ what is written


def _claim(out: Path, table: Path) -> None:
    """Answers name images as their table does, so those for another table of the same name could pass for its own."""
    from os import fsdecode, fsencode

    from mls.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    note = out / "table.txt"
    was = note.read_bytes().removesuffix(b"\n") if note.is_file() and (out / "answers.csv").is_file() else b""
    if not table.is_file():  # the reader says so
        return
    if was and was != fsencode(table):
        otherwise = f"or delete {note} if that table was moved"
        raise ConfigError(f"{out} holds answers for {fsdecode(was)}: choose another --out, {otherwise}")
    write_atomically(note, fsencode(table) + b"\n")


def _read(answers: Path) -> list[dict[str, str]]:
    """The rows of an earlier list that are answered, or drawn into a sample of which something is answered: another
    sample is drawn otherwise."""
    from mls.errors import DataError
    from mls.eval.data.table import rows_of

    rows = rows_of(answers)
    _, heads = next(rows)
    found = []
    for line, cells in rows:
        found.append(dict.fromkeys(COLUMNS, "") | dict(zip(heads, cells, strict=False)))
        with suppress(ValueError):
            if not found[-1]["chance"] or 0 < float(found[-1]["chance"]) <= 1:
                continue
        what = f"{answers} line {line} has a chance that is no share"
        raise DataError(f"{what}: leave that column as it was written, or choose a new --out")
    begun = any(row["chance"] and _answer(row) is not None for row in found)
    return [row for row in found if _answer(row) is not None or (row["chance"] and begun)]


def _answer(row: dict[str, str]) -> int | None:
    """1 present, 0 or -1 absent, None where the row is still blank."""
    from mls.eval.data.table import BLANK, VALUES

    label = VALUES.get(row["value"].strip().lower(), BLANK)
    return None if label == BLANK else label


def _sample(likely: Tensor, images: LabelledImages, count: int, before: Sequence[dict[str, str]]) -> dict[Any, float]:
    """The chances of the cells that are drawn; none where a sample is there already."""
    import torch

    from mls.eval.labels_doctor import audit_chances
    from mls.streams import generator

    if not count or any(row["chance"] for row in before):
        return {}
    chances = audit_chances(likely, images.truth, count)
    drawn = torch.rand(chances.shape, generator=generator(0, "labels doctor sample")) < chances
    return {(row, column): float(chances[row, column]) for row, column in drawn.nonzero().tolist()}


def _write(
    answers: Path,
    before: Sequence[dict[str, str]],
    suspects: Sequence[tuple[int, int]],
    sample: dict[tuple[int, int], float],
    likely: Tensor,
    images: LabelledImages,
) -> None:
    from mls.eval.data.table import cell_text
    from mls.files import write_atomically

    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    rows.writerows(before)
    named = {(row["image"], row["class"]) for row in before}
    for row, column in dict.fromkeys([*suspects, *sample]):
        place = (cell_text(name_of(images, row)), images.class_names[column])
        if place not in named:
            chance = f"{sample[row, column]:.6g}" if (row, column) in sample else ""
            rows.writerow(
                dict(zip(COLUMNS, (*place, "", f"{min(1.0, float(likely[row, column])):.3f}", chance), strict=True))
            )
    write_atomically(answers, text.getvalue().encode())


def name_of(images: LabelledImages, row: int) -> str:
    """As the table names it, below the root."""
    import os

    source: Any = images.images
    return os.fsdecode(source.relative_paths[images.numbers()[row]])


def _page(
    lines: Sequence[str], tables: Sequence[str], rows: Sequence[tuple[int, int]], likely: Tensor, images: LabelledImages
) -> str:
    items = []
    for row, column in rows:
        words = f"<b>{html.escape(images.class_names[column])}</b> {min(1.0, float(likely[row, column])):.2f}"
        name = html.escape(name_of(images, row))
        items.append(f'<li><img src="{_picture(images, row)}" alt="{name}">{words}<br>{name}</li>')
    text = html.escape("\n\n".join(["\n".join(lines), *tables]))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Missing labels</title><style>{STYLE}</style>
<h1>Missing labels</h1><pre>{text}</pre><h2>The likeliest missing positives</h2>
<p>Each picture with the class that is not labelled in it, and how likely it is present. Write 1 (present) or 0 (absent)
into answers.csv, which has them in this order.</p><ol>{"".join(items)}</ol></html>
"""


def _picture(images: LabelledImages, row: int) -> str:
    from PIL import Image

    picture = Image.fromarray(images.pixels(row).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    picture.save(stream := io.BytesIO(), "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
