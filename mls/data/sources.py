"""Where images come from: a folder, a text list, COCO, VOC; `build_source` chooses from the configuration.
Tar shards are in tar.py, the embedded scenes in scenes.py. Nothing is decoded here, and no source needs labels."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.config import DataConfig
from mls.data import Source
from mls.errors import DataError, unknown_name
from mls.streams import generator

if TYPE_CHECKING:
    from mls.data.tar import TarSource

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
LOOKED_FOR = f"looked for {', '.join(EXTENSIONS)}"
VOC_CLASSES: list[str] = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
FIRST_FEW = 20  # files looked for on disk before an annotation file is believed

_SUFFIXES = frozenset(f".{suffix}".encode() for suffix in EXTENSIONS)


class Names:
    """Many byte strings in two arrays. A million Python strings would cost twice the memory, and every forked worker
    would copy them, because reading an object writes its reference count.

    >>> names = Names.of([b"a.jpg", b"", b"bc.png"])
    >>> len(names), names[2], list(names.part(0, 2))
    (3, b'bc.png', [b'a.jpg', b''])
    """

    def __init__(self, text: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        self.text, self.starts = text, starts

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Names:
        starts = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, items), dtype=np.int64, count=len(items)), out=starts[1:])
        return cls(np.frombuffer(b"".join(items), dtype=np.uint8), starts)

    @classmethod
    def join(cls, parts: Sequence[Names]) -> Names:
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)])
        return cls(np.concatenate([np.zeros(0, np.uint8), *(part.text for part in parts)]), np.cumsum(lengths))

    def part(self, first: int, last: int) -> Names:
        starts = self.starts[first : last + 1]
        return Names(self.text[starts[0] : starts[-1]], starts - starts[0])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes()


class FileSource:
    """Image files under one folder, with labels where the layout or an annotation file gives some.

    `pairs` holds one row (image, class) for each label. The float matrix is made when somebody asks for it: for a
    million images of a thousand classes it takes 4 GB, and training never asks.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[bytes],
        class_names: list[str] | None = None,
        pairs: Int64[np.ndarray, "pairs 2"] | None = None,
        limit: int | None = None,
    ) -> None:
        self.name, self.class_names = name, class_names
        self._root = os.fsencode(root)
        self._paths = Names.of(paths[:limit])
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._paths)

    @cached_property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        if self.class_names is None or self._pairs is None:
            return None
        return multi_hot(self._pairs, len(self), len(self.class_names))

    def path(self, index: int) -> bytes:
        return os.path.join(self._root, self._paths[index])

    def read(self, index: int) -> bytes:
        with open(self.path(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        return printable(self.path(index))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()


class CocoSource(FileSource):
    """COCO instances. Images are numbered by file name, classes by category id."""

    def __init__(self, folders: Sequence[Path], annotations: Path, limit: int | None = None) -> None:
        content = _read_json(annotations)
        try:
            images = sorted(content["images"], key=lambda image: image["file_name"])
            categories = sorted(content["categories"], key=lambda category: category["id"])
            row = {image["id"]: i for i, image in enumerate(images)}
            column = {category["id"]: j for j, category in enumerate(categories)}
            kept = [a for a in content["annotations"] if a["image_id"] in row]
            pairs = np.array([(row[a["image_id"]], column[a["category_id"]]) for a in kept], np.int64).reshape(-1, 2)
            boxes = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
            sizes = np.array([(image.get("width", 0), image.get("height", 0)) for image in images], np.float64)
            paths = [os.fsencode(image["file_name"]) for image in images]
            names = [str(category["name"]) for category in categories]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{show(annotations)} is not a COCO instances file ({type(error).__name__}: {error}): it needs images, "
                "annotations with image_id, category_id and bbox, and categories"
            ) from None
        if not paths:
            raise DataError(f"{show(annotations)} lists no images: point data.annotations to another file")
        folder = _folder_with(folders, paths, annotations)
        super().__init__(f"coco:{show(annotations.stem)}", folder, paths, names, pairs, limit)
        by_image = np.argsort(pairs[:, 0], kind="stable")
        self._sizes, self._annotations, self._boxes = sizes, annotations, boxes[by_image]
        self._classes = pairs[by_image, 1]
        self._starts = np.searchsorted(pairs[by_image, 0], np.arange(len(paths) + 1))

    def boxes(self, index: int) -> tuple[Float[Tensor, "objects 4"], Int64[Tensor, " objects"]]:
        """The objects of one image: x0 y0 x1 y1 as shares of its width and height, and their classes."""
        here = slice(self._starts[index], self._starts[index + 1])
        if not self._sizes[index].all():
            raise DataError(f"{show(self._annotations)} gives no width and height for {self.describe(index)}: add them")
        corner, extent = self._boxes[here, :2], self._boxes[here, 2:]
        shares = np.concatenate([corner, corner + extent], axis=1) / np.tile(self._sizes[index], 2)
        return torch.from_numpy(shares.clip(0, 1)).float(), torch.from_numpy(self._classes[here])


def build_source(config: DataConfig, split: str = "train") -> Source:
    """The source that `data.*` describes. Only the embedded scenes have a split beside "train"."""
    if config.limit is not None and config.limit < 1:
        raise DataError(f"data.limit is {config.limit}: it must be 1 or more, or null for all images")
    if config.source == "scenes":
        from mls.data.scenes import ScenesSource

        few = config.limit or max(config.scenes.count, config.scenes.test_count)
        scenes = config.scenes
        scenes = replace(scenes, count=min(scenes.count, few), test_count=min(scenes.test_count, few))
        return ScenesSource(scenes, split=split)
    if split != "train":
        raise DataError(f"only data.source=scenes has a split '{split}': point data.root to the images of that split")
    kind = detect(config) if config.source == "auto" else config.source
    if kind not in BUILDERS:
        raise unknown_name("data.source", kind, ["auto", "scenes", *BUILDERS], DataError)
    return BUILDERS[kind](config)


def detect(config: DataConfig) -> str:
    """The kind of source that data.root (and data.annotations) looks like."""
    annotations = (config.annotations or "").lower()
    if config.root is None and annotations.endswith(".txt"):
        return "list"
    text = _root_text(config)
    if text.endswith(".tar"):
        return "tar"
    root = locate(text)
    if annotations.endswith(".txt") or root.suffix.lower() == ".txt":
        return "list"
    if annotations.endswith(".json"):
        return "coco"
    if _voc_years(root):
        return "voc"
    if (root / "train2017").is_dir() and any(root.glob("annotations/instances_*.json")):
        return "coco"
    if root.is_dir() and any(root.glob("*.tar")) and not list_images(root):
        return "tar"
    return "folder"


def _folder(config: DataConfig) -> FileSource:
    root = _directory(config, "images")
    if config.annotations is not None:
        raise DataError(
            f"data.annotations {config.annotations} does not belong to a folder of images like {show(root)}: "
            "remove it, or set data.source to coco, voc or list"
        )
    paths = list_images(root)
    if not paths:
        raise DataError(f"no images under {show(root)} ({LOOKED_FOR}): point data.root to the folder that has them")
    classes, pairs = None, None
    folders = sorted({path.rpartition(b"/")[0] for path in paths})
    if len(folders) > 1 and all(path.count(b"/") == 1 for path in paths):
        column = {folder: j for j, folder in enumerate(folders)}
        pairs = np.array([(i, column[path.partition(b"/")[0]]) for i, path in enumerate(paths)], dtype=np.int64)
        classes = [printable(folder) for folder in folders]
    return FileSource(f"folder:{show(root.name)}", root, paths, classes, pairs, config.limit)


def _list(config: DataConfig) -> FileSource:
    """data.root is the list, or data.annotations is and data.root is where its paths start. Every line counts, so a
    path named twice is two images."""
    file = locate(config.annotations, "data.annotations") if config.annotations else locate(_root_text(config))
    if not file.is_file():
        raise DataError(f"{show(file)} is a folder where a text list was expected: name the .txt file itself")
    base = locate(config.root) if config.annotations and config.root else file.parent
    paths, missing = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        path = line.strip()
        if path and not path.startswith(b"#"):
            paths.append(path)
            if not os.path.isfile(os.path.join(os.fsencode(base), path)):
                missing.append(f"line {number} {printable(path)}")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{show(file)} names files that are not under {show(base)}: {', '.join(missing[:3])}{more}; "
            "correct these lines, or set data.root to the image folder and data.annotations to the list"
        )
    if not paths:
        raise DataError(f"no paths in {show(file)}: write one image path a line")
    return FileSource(f"list:{show(file.name)}", base, paths, limit=config.limit)


def _coco(config: DataConfig) -> CocoSource:
    root = _directory(config, "COCO images")
    if config.annotations is not None:
        inside = root / config.annotations
        file = inside if inside.is_file() else locate(config.annotations, "data.annotations")
    else:
        known = sorted(f for f in root.glob("annotations/instances_*.json") if (root / _coco_folder(f)).is_dir())
        chosen = [f for f in known if _coco_folder(f) == "train2017"] or known
        if len(chosen) != 1:
            found = f"several ({', '.join(show(f.name) for f in chosen)})" if chosen else "none"
            raise DataError(
                f"expected one annotations/instances_NAME.json beside a folder NAME in {show(root)} and found {found}: "
                "set data.annotations to the json file and data.root to its image folder"
            )
        file = chosen[0]
    folders = [folder for folder in (root / _coco_folder(file), root) if folder.is_dir()]
    return CocoSource(folders, file, config.limit)


def _coco_folder(annotations: Path) -> str:
    return annotations.stem.removeprefix("instances_")


def _voc(config: DataConfig) -> FileSource:
    """All years under data.root together (07+12). A difficult object counts as present."""
    root = _directory(config, "VOC")
    years = _voc_years(root)
    if not years:
        raise DataError(
            f"no VOC tree in {show(root)}: data.root must be VOCdevkit, or a folder with JPEGImages and Annotations"
        )
    paths, found = [], []
    for year in years:
        files = {printable(os.path.splitext(path)[0]): path for path in list_images(year / "JPEGImages")}
        for stem in _voc_stems(year, config.annotations, sorted(files)):
            file = os.fsdecode(files.get(stem, f"{stem}.jpg".encode()))
            paths.append(os.fsencode((year / "JPEGImages" / file).relative_to(root)))
            found.append(_voc_objects(year / "Annotations" / f"{stem}.xml"))
    if not paths:
        raise DataError(f"no images in {show(root)} ({LOOKED_FOR}): choose another split with data.annotations")
    _folder_with([root], paths, years[0])
    names = set().union(*found)
    classes = list(VOC_CLASSES) if names <= set(VOC_CLASSES) else sorted(names)
    pairs = [(i, classes.index(name)) for i, objects in enumerate(found) for name in sorted(objects)]
    name = f"voc:{'+'.join(show(year.name) for year in years)}"
    labels = np.array(pairs, dtype=np.int64).reshape(-1, 2) if pairs else None
    return FileSource(name, root, paths, classes if pairs else None, labels, config.limit)


def _voc_years(root: Path) -> list[Path]:
    """The folders with JPEGImages and Annotations: data.root itself, or those in it or its VOCdevkit."""
    inside = sorted(root.glob("VOC20*")) + sorted(root.glob("VOCdevkit/VOC20*"))
    return [year for year in (root, *inside) if (year / "JPEGImages").is_dir() and (year / "Annotations").is_dir()]


def _voc_stems(year: Path, split: str | None, files: list[str]) -> list[str]:
    lists = year / "ImageSets" / "Main"
    if split is None and not lists.is_dir():
        return files  # an own data set in VOC's layout often has no splits
    file = lists / f"{split or 'trainval'}.txt"
    if not file.is_file():
        # class lists such as cat_train.txt are there too: they are no splits
        known = ", ".join(show(f.stem) for f in sorted(lists.glob("*.txt")) if "_" not in f.stem) or "none"
        raise DataError(f"no split {show(file)}: set data.annotations to one of those there ({known})")
    return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]


def _voc_objects(file: Path) -> set[str]:
    try:
        return {(item.findtext("name") or "").strip() for item in ElementTree.parse(file).getroot().iter("object")} - {
            ""
        }
    except FileNotFoundError:
        return set()  # as COCO: an image without annotations is kept
    except ElementTree.ParseError as error:
        raise DataError(f"{show(file)} is not valid XML ({error}): repair it or delete it") from None


def _tar(config: DataConfig) -> TarSource:
    from mls.data.tar import TarSource, expand_braces

    text = _root_text(config)
    shards = [locate(name) for name in expand_braces(text)]
    if len(shards) == 1 and shards[0].is_dir():
        shards = sorted(shards[0].glob("*.tar"))
    if not shards:
        raise DataError(f"no .tar shards in {text}: point data.root to their folder or to shard-{{000..012}}.tar")
    return TarSource(shards, limit=config.limit)


BUILDERS: dict[str, Callable[[DataConfig], Any]] = {  # Any: for pyright a lazy `labels` is no attribute of a Source
    "folder": _folder,
    "list": _list,
    "coco": _coco,
    "voc": _voc,
    "tar": _tar,
}


def list_images(root: Path) -> list[bytes]:
    """The image files under a folder as sorted relative paths, without hidden ones. Links are followed; what can be
    reached twice is listed once, under its real path if that lies in the folder. A broken link is listed: that it
    cannot be read should be heard of, and later ids should not depend on it."""
    top = os.path.join(os.fsencode(root), b"")
    files: list[bytes] = []
    file_links: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:  # each round walks the folders that links of the round before lead to
        folder_links: list[bytes] = []
        for start in sorted(waiting):
            _walk(start, seen, files, folder_links, file_links)
        waiting = folder_links
    known = {_identity(path) for path in files} if file_links else set()
    for path in sorted(file_links):
        identity = _identity(path)
        if identity is None or identity not in known:
            files.append(path)
            known.add(identity)
    return sorted(path[len(top) :] for path in files)


def _walk(
    start: bytes, seen: set[tuple[int, int]], files: list[bytes], folder_links: list[bytes], file_links: list[bytes]
) -> None:
    """Lists a folder and its real sub-folders into `files` and leaves links for later."""
    stack = [start]
    while stack:
        folder = stack.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity or (0, 0))
        for entry in _entries(folder):
            if entry.is_symlink():
                kind = _kind(entry.path)
                if kind == stat.S_IFDIR:
                    folder_links.append(entry.path)
                elif is_image(entry.name) and kind in (stat.S_IFREG, None):
                    file_links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            elif is_image(entry.name) and entry.is_file(follow_symlinks=False):  # a pipe would block its reader
                files.append(entry.path)


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        reason = f"cannot list {printable(folder)} ({error.strerror})"
        raise DataError(f"{reason}: make it readable, or hide it with a dot before its name") from None


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _kind(path: bytes) -> int | None:
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except OSError:
        return None


def is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def multi_hot(pairs: Int64[np.ndarray, "pairs 2"], images: int, classes: int) -> Float[Tensor, "images classes"]:
    labels = torch.zeros(images, classes)
    rows, columns = torch.from_numpy(pairs[pairs[:, 0] < images]).T
    labels[rows, columns] = 1
    return labels


def printable(name: bytes) -> str:
    """Safe to print: bytes that are not UTF-8, and control characters, are escaped."""
    text = name.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show(path: str | Path) -> str:
    return printable(os.fsencode(path))


def locate(text: str, key: str = "data.root") -> Path:
    """The existing path a user means: ~ and variables expanded, a relative path also tried under $MLS_DATA."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    if (unset := re.search(r"\$\{?(\w+)\}?", expanded)) and not os.path.exists(expanded):
        name = unset[1]
        raise DataError(f"{key} {text} uses ${name}, which is not set: export {name}, or write the whole path")
    for path in (Path(expanded), Path(os.environ.get("MLS_DATA") or ".", expanded)):
        if os.path.exists(path):
            return Path(os.path.abspath(path))
    path = Path(os.path.abspath(expanded))
    parent = next(folder for folder in path.parents if folder.is_dir())
    name = path.relative_to(parent).parts[0]
    near = get_close_matches(name, islice((entry.name for entry in parent.glob("*")), 10_000), n=1)
    advice = f"did you mean {show(parent / near[0])}?" if near else f"the nearest folder that does is {show(parent)}"
    raise DataError(f"{key} {show(expanded)} does not exist: {advice}")


def _root_text(config: DataConfig) -> str:
    if config.root is None:
        raise DataError(
            "no images were named: set data.root=FOLDER (or a list .txt, a COCO or VOC folder, tar shards), "
            "or try data.source=scenes, which needs no data"
        )
    return config.root


def _directory(config: DataConfig, what: str) -> Path:
    root = locate(_root_text(config))
    if not root.is_dir():
        raise DataError(f"data.root {show(root)} is a file where a folder of {what} was expected: name the folder")
    return root


def _folder_with(folders: Sequence[Path], paths: Sequence[bytes], named_by: Path) -> Path:
    """The folder in which any of the first few paths exists. The rest may be missing until it is read."""
    for folder in folders:
        if any(os.path.isfile(os.path.join(os.fsencode(folder), path)) for path in paths[:FIRST_FEW]):
            return folder
    raise DataError(
        f"none of the first {len(paths[:FIRST_FEW])} images that {show(named_by)} names is in {show(folders[-1])} "
        f"(first: {printable(paths[0])}): point data.root to the folder that has them"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{show(path)} cannot be read as JSON ({error}): name an instances file") from None
