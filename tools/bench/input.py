"""`mls bench input`: how many images a core prepares, to normalised views and to crops alone, beside MoCo's pipeline,
those of others that are installed, and decoding alone. Photographs come from scikit-learn unless a folder is named."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mls.data import Source

QUALITY = 90
FACTORS = (2, 4, 8)
SIDE = 320  # of the packed images
LARGE = (2560, 1920)  # a camera's photograph, where decoding at a smaller scale matters
Rounds = list[dict[Any, float]]  # seconds an image, by row


def bench(
    images: Annotated[Path | None, typer.Option(help="A folder of your own images instead of the photographs.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Every row is measured once a round; medians are printed.")] = 7,
    step: Annotated[bool, typer.Option(help="Also time a ResNet-50 step and the augmentation before it.")] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also keep each row's median seconds, as JSON.")
    ] = None,
) -> None:
    """Measure the input pipeline in one worker process, all rows on the same files in turns.

    Times are processor time with one thread, so that other work on the machine counts less. The others' collation is
    left out, ours is not. lightly, albumentations and DALI (nvidia-dali-cuda120) have rows where they are installed.

    Examples:

        mls bench input

        mls bench input --images /data/coco/train2017 --count 200
    """
    from itertools import islice

    from mls.config import DataConfig
    from mls.data.loader import in_workers
    from mls.data.pack import Packing, pack
    from mls.data.sources import build_source
    from mls.tools.bench.results import write_results
    from mls.tools.bench.rows import Race

    with TemporaryDirectory() as folder:
        root = images or write_photographs(Path(folder, "photographs"), count, (640, 480))
        large = write_photographs(Path(folder, "large"), max(2, count // 32), LARGE)
        files = build_source(DataConfig(root=str(root), limit=count))
        pack(files, Path(folder, "packed"), Packing(short_side=SIDE))
        packed = build_source(DataConfig(root=str(Path(folder, "packed"))))
        race = Race(files, packed, build_source(DataConfig(root=str(large))), rounds + 1)
        measured = list(islice(in_workers(race, 1), 1, None))  # the first round warms caches up
        _show(files, measured, "640 × 480, quality 90" if images is None else str(images))
    _show_quality()
    if step:
        _show_device()
    if out is not None:
        write_results(out, _kept(measured))


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEG files of scikit-learn's two photographs at their own density of detail: windows of the mirrored plane."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder.mkdir()
    draw = np.random.default_rng(0)
    width, height = size
    for i in range(count):
        photo = load_sample_image(("china.jpg", "flower.jpg")[i % 2])
        photo = photo[:, :: draw.choice([-1, 1])]
        top, left = (int(draw.integers(0, side)) for side in photo.shape[:2])
        plane = np.pad(photo, ((0, top + height), (0, left + width), (0, 0)), mode="symmetric")
        window = Image.fromarray(plane[top : top + height, left : left + width])
        window.save(folder / f"{i:05d}.jpg", quality=QUALITY)
    return folder


def psnr_of_scaled_decoding(factor: int, spare: float, tries: int = 40) -> list[float]:
    """How near crops from a reduced image are to those from the whole one, in decibels, with `spare` × as many pixels
    as the target before the last scaling."""
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from mls.data.crops import cut, reduced
    from mls.data.decode import Encoded

    draw, found = np.random.default_rng(factor), []
    for name in ("china.jpg", "flower.jpg"):
        stream = io.BytesIO()
        Image.fromarray(load_sample_image(name)).save(stream, "JPEG", quality=QUALITY)
        whole, small = (Encoded(stream.getvalue()).pixels(by) for by in (1, factor))
        height, width = whole.shape[1:]
        for _ in range(tries):
            side = int(draw.integers(height // 2, height + 1)) // factor * factor
            top, left = (int(draw.integers(0, room - side + 1)) // factor * factor for room in (height, width))
            box, size = (top, left, side, side), int(side / factor / spare)
            difference = cut(whole, box, size).double() - cut(small, reduced(box, factor), size)
            found.append(float(10 * torch.log10(255**2 / difference.square().mean().clamp_min(1e-9))))
    return found


def _kept(rounds: Rounds) -> list[dict[str, Any]]:
    """Of each row its median, and how many times as long as ours with the same end it takes (parts: ours to views)."""
    from mls.tools.bench import rows as r

    found: list[dict[str, Any]] = []
    for row in rounds[0]:
        name, ours = (row, (r.OURS, r.VIEWS)) if isinstance(row, str) else (", ".join(row), (r.OURS, row[1]))
        spent = statistics.median(seconds[row] for seconds in rounds)
        found.append({"row": name, "seconds an image": spent, "time, ours = 1": _ratio(rounds, row, ours)})
    missing = [f"{name}, {end}" for end in (r.VIEWS, r.CROPS) for name in _missing(rounds, end)]
    return found + [{"row": name, "seconds an image": None, "note": "not installed"} for name in missing]


def _ratio(rounds: Rounds, row: Any, to: Any) -> float:
    """How many times as long the first row takes."""
    return statistics.median(seconds[row] / seconds[to] for seconds in rounds)


def _missing(rounds: Rounds, end: str) -> list[str]:
    from mls.tools.bench import peers
    from mls.tools.bench import rows as r

    others = (peers.LIGHTLY,) * (end == r.VIEWS) + (peers.ALBUMENTATIONS, peers.DALI)
    return [name for name in others if (name, end) not in rounds[0]]


def _show(files: Source, rounds: Rounds, what: str) -> None:
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from mls.tools.bench import rows as r

    ratio = partial(_ratio, rounds)
    tables = []
    for end in (r.VIEWS, r.CROPS):
        names = [row for row in rounds[0] if isinstance(row, tuple) and row[1] == end] + [r.DECODE]
        table = Table("one core", "images/s", "time, ours = 1", title=f"{end}: {len(files)} images, {what}")
        for row in sorted(names, key=lambda row: ratio(row, (r.OURS, end)), reverse=True):
            rate = 1 / statistics.median(seconds[row] for seconds in rounds)
            name = row if isinstance(row, str) else row[0]
            table.add_row(name, f"{rate:.0f}", f"{ratio(row, (r.OURS, end)):.2f}")
        for name in _missing(rounds, end):
            table.add_row(name, "not installed", "")
        tables.append(table)
    read, decode, cut, crops = (ratio(row, (r.OURS, r.VIEWS)) for row in (r.READ, r.DECODE, r.CUT, (r.OURS, r.CROPS)))
    parts = Table("part", "of the time", title="What bounds ours, to views")
    shares = {r.READ: read, "decoding": decode - read, r.CUT: cut, "boxes, EXIF": crops - decode - cut}
    for row, share in (shares | {"augmentation": 1 - crops}).items():
        parts.add_row(row, f"{share:.0%}")
    others = Table("decoder", "time, ours = 1", title="Decoding with others, the same files")
    for row in (r.PILLOW, r.HALF, r.SIMPLE):
        others.add_row(row, f"{ratio(row, r.DECODE):.2f}" if row in rounds[0] else "not installed")
    large = Table("photographs of {} × {}".format(*LARGE), "time, ours = 1", title="Decoding at the crops' scale")
    for name, row in r.LARGE.items():
        large.add_row(name, f"{ratio(row, r.LARGE[r.SCALED]):.2f}")
    for shown in (*tables, parts, others, large):
        Console(highlight=False).print(shown)


def _show_quality() -> None:
    from rich.console import Console
    from rich.table import Table

    from mls.data.crops import SPARE

    table = Table(
        "decoded at", "mean PSNR", "least", title=f"Crops from reduced images, {SPARE} × their target's pixels to spare"
    )
    for factor in FACTORS:
        found = psnr_of_scaled_decoding(factor, SPARE)
        table.add_row(f"1/{factor}", f"{statistics.mean(found):.1f} dB", f"{min(found):.1f} dB")
    Console(highlight=False).print(table)


def _show_device() -> None:
    """Per image of two views: augmentation on the device, and a ResNet-50 that runs forward and backward on one and
    forward on the other, as MoCo does."""
    import torch

    from mls.tools.bench import rows

    torch.set_num_threads(1)
    for name, batch in (("cpu", 4), ("cuda", 128)):
        if name == "cuda" and not torch.cuda.is_available():
            print("on a GPU: not measured, there is none")
            continue
        augmentation, step = rows.device_seconds(name, batch)
        print(
            f"engine.augment=device on {name}: augmentation {1e3 * augmentation / batch:.2f} ms an image of two views, "
            f"ResNet-50 step {1e3 * step / batch:.2f} ms an image, share {augmentation / step:.1%}"
        )
