"""`found.png`: some test images with their predictions and labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mls.data.pictures import VOID
from mls.eval.data.objects import ObjectImages, Objects, RunLengths
from mls.eval.data.regions import RegionImages
from mls.eval.dense.coco_ap import Detections
from mls.files import save_picture

Pixels = UInt8[Tensor, "3 height width"]

SHOWN = 6  # images
HEIGHT, GAP, CAPTION = 240, 6, 18  # pixels of the drawn picture
MIN_SCORE = 0.3  # detections with a lower score are not drawn
FONT, LABEL = ImageFont.load_default(11), 15  # and the height of a label


def chosen(images: ObjectImages | RegionImages) -> list[int]:
    """Evenly spaced rows of a split, the same in every run."""
    count = min(SHOWN, len(images))
    return [number * len(images) // count for number in range(count)]


def save(file: Path, images: ObjectImages | RegionImages, rows: Sequence[int], found: Sequence[object]) -> None:
    """A line per image: the image, its prediction in `found` (a network's `predict`), its labels."""
    lines, classes = [], set()
    for row, one in zip(rows, found, strict=True):
        pixels, names = images.pixels(row), images.class_names
        if isinstance(images, ObjectImages):
            assert isinstance(one, Detections)
            views = [with_boxes(pixels, one, names), with_boxes(pixels, images.objects(row), names)]
            classes |= {*one.classes[one.scores >= MIN_SCORE].tolist(), *images.objects(row).classes.tolist()}
        else:
            assert isinstance(one, Tensor)
            views = [painted(pixels, one), painted(pixels, images.labels(row))]
            classes |= {*one.unique().tolist(), *images.labels(row).unique().tolist()} - {VOID}
        lines.append([scaled(pixels), *views])
    sheet = _table(lines, ["image", "found", "true"], [images.describe(row) for row in rows])
    save_picture(_with_legend(sheet, {images.class_names[i]: colour(i) for i in sorted(classes)}), file)


def scaled(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.BILINEAR)


def with_boxes(pixels: Pixels, objects: Detections | Objects, names: Sequence[str]) -> Image.Image:
    scores = objects.scores if isinstance(objects, Detections) else torch.ones(len(objects.boxes))
    shown: list[int] = (scores >= MIN_SCORE).nonzero()[:, 0].tolist()
    columns: list[int] = objects.classes.tolist()
    image = scaled(with_masks(pixels, [(objects.outlines[i], columns[i]) for i in shown] if objects.outlines else []))
    draw = ImageDraw.Draw(image)
    boxes = [(objects.boxes[i] * (HEIGHT / pixels.shape[1])).tolist() for i in shown]
    for i, box in zip(shown, boxes, strict=True):
        draw.rectangle(box, outline=colour(columns[i]), width=2)
    taken: list[tuple[float, float, float, float]] = []
    for i, box in sorted(zip(shown, boxes, strict=True), key=lambda both: -float(scores[both[0]])):
        name = names[columns[i]]
        text = f"{name} {scores[i]:.2f}" if isinstance(objects, Detections) else name
        place = free_place(box, (FONT.getlength(text) + 4, LABEL), image.size, taken)
        if place is not None:  # the colour still tells, and the legend its name
            taken.append(place)
            draw.rectangle(place, fill=colour(columns[i]))
            draw.text((place[0] + 2, place[1] + 1), text, fill="white", font=FONT)
    return image


def free_place(
    box: Sequence[float],
    size: tuple[float, float],
    image: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """Where a label of this size covers no other: over the box, at its top or further down along it; None: nowhere.

    >>> free_place((10, 20, 50, 60), (30, 10), (100, 100), taken=[])
    (10, 10, 40, 20)
    >>> free_place((10, 20, 50, 60), (30, 10), (100, 100), taken=[(0, 0, 35, 25)])
    (10, 26, 40, 36)
    """
    width, height = size
    left = max(0, min(box[0], image[0] - width))
    lowest = min(box[3], image[1] - height)
    tops = [top for top in (box[1] - height, box[1]) if 0 <= top <= lowest]
    tops += [below for *_, bottom in taken if box[1] < (below := bottom + 1) <= lowest]
    for top in sorted(tops):
        place = left, top, left + width, top + height
        if all(place[2] < x0 or x1 < left or place[3] < y0 or y1 < top for x0, y0, x1, y1 in taken):
            return place
    return None


def with_masks(pixels: Pixels, masks: Sequence[tuple[RunLengths, int]]) -> Pixels:
    from faster_coco_eval import mask

    pixels = pixels.clone()
    for outline, column in masks:
        inside = torch.from_numpy(mask.decode(outline)).bool()
        pixels[:, inside] = (0.5 * pixels[:, inside] + 0.5 * torch.tensor(colour(column))[:, None]).to(torch.uint8)
    return pixels


def painted(pixels: Pixels, classes: Int[Tensor, "height width"]) -> Image.Image:
    """The image blended with the colours of its classes; void is black."""
    flat = torch.tensor([colour(number) if number != VOID else (0, 0, 0) for number in range(256)], dtype=torch.uint8)
    over = flat[classes.long()].permute(2, 0, 1)
    mixed = (0.35 * pixels + 0.65 * over).to(torch.uint8)
    return scaled(torch.where(classes == VOID, over, mixed))


def colour(column: int) -> tuple[int, int, int]:
    """Consecutive classes are far apart on the colour circle.

    >>> len({colour(number) for number in range(150)})
    150
    """
    red, green, blue = colorsys.hsv_to_rgb(column * 0.618034 % 1, 0.85 - 0.25 * (column % 3 == 2), 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def _table(lines: Sequence[Sequence[Image.Image]], heads: Sequence[str], files: Sequence[str]) -> Image.Image:
    """Heads over the columns, the end of each line's file name below it."""
    widths = [max(line[place].width for line in lines) for place in range(len(heads))]
    pitch = HEIGHT + CAPTION + GAP
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(heads) + 1), CAPTION + pitch * len(lines) + GAP), "white")
    draw, left = ImageDraw.Draw(sheet), GAP
    for place, head in enumerate(heads):
        draw.text((left, 3), head, fill="#222222", font=FONT)
        for number, line in enumerate(lines):
            sheet.paste(line[place], (left, CAPTION + GAP + number * pitch))
        left += widths[place] + GAP
    for number, name in enumerate(files):
        while name and FONT.getlength(name) > sheet.width - 2 * GAP:
            name = name[1:]
        draw.text((GAP, CAPTION + GAP + number * pitch + HEIGHT + 2), name, fill="#666666", font=FONT)
    return sheet


def _with_legend(sheet: Image.Image, colours: dict[str, tuple[int, int, int]]) -> Image.Image:
    """The sheet with the names of its classes below."""
    places, left, line = {}, GAP, 0
    for name in colours:
        width = CAPTION + round(FONT.getlength(name)) + 2 * GAP
        if left + width > sheet.width and left > GAP:
            left, line = GAP, line + 1
        places[name] = (left, sheet.height + line * CAPTION)
        left += width
    whole = Image.new("RGB", (sheet.width, sheet.height + (line + 1) * CAPTION * bool(colours)), "white")
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    for name, (left, top) in places.items():
        draw.rectangle((left, top, left + 12, top + 12), fill=colours[name])
        draw.text((left + CAPTION, top), name, fill="#222222", font=FONT)
    return whole
