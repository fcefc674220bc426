"""Frozen features of labelled images and the tasks that read them: embedded once, chosen on training images."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import mls
from mls.config import AugmentConfig
from mls.data.sources import hash_of_images
from mls.errors import ConfigError
from mls.eval import cells, extraction, frozen, load_protocol
from mls.eval.data import LabelledImages
from mls.eval.extraction import extract, features_of
from mls.eval.splits import load
from mls.frozen.features import hash_of_weights
from mls.models import load_backbone, save_backbone
from mls.results import Results

FEW = ["data.scenes.count=160", "data.scenes.test_count=64"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes that differ in brightness, in class folders; real JPEGs."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 100, (40, 60, 3)) + 120 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What pretraining leaves behind, with statistics of its own."""
    backbone = load_backbone("resnet_tiny")
    backbone.bn1.running_mean.fill_(0.1)
    folder = tmp_path / "run"
    folder.mkdir()
    augment = AugmentConfig(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    save_backbone(folder, backbone, {"architecture": "resnet_tiny", "method": "mls"}, augment)
    return folder


class Counting(nn.Module):
    """A backbone that counts the images it sees; `weight` tells two of them apart."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.images_seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images_seen += len(images)
        return images.mean((2, 3)) * self.weight


def test_a_data_set_goes_through_a_backbone_once(folders: Path) -> None:
    backbone = Counting()
    first = extract(backbone, folders, "train", size=32, quiet=True)
    again = extract(backbone, str(folders), "train", size=32, quiet=True)
    assert backbone.images_seen == 24
    assert torch.equal(first.features, again.features) and first.sha256 == again.sha256
    assert first.labels.tolist() == [0] * 12 + [1] * 12 and list(first.class_names) == ["dark", "light"]
    extract(backbone, folders, "test", size=32, quiet=True)
    extract(backbone, folders, "train", size=48, quiet=True)
    assert backbone.images_seen == 24 + 12 + 24


def test_other_weights_layers_or_images_are_other_features(folders: Path) -> None:
    plain, strided = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)
    strided.load_state_dict(plain.state_dict())
    hashes = {hash_of_weights(Counting()), hash_of_weights(Counting(2.0)), hash_of_weights(plain)}
    assert len({*hashes, hash_of_weights(strided)}) == 4
    assert hash_of_weights(nn.Linear(2, 2).to(torch.bfloat16))  # numpy has no such type
    before = load_protocol("linear", [f"data.root={folders}"])
    images = load(before.data).train
    first = hash_of_images(images.images)
    assert hash_of_images(images.images, torch.arange(3)) != first
    Image.new("RGB", (40, 40)).save(folders / "train" / "dark" / "0.jpg")
    assert hash_of_images(images.images) != first


def test_a_run_is_embedded_at_the_size_and_with_the_statistics_it_was_trained_with(saved: Path) -> None:
    backbone = mls.load_backbone(saved)
    scenes = load(load_protocol("linear_scenes", FEW).data)
    features = extract(backbone, scenes, "test", quiet=True).features
    pixels = torch.stack([scenes.test.pixels(row) for row in range(len(scenes.test))])
    mean, std = (torch.tensor(backbone.card[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = backbone((pixels / 255 - mean) / std)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_augmented_passes_differ_and_come_back_the_same(folders: Path) -> None:
    protocol = load_protocol("linear", [f"data.root={folders}", "augment.size=32", "features.passes=2"])
    images = load(protocol.data).train
    joined = frozen.training_features(Counting(), images, protocol, seed=0, quiet=True)
    assert joined.features.shape == (72, 3) and joined.labels.tolist() == 3 * ([0] * 12 + [1] * 12)
    parts = joined.features.split(24)
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])
    again = features_of(Counting(), images, replace(protocol, features=replace(protocol.features, batch_size=5)), "", 1)
    assert torch.equal(again.features, parts[1])


def test_no_view_of_a_query_s_own_image_chooses_k() -> None:
    """Each image stands alone, and its views beside it: by them every query would find its class."""
    labels, plain = torch.arange(40) % 4, torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    views = plain + 1e-3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    protocol = load_protocol("knn", ["probe.k=[1]", "features.passes=1"])
    known = lambda features, labels: extraction.Features(features, labels, list("abcd"), "")
    several = frozen.Split(known(torch.cat([plain, views]), labels.repeat(2)), known(plain, labels), None, passes=1)
    alone = replace(several, train=known(plain, labels), passes=0)
    found, expected = (frozen._knn(protocol, one, 0, lambda done: None) for one in (several, alone))
    assert found.validation == expected.validation < 0.6
    with pytest.raises(ConfigError, match="features.passes is for task linear and knn"):
        load_protocol("svm_scenes", ["features.passes=1"])


def test_an_unreadable_image_of_ones_own_is_named_and_left_out(
    folders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folders / "train" / "light" / "3.jpg").write_bytes(b"no image")
    assert len(extract(Counting(), folders, "train", size=32, quiet=True).labels) == 23
    assert "light/3.jpg" in capfd.readouterr().err


def test_a_split_that_is_not_there_is_answered_with_those_that_are(folders: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'val': choose one of train, test"):
        extract(Counting(), folders, "val", size=32, quiet=True)


@pytest.mark.parametrize("task", ["linear", "knn", "svm"])
def test_each_task_stores_its_numbers_and_is_not_run_again(task: str, tmp_path: Path) -> None:
    protocol = load_protocol(f"{task}_scenes", [*FEW, "probe.l2=[0.001,0.1]", "probe.costs=[0.01,1.0]"])
    values = cells.run(protocol, "random", 0, tmp_path, quiet=True)
    assert 0 < values["map"] < 1 and values["map_11pt"] > 0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert cells.run(protocol, "random", 0, tmp_path, quiet=True) == values
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (row, *_) = Results(tmp_path / "results.jsonl").rows(metric="scenes/map")
    assert row["task"] == task and row["validation"] > 0 and "best" in row["selection"]
    folder = tmp_path / "eval" / row["run"]
    assert (folder / "classifier.safetensors").is_file() == (task != "knn")


def test_a_linear_probe_equals_scikit_learns(folders: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={folders}", "augment.size=32", "probe.l2=[0.01]"]
    values = cells.run(load_protocol("linear", arguments), "resnet_tiny", 0, tmp_path, quiet=True)
    data = load(load_protocol("linear", arguments).data)
    protocol = load_protocol("linear", arguments)
    backbone = frozen.build_backbone(protocol, "resnet_tiny", 0, data.train)
    train, test = (features_of(backbone, part, protocol, quiet=True) for part in (data.train, data.test))
    mean, std = train.features.mean(0), train.features.std(0)
    reference = LogisticRegression(C=1 / (2 * 0.01 * len(train.features)), max_iter=1000)
    reference.fit(((train.features - mean) / std).numpy(), train.labels.numpy())
    expected = reference.score(((test.features - mean) / std).numpy(), test.labels.numpy())
    assert values["top1"] == pytest.approx(expected)
    assert values["top5"] == 1.0


def test_few_shots_are_another_draw_for_every_seed(tmp_path: Path) -> None:
    protocol = load_protocol("linear_scenes", [*FEW, "data.shots=3"])
    values = [cells.run(protocol, "random:resnet_tiny", seed, tmp_path, quiet=True)["map"] for seed in (0, 1)]
    whole = cells.run(load_protocol("linear_scenes", FEW), "random:resnet_tiny", 0, tmp_path, quiet=True)["map"]
    assert values[0] != values[1]
    assert whole != values[0]


def test_an_untrained_backbone_gets_statistics_of_the_images_and_a_trained_one_keeps_its_own(saved: Path) -> None:
    protocol = load_protocol("linear_scenes", FEW)
    train = load(protocol.data).train
    untrained = frozen.build_backbone(protocol, "random", 0, train)
    assert not torch.equal(untrained.bn1.running_mean, torch.zeros(32))
    backbone = frozen.build_backbone(protocol, str(saved), 0, train)
    assert torch.equal(backbone.bn1.running_mean, load_backbone(saved).bn1.running_mean)


def test_the_choice_of_k_does_not_look_at_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = load_protocol("knn_scenes", [*FEW, "probe.k=[1,5,20]"])
    cells.run(protocol, "random", 0, tmp_path, quiet=True)
    row = Results(tmp_path / "results.jsonl").find(metric="scenes/map")
    data = load(protocol.data)
    shuffled = data.test.truth[torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))]
    other = replace(data, test=LabelledImages(data.test.images, shuffled, data.test.class_names))
    monkeypatch.setattr(frozen, "load", lambda config: other)
    outcome = frozen.run(protocol, "random", 0, None, quiet=True)
    assert row is not None and outcome.selection == row["selection"] and outcome.validation == row["validation"]
    assert outcome.values["map"] != row["value"]


def test_a_stopped_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = load_protocol("linear_scenes", ["data.scenes.count=600", "data.scenes.test_count=64"])

    class Failing(Counting):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.images_seen > 400:
                raise KeyboardInterrupt
            return super().forward(images)

    images = load(protocol.data).train
    with pytest.raises(KeyboardInterrupt):
        features_of(Failing(), images, protocol, quiet=True)
    backbone = Counting()
    monkeypatch.setattr(extraction, "hash_of_weights", lambda network: hash_of_weights(Failing()))
    features = features_of(backbone, images, protocol, quiet=True)
    assert backbone.images_seen == 600 - 256
    assert len(features.features) == 600


def test_the_example_script_prints_names_and_values(folders: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "linear_probe.py"), "--data", str(folders)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=folders)
    found = dict(csv.reader(done.stdout.splitlines(), delimiter=":", skipinitialspace=True))
    assert found["images"] == "24" and found["dim"] == "128"
    assert float(found["linear_top1"]) >= 50
    assert {"knn_top1_k1", "knn_top1_k20"} <= found.keys()
