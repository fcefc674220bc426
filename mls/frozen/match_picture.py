"""Pictures of queries and what matches them, one line a query: crops or boxes in whole images, red and yellow, or pairs
of images with the regions that matched in one colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

Pixels = UInt8[np.ndarray, "height width 3"]
Box = Sequence[float]  # x0 y0 x1 y1 as shares of the image's width and height

CELL, FRAME, GAP, MARGIN, CAPTION, HEADER = 96, 3, 6, 10, 18, 24  # pixels of the drawn picture
WHOLE = 160  # pixels of the longer side of a whole image
RED, YELLOW, GREEN, INK = "#d62728", "#f2b701", "#1b7f3b", "#222222"
PAIR_COLOURS = (RED, "#2a78d6", YELLOW)


@dataclass(frozen=True)
class GalleryRow:
    """One query crop and its matches, nearest first."""

    query: Pixels
    matches: list[Pixels]
    scores: list[float]  # cosines
    shared: list[bool] | None  # has the match's image a true label in common with the query's? None without labels
    query_id: int
    match_ids: list[int]
    query_box: Box | None = None  # where the crops lie in their images; None: not known
    match_boxes: Sequence[Box] | None = None
    name: str = ""  # of the query's file


def file_name(described: str) -> str:
    """Of what a source says of an image; "" where it is in no file of its own.

    >>> file_name("/data/coco/000000000009.jpg"), file_name("a.tar:b/1.png"), file_name("scene 3 of the train split")
    ('000000000009.jpg', '1.png', '')
    """
    name = described.replace(":", "/").rpartition("/")[2]
    return name if "." in name else ""


def draw(rows: list[GalleryRow], cell: int = CELL, frame: int = FRAME) -> Image.Image:
    """One line a query: its crop framed red, its matches framed yellow with their cosines below; a green tick where
    the images share a true label. The columns have heads, the queries the names of their files or else numbers."""
    side = cell + 2 * frame
    pitch = side + GAP
    across = 1 + max((len(row.matches) for row in rows), default=0)
    width = 2 * MARGIN + across * pitch - GAP + 2 * GAP  # the query stands a little apart
    picture = Image.new("RGB", (width, HEADER + MARGIN + len(rows) * (pitch + CAPTION) - GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for place in range(across):
        middle = MARGIN + place * pitch + 2 * GAP * (place > 0) + side // 2
        head = f"match {place}" if place else "query"
        pen.text((middle, HEADER // 2), head, fill=INK, font=font, anchor="mm")
    framed = lambda crop, colour: ImageOps.expand(_scaled(crop, (cell, cell)), frame, colour)
    for line, row in enumerate(rows):
        top = HEADER + line * (pitch + CAPTION)
        picture.paste(framed(row.query, RED), (MARGIN, top))
        name = (MARGIN + side // 2, top + side + CAPTION // 2)
        pen.text(name, end_of(row.name or f"image {row.query_id}", side, font), fill=INK, font=font, anchor="mm")
        for number, (match, score) in enumerate(zip(row.matches, row.scores, strict=True)):
            left = MARGIN + (number + 1) * pitch + 2 * GAP
            picture.paste(framed(match, YELLOW), (left, top))
            middle, below = left + side // 2, top + side + CAPTION // 2
            pen.text((middle, below), f"{score:.2f}", fill=INK, font=font, anchor="mm")
            if row.shared is not None and row.shared[number]:
                _tick(pen, middle + 20, below)
    return picture


def end_of(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much as fits: the end of a path tells more than its beginning."""
    while font.getlength(text) > width:
        text = f"…{text.lstrip('…')[1:]}"
    return text


def _scaled(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    """The pixels of tiny images stay visible, larger ones are smoothed."""
    tiny = max(pixels.shape[:2]) < max(size)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if tiny else Image.Resampling.BILINEAR)


def boxed(image: Pixels, boxes: Sequence[tuple[Box, str]], frame: int = FRAME) -> Pixels:
    """The whole image, its longer side WHOLE pixels, in the middle of a white square, with boxes of these colours."""
    height, width = (max(1, round(WHOLE * side / max(image.shape[:2]))) for side in image.shape[:2])
    small = _scaled(image, (width, height))
    for box, colour in boxes:
        x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
        ImageDraw.Draw(small).rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colour, width=frame)
    return np.asarray(ImageOps.pad(small, (WHOLE, WHOLE), color="white"))


def _tick(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.line([(x, y), (x + 3, y + 4), (x + 10, y - 5)], fill=GREEN, width=2)


@dataclass(frozen=True)
class RegionPair:
    """Two images and the regions of them that matched, as x0 y0 x1 y1 in shares of their width and height."""

    first: Pixels
    second: Pixels
    boxes: Sequence[tuple[Box, Box]]  # best first
    score: float  # of the images
    shared: bool | None = None  # have they a true label in common? None without labels


def draw_pairs(lines: list[list[RegionPair]]) -> Image.Image:
    """One line a query: it and each image that it is like, side by side, regions that matched in the same colour."""
    width, height = 2 * WHOLE + 3 * GAP, WHOLE + CAPTION + GAP
    across = max((len(line) for line in lines), default=0)
    picture = Image.new("RGB", (2 * MARGIN + across * width, 2 * MARGIN + len(lines) * height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for row, line in enumerate(lines):
        for column, pair in enumerate(line):
            left, top = MARGIN + column * width, MARGIN + row * height
            for side, pixels in enumerate((pair.first, pair.second)):
                boxes = list(zip((both[side] for both in pair.boxes), PAIR_COLOURS, strict=False))
                drawn = Image.fromarray(boxed(pixels, boxes[::-1], frame=2))  # the best on top
                picture.paste(drawn, (left + side * (WHOLE + GAP // 2), top))
            middle, below = left + WHOLE, top + WHOLE + CAPTION // 2
            pen.text((middle, below), f"{pair.score:.2f}", fill=INK, font=font, anchor="mm")
            if pair.shared:
                _tick(pen, middle + 20, below)
    return picture


def draw_words(words: Sequence[tuple[str, Sequence[Pixels]]], cell: int = CELL * 2 // 3) -> Image.Image:
    """One line a word: what it is called, and regions that are it."""
    font, pitch = ImageFont.load_default(size=12), cell + GAP
    left = 2 * MARGIN + max(round(font.getlength(name)) for name, _ in words)
    across = max(len(regions) for _, regions in words)
    picture = Image.new("RGB", (left + across * pitch - GAP + MARGIN, 2 * MARGIN + len(words) * pitch - GAP), "white")
    for row, (name, regions) in enumerate(words):
        top = MARGIN + row * pitch
        ImageDraw.Draw(picture).text((MARGIN, top + cell // 2), name, fill=INK, font=font, anchor="lm")
        for column, pixels in enumerate(regions):
            picture.paste(_scaled(pixels, (cell, cell)), (left + column * pitch, top))
    return picture
