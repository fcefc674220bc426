"""The embedded scenes: scikit-learn's real handwritten digits composed into multi-object images, with boxes, masks and
labels. Nothing is downloaded. Writing them to disk in the layouts of published data sets is in layouts.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from numpy.typing import NDArray
from torch import Generator, Tensor

from mls.config import ScenesConfig
from mls.errors import DataError, unknown_name
from mls.streams import generator

CLASS_NAMES = [str(digit) for digit in range(10)]
SPLITS = ("train", "test")
CHUNK = 64  # scenes that are drawn together from one stream; another value gives other scenes
SMALLEST = 16  # pixels; below this size digits are not readable
GLYPH = 32  # pixels of a digit before it is placed; the originals have 8


@dataclass(frozen=True)
class SceneStyle:
    """How scenes are drawn. Lengths are shares of the image's side, so that a style is similar at every size.

    Each scene type has a stripe texture and a few classes of its own: as in photographs, the background is correlated
    with the classes and does not determine them.
    """

    types: int = 8
    classes_per_type: int = 4
    in_type: float = 0.9  # share of the objects that belong to their scene's type; the others may be any digit
    texture: float = 0.12  # strength of the type's stripes
    clutter: float = 0.2  # strength of the blotches
    noise: float = 0.02  # standard deviation, pixel by pixel
    cells: int = 2  # objects stand in different cells of a grid of cells x cells
    objects: tuple[int, int] = (2, 3)  # fewest and most
    extent: tuple[float, float] = (13 / 32, 16 / 32)  # side of a digit's square
    tilt: float = 10.0  # largest rotation in degrees
    stretch: float = 0.1  # spread of the aspect ratio
    contrast: float = 0.45  # how much brighter than its ground a digit is at least

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 1 <= low <= high <= self.cells**2:
            raise DataError(
                f"objects {low} to {high} do not fit a grid of {self.cells} x {self.cells} cells: "
                f"give two rising numbers between 1 and {self.cells**2}, or raise cells"
            )
        if self.types < 1 or not 1 <= self.classes_per_type <= len(CLASS_NAMES):
            raise DataError(
                f"{self.types} types of {self.classes_per_type} classes cannot be drawn from ten digits: "
                "give at least one type, and one to ten classes each"
            )


STANDARD = SceneStyle()
EASY = SceneStyle(types=6, in_type=1.0, texture=0.3, clutter=0.1)
# For 64 pixels: more and smaller digits among strong blotches, and any digit in any type: the ground tells nothing.
HARD = SceneStyle(
    in_type=0.0, clutter=0.8, noise=0.04, cells=3, objects=(2, 4), extent=(0.24, 0.34), tilt=20.0, contrast=0.35
)
PHOTOGRAPHS = SceneStyle(in_type=0.0, clutter=0.6, extent=(0.4, 0.5))
STYLES = {"standard": STANDARD, "easy": EASY, "hard": HARD}


@dataclass
class Scenes:
    """Scenes with their annotations. Objects that are completely hidden are left out."""

    images: UInt8[Tensor, "scenes 3 size size"]
    labels: Float[Tensor, "scenes classes"]  # 1 if at least one object of the class is visible
    boxes: Int64[Tensor, "scenes objects 4"]  # x0 y0 x1 y1 around the visible pixels, half-open; zeros in padding
    classes: Int64[Tensor, "scenes objects"]  # -1 in padding, which is at the end
    types: Int64[Tensor, " scenes"]
    masks: Bool[Tensor, "scenes objects size size"] | None = None  # the visible pixels

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Scenes:
        return Scenes(**{name: part[:count] for name, part in vars(self).items() if part is not None})

    @classmethod
    def join(cls, many: list[Scenes]) -> Scenes:
        names = [name for name, part in vars(many[0]).items() if part is not None]
        return cls(**{name: torch.cat([getattr(scenes, name) for scenes in many]) for name in names})


@dataclass(frozen=True)
class Instances:
    """What one split's scenes are composed of, sorted by class. No image of one is in both splits, nor therefore in
    both training and test scenes."""

    glyphs: Float[Tensor, "objects channels glyph glyph"]  # one channel: ink, which the scene colours; three: RGB
    numbers: Int64[Tensor, " objects"]  # where each comes from: rows of sklearn.datasets.load_digits, or of the folder
    starts: Int64[Tensor, " classes"]  # where each class begins
    counts: Int64[Tensor, " classes"]
    names: tuple[str, ...] = tuple(CLASS_NAMES)
    made_of: str | None = None  # a hash of the names of photographs


@cache
def digits(split: str) -> Instances:
    """60 % of the digits for training, 40 % for testing, for every seed of the scenes."""
    if split not in SPLITS:
        raise unknown_name("split of the scenes", split, SPLITS, DataError)
    images, targets = _pixels_and_classes()
    shuffled = torch.randperm(len(targets), generator=generator(0, "digits"))
    cut = round(0.6 * len(shuffled))
    numbers = shuffled[:cut] if split == "train" else shuffled[cut:]
    classes = torch.from_numpy(targets).long()
    numbers = numbers[classes[numbers].argsort(stable=True)]
    counts = torch.bincount(classes[numbers], minlength=len(CLASS_NAMES))
    pixels = torch.from_numpy(images).float()[numbers].view(-1, 1, 8, 8) / 16
    with _one_thread():
        glyphs = F.interpolate(pixels, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False)
    return Instances(glyphs, numbers, counts.cumsum(0) - counts, counts)


def _pixels_and_classes() -> tuple[Float64[np.ndarray, "digits 64"], Int64[np.ndarray, " digits"]]:
    """scikit-learn's digits out of its own file: importing scikit-learn takes most of a second, at each start."""
    found = find_spec("sklearn")
    file = Path(found.origin).parent / "datasets/data/digits.csv.gz" if found and found.origin else None
    if file is None or not file.is_file():
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        return images, targets
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


def type_classes(style: SceneStyle = STANDARD) -> Int64[Tensor, "types classes_per_type"]:
    """Each scene type's own classes, which are the same for every seed."""
    # With this seed all ten classes occur, and the documented reference values were measured.
    stream = torch.Generator().manual_seed(4242)
    rows = [torch.randperm(len(CLASS_NAMES), generator=stream) for _ in range(style.types)]
    return torch.stack(rows)[:, : style.classes_per_type]


def make_scenes(
    count: int,
    split: str = "train",
    size: int = 32,
    seed: int = 0,
    style: SceneStyle = STANDARD,
    masks: bool = False,
    instances: Instances | None = None,
) -> Scenes:
    """The first `count` scenes of an endless series that the arguments determine; without `instances` of digits.

    >>> scenes = make_scenes(3, split="test", masks=True)
    >>> scenes.images.shape, scenes.masks.shape
    (torch.Size([3, 3, 32, 32]), torch.Size([3, 3, 32, 32]))
    """
    return Scenes.join(list(scene_chunks(count, split, size, seed, style, masks, instances)))


def scene_chunks(
    count: int,
    split: str = "train",
    size: int = 32,
    seed: int = 0,
    style: SceneStyle = STANDARD,
    masks: bool = False,
    instances: Instances | None = None,
) -> Iterator[Scenes]:
    """The scenes of `make_scenes` a chunk at a time, for sets that are larger than the memory."""
    if split not in SPLITS:
        raise unknown_name("split of the scenes", split, SPLITS, DataError)
    if count < 1:
        raise DataError(f"{count} {split} scenes cannot be made: ask for 1 or more")
    if size < SMALLEST:
        raise DataError(f"scenes of {size} pixels are too small to show digits: ask for {SMALLEST} or more")
    for index, start in enumerate(range(0, count, CHUNK)):
        with _one_thread():
            made = _draw(generator(seed, "scenes", split, index), instances or digits(split), size, style)
        if not masks:
            made.masks = None
        yield made.first(count - start)


def scenes_of(config: ScenesConfig, split: str, masks: bool = False) -> tuple[Scenes, tuple[str, ...]]:
    """The scenes of a configuration and the names of their classes."""
    instances, style = instances_of(config, split), PHOTOGRAPHS if config.objects else STYLES[config.style]
    count = config.count if split == "train" else config.test_count
    return make_scenes(count, split, config.size, config.seed, style, masks, instances), instances.names


def instances_of(config: ScenesConfig, split: str) -> Instances:
    if config.objects is None:
        return digits(split)
    if config.style != "standard":
        raise DataError(
            f"data.scenes.style={config.style} is a style of digits, and photographs have their own: leave it out, or "
            "data.scenes.objects"
        )
    from mls.data.photographs import photographs

    return photographs(config.objects, split)


class ScenesSource:
    """The embedded scenes as a source of images. They are drawn once and stay in memory: 6000 of 32 pixels take 18
    MB."""

    name = "scenes"

    def __init__(self, config: ScenesConfig, split: str = "train", masks: bool = False) -> None:
        self.split = split
        self.scenes, names = scenes_of(config, split, masks)
        self.class_names = list(names)
        self.labels = self.scenes.labels
        self.made_of = instances_of(config, split).made_of

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> UInt8[Tensor, "3 size size"]:
        return self.scenes.images[index]

    def describe(self, index: int) -> str:
        return f"scene {index} of the {self.split} split"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()

    @cached_property
    def regions(self) -> UInt8[Tensor, "images size size"]:
        """Of scenes that were made with masks: 0 is the ground, and a class's number is one more than among objects."""
        made = self.scenes
        assert made.masks is not None
        return (made.masks * (made.classes + 1)[..., None, None]).amax(1).to(torch.uint8)

    def boxes(self, index: int) -> tuple[Float[Tensor, "objects 4"], Int64[Tensor, " objects"]]:
        """The objects of one scene: x0 y0 x1 y1 as shares of its width and height, and their classes."""
        visible = self.scenes.classes[index] >= 0
        return self.scenes.boxes[index, visible] / self.scenes.images.shape[-1], self.scenes.classes[index, visible]


@contextmanager
def _one_thread() -> Iterator[None]:
    # The partition among threads decides which elements use vectorised code, whose last bit may differ.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draw(stream: Generator, instances: Instances, size: int, style: SceneStyle) -> Scenes:
    """One chunk. Random draws that depend on the size come last, so that a scene has the same objects at every size."""
    types = torch.randint(style.types, (CHUNK,), generator=stream)
    classes = _choose_classes(stream, types, len(instances.names), style)
    sampled = _place(stream, instances, classes, size, style)
    ground = lambda: _background(stream, types, size, style)
    if sampled.shape[2] == 1:
        alpha = _opacity(sampled[:, :, 0]) * (classes >= 0)[..., None, None]
        images = _paint(stream, ground(), alpha, style)
    else:
        alpha = sampled[:, :, 3] * (classes >= 0)[..., None, None]
        images = ground()
        for j in range(classes.shape[1]):  # what is sampled near an edge is darker by its alpha already
            cover, there = alpha[:, j, None], (classes[:, j] >= 0)[:, None, None, None]
            images = images * (1 - cover) + sampled[:, j, :3] * there
    images += style.noise * torch.randn(images.shape, generator=stream)
    masks = alpha > 0.5
    covered = masks.flip(1).cumsum(1).flip(1) - masks.long() > 0  # by an object that is painted later
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return _describe(pixels, masks & ~covered, classes, types, len(instances.names))


def _choose_classes(
    stream: Generator, types: Int64[Tensor, " n"], names: int, style: SceneStyle
) -> Int64[Tensor, "n objects"]:
    low, high = style.objects
    shape = (len(types), high)
    number = torch.randint(low, high + 1, (len(types), 1), generator=stream)
    column = torch.randint(style.classes_per_type, shape, generator=stream)
    any_class = torch.randint(names, shape, generator=stream)
    in_type = torch.rand(shape, generator=stream) < style.in_type
    classes = torch.where(in_type, type_classes(style)[types[:, None], column], any_class)
    return torch.where(torch.arange(high) < number, classes, -1)


def _place(
    stream: Generator, instances: Instances, classes: Int64[Tensor, "n objects"], size: int, style: SceneStyle
) -> Float[Tensor, "n objects channels size size"]:
    """The ink of each digit at each pixel, or each photograph's RGB and where it is."""
    n, most = classes.shape
    uniform = lambda low, high: low + (high - low) * torch.rand(n, most, generator=stream)
    counts = instances.counts[classes.clamp(min=0)]
    instance = instances.starts[classes.clamp(min=0)] + (uniform(0, 1) * counts).long().minimum(counts - 1)
    cell = torch.rand(n, style.cells**2, generator=stream).argsort(1)[:, :most]
    half = uniform(*style.extent)  # of the digit's square; the image reaches from -1 to 1
    width = 2 / style.cells
    bound = 1 - 0.9 * half
    x = (width * (cell % style.cells + 0.5 + uniform(-0.2, 0.2)) - 1).clamp(-bound, bound)
    y = (width * (cell // style.cells + 0.5 + uniform(-0.2, 0.2)) - 1).clamp(-bound, bound)
    angle = math.radians(style.tilt) * uniform(-1, 1)
    aspect = uniform(1 - style.stretch / 2, 1 + style.stretch / 2)
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos, sin, -(cos * x + sin * y)], -1) * (aspect / half)[..., None]
    down = torch.stack([-sin, cos, sin * x - cos * y], -1) / half[..., None]
    grid = F.affine_grid(torch.stack([across, down], -2).flatten(0, 1), [n * most, 1, size, size], align_corners=False)
    glyphs = instances.glyphs[instance.flatten()]
    if glyphs.shape[1] == 3:
        glyphs = torch.cat([glyphs.float() / 255, torch.ones_like(glyphs[:, :1], dtype=torch.float)], dim=1)
    return F.grid_sample(glyphs, grid, align_corners=False).view(n, most, -1, size, size)


def _opacity(ink: Float[Tensor, "n objects size size"]) -> Float[Tensor, "n objects size size"]:
    """Sharp edges, and 0 without ink."""
    alpha = (14 * (ink - 0.45)).sigmoid() - 1 / (1 + math.exp(14 * 0.45))
    return alpha.clamp(min=0)


def _background(
    stream: Generator, types: Int64[Tensor, " n"], size: int, style: SceneStyle
) -> Float[Tensor, "n 3 size size"]:
    """A dark gradient between two colours, blotches, and the type's stripes in a direction and width of their own."""
    n = len(types)
    uniform = lambda: torch.rand(n, generator=stream)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    along = lambda angle: axis * angle.cos()[:, None, None] + axis[:, None] * angle.sin()[:, None, None]
    first, second = (_rgb(uniform(), 0.7 * uniform(), 0.1 + 0.3 * uniform())[..., None, None] for _ in range(2))
    images = torch.lerp(first, second, along(2 * math.pi * uniform())[:, None] / 2.8 + 0.5)
    blotches = torch.randn(n, 3, 6, 6, generator=stream)
    images += 0.18 * style.clutter * F.interpolate(blotches, (size, size), mode="bicubic", align_corners=False)
    frequency = 6 + 14 * (types % 2) + 2 * (uniform() - 0.5)
    directions = (style.types + 1) // 2
    angle = (types // 2) * math.pi / directions + 0.25 * (uniform() - 0.5)
    stripes = (frequency[:, None, None] * along(angle) + 2 * math.pi * uniform()[:, None, None]).sin()
    return images + (style.texture * (0.3 + 0.7 * uniform()))[:, None, None, None] * stripes[:, None]


def _paint(
    stream: Generator,
    images: Float[Tensor, "n 3 size size"],
    alpha: Float[Tensor, "n objects size size"],
    style: SceneStyle,
) -> Float[Tensor, "n 3 size size"]:
    """One hue for all digits of a scene, each brighter than its background: colour does not depend on the class."""
    n, most = alpha.shape[:2]
    weights = torch.tensor([0.3, 0.59, 0.11])  # of red, green and blue in the luminance
    base = _rgb(torch.rand(n, generator=stream), 0.2 + 0.8 * torch.rand(n, generator=stream), torch.ones(n))
    own = (base * weights).sum(1)
    extra = 0.3 * torch.rand(n, most, generator=stream)
    for j in range(most):
        cover = alpha[:, j]
        luminance = (images * weights[:, None, None]).sum(1)
        ground = (luminance * cover).sum((1, 2)) / cover.sum((1, 2)).clamp(min=1)
        target = (ground + style.contrast + extra[:, j]).clamp(0.02, 0.98)
        darker = base * (target / own)[:, None]
        brighter = 1 - (1 - base) * ((1 - target) / (1 - own).clamp(min=1e-3))[:, None]
        colour = torch.where((target < own)[:, None], darker, brighter)
        images = torch.lerp(images, colour[..., None, None], cover[:, None])
    return images


def _describe(
    images: UInt8[Tensor, "n 3 size size"],
    masks: Bool[Tensor, "n objects size size"],
    classes: Int64[Tensor, "n objects"],
    types: Int64[Tensor, " n"],
    names: int,
) -> Scenes:
    """Boxes and labels of the visible objects; hidden objects are dropped, padding is at the end."""
    visible = masks.any(3).any(2)
    order = (~visible).long().argsort(dim=1, stable=True)
    rows = torch.arange(len(masks))[:, None]
    masks, visible, classes = masks[rows, order], visible[rows, order], classes[rows, order]
    classes = torch.where(visible, classes, -1)
    size, position = masks.shape[-1], torch.arange(masks.shape[-1])
    columns, lines = masks.any(2), masks.any(3)
    low = [torch.where(line, position, size).amin(2) for line in (columns, lines)]
    high = [torch.where(line, position, -1).amax(2) + 1 for line in (columns, lines)]
    boxes = torch.stack([*low, *high], -1) * visible[..., None]
    labels = F.one_hot(classes + 1, names + 1)[..., 1:].amax(1).float()
    return Scenes(images, labels, boxes, classes, types, masks)


def _rgb(hue: Float[Tensor, " n"], saturation: Float[Tensor, " n"], value: Float[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    sector = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value[:, None] * (1 - saturation[:, None] * sector.minimum(4 - sector).clamp(0, 1))
