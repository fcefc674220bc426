"""The online probes read each of their images once, take no labels but theirs, and are shared by the processes."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mls
from mls import distributed
from mls.config import Config, DataConfig
from mls.data import pack, sources
from mls.data.listing import FileSource
from mls.engine.trainer import Trainer
from mls.errors import DataError, UserError
from mls.frozen.untrained import untrained
from mls.models import build_pair
from mls.monitor import dense, online
from mls.monitor.dense import DenseProbe
from mls.monitor.online import OnlineProbes
from mls.recipes import load_config


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for number in range(60):
        file = tmp_path / "images" / "abc"[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


def config_of(root: Path) -> Config:
    keys = ["data.source=auto", f"data.root={root}", "data.workers=0", "monitor.knn_images=50", "augment.size=16"]
    return load_config("mls_scenes_tiny", [*keys, "monitor.knn_every_epochs=1", "monitor.linear_every_epochs=2"])


def test_each_image_is_read_once_in_a_run(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        FileSource, "read", lambda source, index, read_=FileSource.read: read.append(index) or read_(source, index)
    )
    monkeypatch.setattr(FileSource, "labels", property(lambda source: pytest.fail("the labels of all images")))
    config = config_of(folders)
    probes = OnlineProbes.build(config, sources.build_source(config.data))
    assert probes is not None and not read
    first, second, third = (probes(Means(), epoch, torch.device("cpu")) for epoch in (1, 2, 3))
    assert sorted(read) == sorted(set(read)) and len(read) == 50
    assert first == third and second.keys() == {"knn/top1", "linear/top1"}


def test_a_probe_that_has_too_few_images_of_a_class_is_left_out_once_and_training_goes_on(tmp_path: Path) -> None:
    for number in range(40):
        file = tmp_path / "images" / f"{number // 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * number, 90, 30)).save(file)
    config, said = config_of(tmp_path / "images"), []
    probes = OnlineProbes.build(config, sources.build_source(config.data), said.append)
    assert probes is not None
    for epoch in (2, 4):
        assert probes(Means(), epoch, torch.device("cpu")).keys() == {"knn/top1"}
    (sentence,) = said
    assert sentence.startswith("there is no linear probe of these images: a share of 0.2 of")


def test_processes_share_the_images_and_find_the_same(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "BATCH", 8)
    config = config_of(folders)
    source = sources.build_source(config.data)
    device, found = torch.device("cpu"), []

    def build() -> OnlineProbes:
        probes = OnlineProbes.build(config, source)
        assert probes is not None
        return probes

    alone = build()(Means(), 1, device)
    parts: dict[tuple[int, int], Any] = {}
    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    for rank in (2, 1, 0):  # one after another, the first last, which has then what the others have sent
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        calls = iter(range(2))

        def objects(value: Any, rank: int = rank, calls: Any = calls) -> list[Any]:
            call = next(calls)
            parts[call, rank] = value
            return [parts.get((call, other), value) for other in range(3)]

        monkeypatch.setattr(distributed, "objects", objects)
        probes = build()
        found.append(probes(Means(), 1, device))
        assert sum(map(len, probes.bank.own)) < len(probes.bank.ids)
    assert found == [{}, {}, alone]


@pytest.mark.parametrize("packed", [False, True])
def test_some_labels_are_those_rows_of_all(packed: bool, folders: Path, tmp_path: Path) -> None:
    source = sources.build_source(DataConfig(root=str(folders)))
    if packed:
        pack.pack(source, tmp_path / "packed", pack.Packing(per_shard=25))
        source = sources.build_source(DataConfig(root=str(tmp_path / "packed")))
    ids = torch.tensor([41, 3, 59, 0])
    some = sources.labels_of(source, ids)
    assert some is not None and source.labels is not None
    assert torch.equal(some, source.labels[ids])


def test_labels_of_few_images_take_little_memory() -> None:
    images, classes = 100_000, 1000  # the matrix would take 400 MB
    pairs = np.stack([np.arange(images), np.arange(images) % classes], axis=1)
    source = FileSource("many", Path(), [b"x"] * images, [str(j) for j in range(classes)], pairs)
    tracemalloc.start()
    some = sources.labels_of(source, torch.arange(0, images, 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert some is not None and some.sum() == 1000 and peak < 10e6


@pytest.mark.parametrize("published", [False, True], ids=["images and masks", "SegNet's folders"])
def test_the_dense_probe_reads_each_image_with_its_mask_once(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of another brightness, and the masks say which is which: patches of others tell them apart."""
    images, masks = (tmp_path / name for name in (("train", "trainannot") if published else ("images", "masks")))
    (tmp_path / "classes.yaml").write_text("names: {10: dark, 20: bright}\nvoid: 0\n")
    numbers = (0, 1) if published else (10, 20)
    for number in range(20):
        for folder, suffix, values in ((images, "jpg", (40, 200)), (masks, "png", numbers)):
            pixels = np.full((12, 16), values[0], np.uint8)
            pixels[:, 4 + number % 8 :] = values[1]
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    read: list[int] = []
    real = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda source, index: read.append(index) or real(source, index))
    keys = ["data.source=auto", f"data.root={images}", "data.workers=0", "augment.size=16"]
    config = load_config("mls_scenes_tiny", [*keys, "monitor.dense_every_epochs=2", "monitor.dense_images=15"])
    probe = DenseProbe.build(config, sources.build_source(config.data))
    assert probe is not None and not read
    state, device = torch.random.get_rng_state(), torch.device("cpu")
    backbone = untrained(config, probe.source)
    read.clear()
    assert probe(backbone, 1, device) == {}
    first, second = (probe(backbone, epoch, device) for epoch in (2, 4))
    assert first == second and first.keys() == {"dense/miou", "dense/miou_untrained"}
    assert len(read) == len(set(read)) == 15
    assert first["dense/miou"] > 0.7 and first["dense/miou_untrained"] > 0.7
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (255, "the masks of .* label no pixel of the 16 images that the dense probe learns from: correct them"),
        (3, "pixels of unknown classes, such as 3"),
        (1, "measures at twice augment.size: Means has no pooling layer .*; or set it to 0"),
    ],
)
def test_what_the_dense_probe_cannot_use_is_said_before_the_first_step(
    value: int, message: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders.parent / "classes.txt").write_text("road\ntree\n")
    for file in folders.glob("*/*.png"):
        mask = folders.parent / "masks" / file.relative_to(folders)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), value).save(mask)
    keys = ["data.source=auto", f"data.root={folders}", "data.workers=0", "augment.size=16", "data.batch_size=20"]
    keys += ["optim.epochs=1", "dictionary.size=40", "objective.k=2", "monitor.dense_every_epochs=1"]
    config = load_config("mls_scenes_tiny", [*keys, "monitor.dense_images=20", f"run.root={folders.parent}/runs"])
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step"))
    real = DenseProbe.refuse_unusable
    of_means = lambda probe, backbone, device: real(probe, Means() if value == 1 else backbone, device)
    monkeypatch.setattr(DenseProbe, "refuse_unusable", of_means)
    with pytest.raises(UserError, match=message):
        mls.pretrain(config, quiet=True)
    assert not list((folders.parent / "runs").glob("*/config.yaml"))  # nothing was trained, no folder stays


def test_the_dense_probe_beside_an_untrained_network_and_without_masks(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["monitor.dense_every_epochs=1", "monitor.dense_images=20"]
    config = load_config("mls_scenes_tiny", [*keys, "data.scenes.count=200", "monitor.dense_images=100"])
    probe = DenseProbe.build(config, sources.build_source(config.data))
    assert probe is not None
    counted: list[int] = []  # images whose scores of all pixels exist at once
    real = dense.confusion
    monkeypatch.setattr(dense, "confusion", lambda found, *rest: counted.append(len(found)) or real(found, *rest))
    values = probe(build_pair(config.model, config.run.seed + 1).query.backbone, 1, torch.device("cpu"))
    assert counted == [1] * 40  # twenty, beside an untrained network
    assert 0 < values["dense/miou"] < 1 and values["dense/miou"] != values["dense/miou_untrained"]
    of_folder = load_config("mls_scenes_tiny", ["data.source=auto", f"data.root={folders}", *keys])
    (folders.parent / "masks").mkdir()
    with pytest.raises(DataError, match="has no list of classes"):
        DenseProbe.build(of_folder, sources.build_source(of_folder.data))
    (folders.parent / "masks").rmdir()
    with pytest.raises(DataError, match="has no masks beside it: they are looked for in ROOT/masks"):
        DenseProbe.build(of_folder, sources.build_source(of_folder.data))


def test_the_dense_probe_draws_from_the_images_that_have_a_mask(folders: Path) -> None:
    (folders.parent / "classes.yaml").write_text("names: [dark, bright]\n")
    keys = ["data.source=auto", f"data.root={folders}", "augment.size=16", "monitor.dense_every_epochs=1"]
    config = load_config("mls_scenes_tiny", [*keys, "monitor.dense_images=58"])
    first, *others = sorted(folders.rglob("*.png"))
    for image in others:
        mask = folders.parent / "masks" / image.relative_to(folders)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16)).save(mask)
    probe = DenseProbe.build(config, sources.build_source(config.data))
    assert probe is not None
    probe.read()
    assert probe.memory is not None and probe.asked is not None
    assert len(probe.memory[0]) + len(probe.asked[0]) == 58
    for image in others[1:]:
        (folders.parent / "masks" / image.relative_to(folders)).unlink()
    where = folders.parent / "masks" / first.relative_to(folders)
    with pytest.raises(DataError, match=f"has 1 images with a mask, and the dense probe needs two: .* in {where}, or"):
        DenseProbe.build(config, sources.build_source(config.data))
