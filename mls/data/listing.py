"""Image files: resolving a user's paths, listing a folder, text lists, and the source that reads the files. Annotation
files are in annotated.py, tar shards in tar.py. Nothing is decoded here."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.config import DataConfig
from mls.data.formats import EXTENSIONS, MISSED, missed
from mls.errors import DataError
from mls.streams import generator

if TYPE_CHECKING:
    from mls.data.truth import Odd

    cached_property = property  # pyright takes no cached_property for the property of a protocol, here of Source
else:
    from functools import cached_property

LOOKED_FOR = f"looked for {', '.join(EXTENSIONS)}"

_SUFFIXES = frozenset(map(str.encode, EXTENSIONS))
_MISSED = frozenset(f".{suffix}".encode() for suffix in MISSED)


class Names:
    """Many byte strings in two arrays. A million Python strings would take twice the memory, and every forked worker
    would copy them, because reading a Python object writes its reference count.

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

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))


class FileSource:
    """Image files under one folder, with labels where the layout or an annotation file gives some.

    `pairs` holds one row (image, class) for each label. The float matrix is made on first access: for a million images
    of a thousand classes it takes 4 GB, and training does not need it.
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
        if wrong := next((path for path in paths if b"\0" in path), None):
            raise DataError(f"{name} names an image {printable(wrong)}, which no file is called: correct its list")
        self._root = os.fsencode(root)
        self._paths = Names.of(paths[:limit])
        self.pairs = pairs
        self.odd: Odd | None = None  # what of its annotations was left out
        self.ignored: Sequence[bytes] = ()  # paths of pictures in formats that are not read

    def __len__(self) -> int:
        return len(self._paths)

    def some(self, images: Sequence[int]) -> FileSource:
        """These images alone, without labels."""
        found = FileSource(self.name, Path(os.fsdecode(self._root)), [self._paths[image] for image in images])
        found.odd, found.ignored = self.odd, self.ignored
        return found

    @cached_property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        if self.class_names is None or self.pairs is None:
            return None
        return multi_hot(self.pairs, len(self), len(self.class_names))

    def labels_of(self, ids: Int64[Tensor, " some"]) -> Float[Tensor, "some classes"]:
        """Of these images alone, without the matrix of all."""
        assert self.class_names is not None and self.pairs is not None
        return multi_hot_of(ids, self.pairs, len(self), len(self.class_names))

    @property
    def root(self) -> bytes:
        return self._root

    @property
    def relative_paths(self) -> Names:
        return self._paths

    def path(self, index: int) -> bytes:
        return os.path.join(self._root, self._paths[index])

    def read(self, index: int) -> bytes:
        with open(self.path(index), "rb") as file:
            return file.read()

    def size(self, index: int) -> int:
        """In bytes; 0 where the file is missing."""
        return file_size(self.path(index))

    def describe(self, index: int) -> str:
        return printable(self.path(index))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()


def file_size(path: bytes | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def multi_hot(pairs: Int64[np.ndarray, "pairs 2"], images: int, classes: int) -> Float[Tensor, "images classes"]:
    labels = torch.zeros(images, classes)
    rows, columns = torch.from_numpy(pairs[pairs[:, 0] < images]).T
    labels[rows, columns] = 1
    return labels


def multi_hot_of(
    ids: Int64[Tensor, " some"], pairs: Int64[np.ndarray, "pairs 2"], images: int, classes: int
) -> Float[Tensor, "some classes"]:
    """Some rows of `multi_hot`.

    >>> multi_hot_of(torch.tensor([2, 0]), np.array([[0, 1], [1, 0], [2, 0]]), 3, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    rows = np.full(images, -1)
    rows[ids.numpy()] = np.arange(len(ids))
    pairs = pairs[pairs[:, 0] < images]
    chosen = pairs[rows[pairs[:, 0]] >= 0]
    return multi_hot(np.stack([rows[chosen[:, 0]], chosen[:, 1]], axis=1), len(ids), classes)


def from_folder(config: DataConfig) -> FileSource:
    root = directory(config, "images")
    if config.annotations is not None:
        raise DataError(
            f"data.annotations {config.annotations} does not belong to a folder of images like {show(root)}: "
            "remove it, or set data.source to coco, voc or list"
        )
    ignored: list[bytes] = []
    paths = list_images(root, ignored)
    if not paths:
        found = f"{LOOKED_FOR}; {missed(ignored)}" if ignored else LOOKED_FOR
        raise DataError(f"no images under {show(root)} ({found}): point data.root to the folder that has them")
    classes, pairs = None, None
    folders = sorted({path.rpartition(b"/")[0] for path in paths})
    if len(folders) > 1 and all(path.count(b"/") == 1 for path in paths):
        column = {folder: j for j, folder in enumerate(folders)}
        pairs = np.array([(i, column[path.partition(b"/")[0]]) for i, path in enumerate(paths)], dtype=np.int64)
        classes = [printable(folder) for folder in folders]
    source = FileSource(f"folder:{show(root.name)}", root, paths, classes, pairs, config.limit)
    source.ignored = ignored
    return source


def from_list(config: DataConfig) -> FileSource:
    """data.root is the list; or data.annotations is the list, and data.root the folder of its paths. Every line is an
    image, so a path that is listed twice is two images."""
    file = locate(config.annotations, "data.annotations") if config.annotations else locate(root_text(config))
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


def list_images(root: Path, ignored: list[bytes] | None = None) -> list[bytes]:
    """The image files under a folder as sorted relative paths, without hidden ones. Links are followed; a file
    that can be reached twice is listed once, under its real path if that is in the folder. A broken link is listed, so
    that it is reported as unreadable and the ids of later images do not depend on it. Pictures in formats that are not
    read are appended to `ignored`."""
    top = os.path.join(os.fsencode(root), b"")
    files: list[bytes] = []
    file_links: list[bytes] = []
    other: list[bytes] = []
    visited: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:  # each round walks the folders to which links of the round before lead
        folder_links: list[bytes] = []
        for start in sorted(waiting):
            _walk(start, visited, files, folder_links, file_links, other)
        waiting = folder_links
    known = {_identity(path) for path in files} if file_links else set()
    for path in sorted(file_links):
        identity = _identity(path)
        if identity is None or identity not in known:
            files.append(path)
            known.add(identity)
    if ignored is not None:
        ignored += sorted(path[len(top) :] for path in other)
    return sorted(path[len(top) :] for path in files)


def _walk(
    start: bytes,
    visited: set[tuple[int, int]],
    files: list[bytes],
    folder_links: list[bytes],
    file_links: list[bytes],
    other: list[bytes],
) -> None:
    """Append the images of a folder and its real sub-folders to `files`, links to the next two lists, and pictures in
    formats that are not read to `other`."""
    stack = [start]
    while stack:
        folder = stack.pop()
        identity = _identity(folder)
        if identity in visited:
            continue
        visited.add(identity or (0, 0))
        for entry in _entries(folder):
            if entry.is_symlink():
                kind = _kind(entry.path)
                if kind == stat.S_IFDIR:
                    folder_links.append(entry.path)
                elif is_image(entry.name) and kind in (stat.S_IFREG, None):
                    file_links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            elif is_image(entry.name) and entry.is_file(follow_symlinks=False):  # no pipe: it would block
                files.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in _MISSED:
                other.append(entry.path)


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
    """By the suffix; a hidden file's name is none (`os.path.splitext` says the same in five times the time)."""
    stem, _, suffix = name.rpartition(b".")
    return suffix.lower() in _SUFFIXES and bool(stem.strip(b"."))


def printable(name: bytes) -> str:
    """Safe to print: bytes that are not UTF-8, and control characters, are escaped."""
    text = name.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show(path: str | Path) -> str:
    return printable(os.fsencode(path))


def locate(text: str, key: str = "data.root") -> Path:
    """The existing path that `text` names: ~ and variables are expanded, a relative path is also tried under
    $MLS_DATA."""
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


def root_text(config: DataConfig) -> str:
    if config.root is None:
        raise DataError(
            "no images were named: set data.root=FOLDER (or a list .txt, a COCO or VOC folder, tar shards), "
            "or try data.source=scenes, which needs no data"
        )
    return config.root


def directory(config: DataConfig, what: str) -> Path:
    root = locate(root_text(config))
    if not root.is_dir():
        raise DataError(f"data.root {show(root)} is a file where a folder of {what} was expected: name the folder")
    return root
