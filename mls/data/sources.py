"""Where images come from: `build_source` chooses from the configuration. Folders and lists are in listing.py, COCO and
VOC in annotated.py, tar shards in tar.py, tables in parquet.py and huggingface.py, the embedded scenes in scenes.py. No
source needs labels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from mls.chunks import spaced
from mls.config import DataConfig
from mls.data import Source
from mls.data.annotated import from_coco, from_voc, voc_years
from mls.data.listing import FileSource, from_folder, from_list, list_images, locate, root_text
from mls.errors import DataError
from mls.plugins import Registry

if TYPE_CHECKING:
    from mls.data.tar import TarSource

# Evenly spaced images, to notice a data set that was rewritten under the same names: of a million it would take minutes
# on a network's disk to look at each.
SIZES = 20_000  # of so many the size counts
SAMPLED = 64  # of so many the content
# Each makes a source of `data.*`.
SOURCES = Registry[Callable[[DataConfig], Source]]("data.source", DataError)
register = SOURCES.register  # decorator of such a function


def build_source(config: DataConfig, split: str = "train") -> Source:
    """The source that `data.*` describes. Only the embedded scenes have a split beside "train"."""
    if config.limit is not None and config.limit < 1:
        raise DataError(f"data.limit is {config.limit}: it must be 1 or more, or null for all images")
    if split != "train" and config.source != "scenes":
        raise DataError(f"only data.source=scenes has a split '{split}': point data.root to the images of that split")
    if config.source == "scenes":
        return scenes(config, split)
    return SOURCES[detect(config) if config.source == "auto" else config.source](config)


@register("parquet")
def parquet(config: DataConfig) -> Source:
    from mls.data.parquet import from_parquet  # where it is asked for: pyarrow is an extra

    return from_parquet(config)


@register("huggingface")
def huggingface(config: DataConfig) -> Source:
    from mls.data.huggingface import from_huggingface

    return from_huggingface(config)


@register("scenes")
def scenes(config: DataConfig, split: str = "train") -> Source:
    from mls.data.scenes import ScenesSource

    few = config.limit or max(config.scenes.count, config.scenes.test_count)
    count, test_count = min(config.scenes.count, few), min(config.scenes.test_count, few)
    return ScenesSource(replace(config.scenes, count=count, test_count=test_count), split=split)


def detect(config: DataConfig) -> str:
    """The kind of source that data.root (and data.annotations) looks like."""
    annotations = (config.annotations or "").lower()
    if config.root is None and annotations.endswith(".txt"):
        return "list"
    text = root_text(config)
    if text.endswith(".tar") or "://" in text:
        return "tar"
    root = locate(text)
    if annotations.endswith(".txt") or root.suffix.lower() == ".txt":
        return "list"
    if annotations.endswith(".json"):
        return "coco"
    if voc_years(root):
        return "voc"
    if (root / "train2017").is_dir() and any(root.glob("annotations/instances_*.json")):
        return "coco"
    if root.suffix == ".parquet":
        return "parquet"
    if root.is_dir() and any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "huggingface"
    # No deeper: a folder of a million images is not walked for tables that it does not hold.
    for kind, pattern in (("tar", "*.tar"), ("parquet", "*.parquet"), ("parquet", "data/*.parquet")):
        if root.is_dir() and any(root.glob(pattern)) and not list_images(root):
            return kind
    return "folder"


def labels_of(source: Source, ids: Int64[Tensor, " images"]) -> Float[Tensor, "images classes"] | None:
    """The labels of some images; None where there are none. The matrix of all, which may be larger than the memory, is
    made only by sources that know no other way."""
    if source.class_names is None or (isinstance(source, FileSource) and source.pairs is None):
        return None
    some = getattr(source, "labels_of", None)
    if some is not None:
        return some(ids)
    return None if source.labels is None else source.labels[ids]


@register("tar")
def _tar(config: DataConfig) -> TarSource:
    from mls.data.tar import TarSource, expand_braces, shards_in

    text = root_text(config)
    if "://" in text:
        from mls.data.remote import download

        shards = download(expand_braces(text))
    else:
        shards = [locate(name) for name in expand_braces(text)]
    if len(shards) == 1 and shards[0].is_dir():
        shards = shards_in(shards[0])
    if not shards:
        raise DataError(f"no .tar shards in {text}: point data.root to their folder or to shard-{{000..012}}.tar")
    return TarSource(shards, limit=config.limit)


def hash_of_images(source: Source, ids: Int64[Tensor, "images"] | None = None) -> str:
    """Of the names of all images, or of those in `ids`, of the sizes of SIZES and of the content of SAMPLED of them; of
    a table, whose images have no sizes of their own, of its `identity`."""
    numbers = range(len(source)) if ids is None else ids.tolist()
    size = getattr(source, "size", None)  # of files and shards
    digest = hashlib.sha256(getattr(source, "identity", "").encode())
    for number in numbers:
        digest.update(source.describe(number).encode() + b"\0")
    if size is not None:
        digest.update(np.array([size(numbers[place]) for place in spaced(len(numbers), SIZES)], np.int64).tobytes())
    for number in numbers[:: max(1, len(numbers) // SAMPLED)]:
        with contextlib.suppress(OSError):  # embedding it raises the error that names the image
            content = source.read(number)
            digest.update(content if isinstance(content, bytes) else content.contiguous().numpy().data)
    return digest.hexdigest()[:16]


SOURCES |= {"folder": from_folder, "list": from_list, "coco": from_coco, "voc": from_voc}
