"""`mls scenes`: look at the embedded scenes, or write them to disk in the layouts of published data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from mls.data.scenes import Scenes

COLUMNS = 8
SHOWN = 128  # pixels a scene takes on the contact sheet at least

app = typer.Typer(
    help="The embedded scenes: real handwritten digits composed into multi-object images.", no_args_is_help=True
)


@app.command()
def export(
    layout: Annotated[str, typer.Option(help="coco, voc, cityscapes or folders.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    train: Annotated[int, typer.Option(help="Number of training images.")] = 500,
    test: Annotated[
        int, typer.Option(help="Number of images to evaluate on; no digit of theirs is in a training image.")
    ] = 200,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Another seed makes other scenes.")] = 0,
) -> None:
    """Write scenes with their boxes, masks and labels as a published data set would be.

    Examples:

        mls scenes export --layout coco --out scenes-coco

        mls scenes export --layout voc --out scenes-voc --train 2000 --test 500 --size 256
    """
    from mls.data.layouts import write
    from mls.progress import counting

    out = out.expanduser()
    with counting(f"writing {layout}", train + test) as advance:
        write(layout, out, train, test, size, seed, advance)
    print(f"wrote {train} train and {test} test images of {size} pixels to {out}")


@app.command()
def preview(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture, .png or .jpg; default: scenes.png in $MLS_RUNS.")
    ] = None,
    count: Annotated[int, typer.Option(help="Number of scenes.")] = 40,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    size: Annotated[int, typer.Option(help="Side of the scenes in pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="Another seed makes other scenes.")] = 0,
    easy: Annotated[bool, typer.Option("--easy", help="The easier style: stronger textures, always in type.")] = False,
    hard: Annotated[bool, typer.Option("--hard", help="The harder style, for 64 pixels.")] = False,
    objects: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Class folders of photographs in the digits' place.")
    ] = None,
) -> None:
    """Draw one sheet of scenes with their boxes and classes.

    Example:

        mls scenes preview --out scenes.png --count 40

        mls scenes preview --objects /data/photographs --size 64
    """
    from mls.config import ScenesConfig
    from mls.data.scenes import scenes_of
    from mls.files import check_picture, place_for, save_picture

    check_picture(out or Path("scenes.png"))
    style = "hard" if hard else "easy" if easy else "standard"
    scenes, names = scenes_of(ScenesConfig(count, count, size, seed, style, objects), split)
    file = place_for("scenes.png", out)
    save_picture(contact_sheet(scenes, names), file)
    print(f"{file}: {count} scenes of {size} pixels, boxes drawn around what is seen of each object")


def contact_sheet(scenes: Scenes, names: Sequence[str]) -> Image:
    """The scenes side by side, enlarged by a whole number, each box with its class."""
    from PIL import Image, ImageDraw

    size = scenes.images.shape[-1]
    zoom = max(1, SHOWN // size)
    step = size * zoom + 4
    rows = -(-len(scenes) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * step, rows * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
        left, top = i % COLUMNS * step + 2, i // COLUMNS * step + 2
        side = size * zoom
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for digit, box in zip(scenes.classes[i].tolist(), scenes.boxes[i].tolist(), strict=True):
            if digit >= 0:
                x0, y0, x1, y1 = (zoom * value for value in box)
                draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), outline="yellow")
                draw.text((left + x0 + 3, top + y0 + 1), names[int(digit)], fill="yellow")
    return sheet
