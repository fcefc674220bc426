"""The embedded scenes as a labelled data set: nothing to download."""

from __future__ import annotations

from pathlib import Path

from mls.config import ScenesConfig
from mls.data.scenes import ScenesSource
from mls.eval.data import DataSet, LabelledImages, Layout, Located, presence, register


def read(_: Path, config: ScenesConfig | None = None) -> DataSet:
    """
    >>> data = read(Path(), ScenesConfig(count=3, test_count=2))
    >>> len(data.train), len(data.test), data.train.truth.shape
    (3, 2, torch.Size([3, 10]))
    """
    config = config or ScenesConfig()

    def split(name: str) -> LabelledImages:
        source = ScenesSource(config, name)
        return LabelledImages(source, presence(source.labels), source.class_names)

    return DataSet("scenes", split("train"), split("test"))


def _boxes(_: Path, images: LabelledImages) -> list[Located]:
    source = images.images
    assert isinstance(source, ScenesSource)
    return [source.boxes(number) for number in images.numbers()]


register("scenes", Layout(read, "", "", boxes=_boxes))
