"""`backend=mmseg`: mmsegmentation trains and tests our protocols, goes on after a stop, and counts as we do."""

import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mls import yaml_files
from mls.config import AugmentConfig
from mls.data.layouts import write
from mls.errors import CheckpointError, ConfigError, DataError, DivergedError, Stopped
from mls.eval import cells, load_protocol
from mls.eval.dense.prepare import load_images
from mls.eval.dense.schema import Segmentation
from mls.frameworks import installed as frameworks
from mls.frozen.confusion import confusion, segmentation_metrics
from mls.models import load_backbone, save_backbone
from mls.results import Results

if frameworks.missing("mmseg"):
    pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"', allow_module_level=True)
with frameworks.quiet():
    frameworks.load("mmseg")
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmseg.datasets import CityscapesDataset
    from mmseg.registry import MODELS

    from mls.eval.dense import mmseg_config, with_mmseg
    from mls.eval.dense.mmseg_parts import MmsegViews
    from mls.eval.dense.mmseg_parts import test_loader as loader_of_tests

CPU = torch.device("cpu")
SMALL = ["backend=mmseg", "model.backbone=scratch:resnet18", "model.width=16", "model.auxiliary_width=8"]
SMALL += ["training.steps=4", "training.batch_size=2", "data.scenes.count=8", "data.scenes.test_count=3"]
TINY = [*SMALL, "data.resize=[64,64]", "data.crop=[64,64]", "data.stride=[32,32]", "data.workers=1"]


def scenes(*overrides: str) -> Segmentation:
    return load_protocol("segmentation_scenes", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("city")
    write("cityscapes", root, train=6, test=3, size=64)
    return root


def training_of(protocol: Segmentation, state: Path, kind: Any = None, **options: Any) -> Any:
    with frameworks.quiet():
        data, start = load_images(protocol), with_mmseg.write_backbone(protocol, "random", 0, state)
        config = mmseg_config.configuration(protocol, start, len(data.train.class_names), CPU)
        kind = kind or with_mmseg.Training
        return kind(protocol, config, data.train, data.test, CPU, 0, state, **options)


@pytest.mark.parametrize("name", ["cityscapes_fcn", "cityscapes_pspnet", "cityscapes_psanet"])
def test_scenes_in_cityscapes_layout_are_trained_on_and_counted_as_we_count(
    name: str, city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    protocol = load_protocol(name, [*TINY, f"data.root={city}", "data.check_sizes=false"])
    values = cells.run(protocol, "random", 0, tmp_path / "runs", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    (cell,) = (tmp_path / "runs" / "eval").iterdir()
    assert sorted(path.name for path in cell.iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
        "protocol.yaml",
    ]
    assert multiprocessing.active_children() == []
    assert values == pytest.approx(counted_by_us(protocol, load_file(cell / "classifier.safetensors")), abs=1e-9)
    assert 0 < values["miou"] <= values["aacc"] <= 1


def counted_by_us(protocol: Segmentation, weights: dict[str, Tensor]) -> dict[str, float]:
    """Our metric, on what mmsegmentation's network predicts with the stored weights."""
    test = load_images(protocol).test
    classes = len(test.class_names)
    config = described(protocol, "resnet18", classes)
    config["model"]["backbone"].pop("init_cfg")
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with frameworks.quiet(), DefaultScope.overwrite_default_scope("mmseg"), torch.no_grad():
        network = MODELS.build(ConfigDict(config["model"])).eval()
        network.load_state_dict(weights)
        for row, batch in enumerate(loader_of_tests(MmsegViews(test, protocol.data, 0, config["test_pipeline"]))):
            (found,) = network.test_step(batch)
            counts += confusion(found.pred_sem_seg.data[0], test.labels(row), classes)
    return segmentation_metrics(counts)


def test_voc12aug_ade20k_and_own_masks_are_read_by_our_readers(tmp_path: Path) -> None:
    write("voc", tmp_path / "voc", train=4, test=2, size=64)
    year = tmp_path / "voc" / "VOCdevkit" / "VOC2012"
    shutil.copytree(year / "SegmentationClass", year / "SegmentationClassAug")
    shutil.copy(year / "ImageSets" / "Segmentation" / "train.txt", year / "ImageSets" / "Segmentation" / "aug.txt")
    ade = tmp_path / "ade"
    for phase in ("training", "validation"):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (ade / kind / phase).mkdir(parents=True)
            Image.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(64, 48) % 151).save(
                ade / kind / phase / f"ADE_1.{suffix}"
            )
    (ade / "objectInfo150.txt").write_text("\n".join(["head", *(f"{i}\t1\t1\t1\tname {i}" for i in range(1, 151))]))
    shutil.copytree(ade / "annotations", ade / "masks")
    (ade / "classes.yaml").write_text(yaml_files.dump({"names": list("abcd"), "void": list(range(4, 151))}))
    for name, root, classes in (("voc12aug_fcn", year.parent, 21), ("ade20k_fcn", ade, 150), ("segmentation", ade, 4)):
        options = [f"data.root={root}", "data.check_sizes=false", "training.steps=1"]
        protocol = load_protocol(name, [*TINY, *options])
        outcome = with_mmseg.run(protocol, "random", 0, tmp_path / name, quiet=True)
        assert outcome.weights["decode_head.conv_seg.weight"].shape[0] == classes
        assert all(0 <= value <= 1 for value in outcome.values.values())


def test_images_and_labels_arrive_as_mmsegmentations_own_reader_gives_them(city: Path) -> None:
    protocol = load_protocol("cityscapes_fcn", [*TINY, f"data.root={city}", "data.check_sizes=false"])
    own = {"LoadRegionImage": "LoadImageFromFile", "LoadRegionLabels": "LoadAnnotations"}
    pipeline = [{**one, "type": own.get(one["type"], one["type"])} for one in described(protocol)["test_pipeline"]]
    with frameworks.quiet(), DefaultScope.overwrite_default_scope("mmseg"):
        prefix = {"img_path": "leftImg8bit/val", "seg_map_path": "gtFine/val"}
        theirs = CityscapesDataset(data_root=str(city), data_prefix=prefix, pipeline=pipeline)
        ours = MmsegViews(load_images(protocol).test, protocol.data, 0, described(protocol)["test_pipeline"])
    batches = list(loader_of_tests(ours))
    assert len(theirs) == len(batches) == 3
    for one, batch in zip(theirs, batches, strict=True):
        assert torch.equal(one["inputs"], batch["inputs"][0])
        found, expected = batch["data_samples"][0], one["data_samples"]
        assert torch.equal(found.gt_sem_seg.data, expected.gt_sem_seg.data)
        keys = {"ori_shape", "img_shape", "scale_factor"}
        assert {key: found.metainfo[key] for key in keys} == {key: expected.metainfo[key] for key in keys}


def test_a_training_view_depends_on_the_seed_and_its_place_alone() -> None:
    protocol = scenes("data.photometric=true", "data.flip=0.5")
    images = load_images(protocol).train
    views = [MmsegViews(images, protocol.data, seed, described(protocol)["train_pipeline"]) for seed in (0, 0, 1)]
    np.random.seed(7)
    first, again, other = (one.__getitems__([(5, 1), (6, 1)])["inputs"] for one in views)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny"])
def test_training_starts_from_the_weights_and_their_colours(architecture: str, tmp_path: Path) -> None:
    augment = AugmentConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_backbone(tmp_path, load_backbone(f"random:{architecture}"), {"architecture": architecture}, augment)
    still = ["training.steps=1", "training.lr=1e-9", "training.min_lr=0", "training.weight_decay=0"]
    outcome = with_mmseg.run(scenes(*still, "training.norm_decay=0"), str(tmp_path), 0, tmp_path / "cell", quiet=True)
    for name, tensor in load_backbone(str(tmp_path)).named_parameters():
        place = name if architecture == "resnet18" else f"trunk.network.{name}"
        torch.testing.assert_close(outcome.weights[f"backbone.{place}"], tensor, rtol=0, atol=1e-6)
    start = with_mmseg.write_backbone(scenes(), str(tmp_path), 0, tmp_path / "state")
    assert (start.mean, start.std) == ([25.5, 51.0, 76.5], [102.0, 127.5, 153.0])


class Stopping(with_mmseg.Training):
    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


TRANSFORMER = ["model.backbone=vit_tiny", "training.optimizer=adamw", "training.layer_decay=0.5"]
TRANSFORMER += ["training.schedule=steps", "training.falls=[3]"]


@pytest.mark.parametrize("network", [[], TRANSFORMER], ids=["resnet18", "vit_tiny"])
def test_a_stopped_training_goes_on_exactly(network: list[str], tmp_path: Path) -> None:
    protocol = scenes("model.dropout=0.5", "training.warmup_steps=2", *network)
    whole = training_of(protocol, tmp_path / "whole")
    with frameworks.quiet():
        whole.train("", quiet=True)
        with pytest.raises(Stopped, match="stopped after step 2") as stopped:
            training_of(protocol, tmp_path / "parts", Stopping).train("", quiet=True)
        assert stopped.value.exit_code == 75
        rest = training_of(protocol, tmp_path / "parts")
        assert rest.step == 2
        rest.train("", quiet=True)
    assert rest.step == 4
    ours, theirs = rest.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rest.test(quiet=True) == whole.test(quiet=True)
    if network:
        groups = rest.runner.optim_wrapper.optimizer.param_groups
        rates = {group["share"]: group["lr"] / groups[0]["lr"] for group in groups}
        assert rates == pytest.approx({0.5**far: 0.5**far for far in range(6)})


class Killed(with_mmseg.Training):
    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx == 3:
            raise MemoryError


def test_a_killed_training_goes_on_from_what_was_saved_and_never_from_a_torn_file(tmp_path: Path) -> None:
    protocol = scenes()
    with pytest.raises(MemoryError), frameworks.quiet():
        training_of(protocol, tmp_path, Killed, save_every=0.0).train("", quiet=True)
    assert training_of(protocol, tmp_path).step == 3
    (file,) = tmp_path.glob("step-*.pt")
    torch.load(file, weights_only=True)  # plain tensors and numbers
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        training_of(protocol, tmp_path)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    protocol = scenes("training.lr=1e20", "training.min_lr=1e19")
    with frameworks.quiet(), pytest.raises(DivergedError, match="lower training.lr"):
        training_of(protocol, tmp_path).train("", quiet=True)


def test_an_image_that_cannot_be_read_is_one_sentence(city: Path, tmp_path: Path) -> None:
    shutil.copytree(city, tmp_path / "city")
    protocol = load_protocol("cityscapes_fcn", [*TINY, f"data.root={tmp_path / 'city'}", "data.check_sizes=false"])
    training = training_of(protocol, tmp_path / "state")
    next(iter((tmp_path / "city" / "leftImg8bit" / "val").glob("*/*.png"))).write_bytes(b"no image")
    with frameworks.quiet():
        training.train("", quiet=True)
        with pytest.raises(DataError, match="cannot be read .* bring this one back"):
            training.test(quiet=True)
    assert multiprocessing.active_children() == []  # no worker is left, which an exit would wait for


def test_two_processes_share_a_batch_and_the_test_and_the_first_tells_of_it(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("eval", "run", "segmentation_scenes", *SMALL, "--out", str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stderr.splitlines() if not line.startswith(("W", "*"))]  # torchrun's own
    assert printed and all(line.startswith(("segmentation_scenes on mmseg", "test images")) for line in printed)
    assert "classifier.safetensors: the network that mmseg trained" in done.stdout and "mls predict" not in done.stdout
    stored = Results(tmp_path / "results.jsonl").read()
    assert {row["backend"] for row in stored} == {"mmseg"}
    (cell,) = (tmp_path / "eval").iterdir()
    values = {row["metric"].removeprefix("scenes_regions/"): row["value"] for row in stored}
    assert values == pytest.approx(counted_by_us(scenes(), load_file(cell / "classifier.safetensors")), abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["training.precise_bn=5"], "set it to 0"),
        (["training.weight_decay=0"], "set both or none"),
        (["model.output_stride=2"], "choose one of 4, 8, 16, 32"),
        (["training.precision=bf16"], "on a GPU alone: use fp32"),
        (["training.precision=fp16"], "needs a GPU"),
        (["training.layer_decay=0.5"], "set training.min_lr=0, or training.layer_decay=1"),
        (["model.backbone=vit_tiny", "data.crop=[32,30]"], "has patches of 4 pixels: .* give multiples"),
        (["model.backbone=vit_tiny", "model.output_stride=2"], "cannot be dilated, .* set model.output_stride=4"),
        (["model.backbone=scratch:vgg11"], "need a ResNet, .* or a network of timm"),
    ],
)
def test_what_mmsegmentation_cannot_do_is_refused(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_mmseg.run(scenes(*overrides), "random", 0, tmp_path, quiet=True)


def described(protocol: Segmentation, plan: str = "resnet18", classes: int = 19) -> dict[str, Any]:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    start = mmseg_config.Start(mmseg_config.ResNetPlan.of(plan), mean, std, "backbone.pth")
    return mmseg_config.configuration(protocol, start, classes, CPU)
