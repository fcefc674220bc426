"""`task: detection` and `task: segmentation` from a protocol to stored numbers: resume, processes, layouts."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mls.data.layouts import write
from mls.errors import ConfigError, DataError, Stopped
from mls.eval import cells, load_protocol
from mls.eval.dense import run as dense
from mls.eval.dense.loop import DenseTraining
from mls.eval.dense.prepare import load_images
from mls.eval.dense.schema import Dense
from mls.eval.splits import load as load_labels
from mls.results import Results

SMALL = ["data.scenes.count=24", "data.scenes.test_count=8", "training.steps=6", "training.batch_size=4"]
SMALL_BOXES = [*SMALL, "training.falls=[4]", "training.warmup_steps=2", "training.precise_bn=2"]
OF = {"detection_scenes": SMALL_BOXES, "segmentation_scenes": SMALL}


def small(name: str, *overrides: str) -> Dense:
    return load_protocol(name, [*OF[name], *overrides])


@pytest.mark.parametrize("name", OF)
def test_a_stopped_training_goes_on_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = small(name)
    data = load_images(protocol).train
    build = lambda: dense.build_network(protocol, "random", 0, data.class_names)
    whole = DenseTraining(protocol, build(), data, seed=0)
    whole.train(quiet=True)

    class Stopping(DenseTraining):
        def train_step(self, batch):
            losses = super().train_step(batch)
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

    with pytest.raises(Stopped, match="stopped after step 3"):
        Stopping(protocol, build(), data, seed=0, folder=tmp_path).train(quiet=True)
    rest = DenseTraining(protocol, build(), data, seed=0, folder=tmp_path)
    assert rest.step == 3
    rest.train(quiet=True)
    ours, theirs = rest.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", OF)
def test_another_seed_sees_other_views_and_the_same_seed_the_same(name: str) -> None:
    protocol = small(
        name, "training.steps=2", *(["training.falls=[]", "training.warmup_steps=1"] if "det" in name else [])
    )
    data = load_images(protocol).train

    def last(seed: int) -> torch.Tensor:
        training = DenseTraining(protocol, dense.build_network(protocol, "random", 0, data.class_names), data, seed)
        training.train(quiet=True)
        return torch.cat([p.detach().flatten() for p in training.network.parameters()])

    assert torch.equal(last(0), last(0)) and not torch.equal(last(0), last(1))


def test_the_command_stores_its_numbers_and_does_not_run_twice(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    call = lambda: mls_command("eval", "run", "detection_scenes", *SMALL_BOXES, "--out", str(tmp_path))
    done = call()
    assert done.returncode == 0, done.stderr
    stored = Results(tmp_path / "results.jsonl").read()
    assert {"scenes_objects/box_ap", "scenes_objects/mask_ap75"} <= {row["metric"] for row in stored}
    (picture,) = tmp_path.glob("eval/*/found.png")
    assert str(picture) in done.stdout
    says = "not run again; --again runs it"
    assert [line for line in call().stdout.splitlines() if says not in line] == done.stdout.splitlines()
    assert len(Results(tmp_path / "results.jsonl").read()) == len(stored)


@pytest.mark.parametrize(
    ("layout", "protocol", "data"),
    [
        ("coco", "detection_scenes", ["data.name=coco2017"]),
        ("voc", "detection_scenes", ["data.name=voc0712", "model.masks=false", "model.neck=c4"]),
        ("cityscapes", "segmentation_scenes", ["data.name=cityscapes", "model.head=pspnet", "data.test=slide"]),
    ],
)
def test_scenes_written_out_in_published_layouts_are_trained_on(
    layout: str, protocol: str, data: list[str], tmp_path: Path
) -> None:
    write(layout, tmp_path / "data", train=12, test=4, size=32)
    where = [f"data.root={tmp_path / 'data'}", "data.check_sizes=false", "data.workers=1"]
    values = cells.run(small(protocol, *data, *where), "random", 0, tmp_path / "runs", quiet=True)
    assert {"box_ap", "box_ap50", "box_ap75"} <= values.keys() or {"miou", "macc", "aacc"} == values.keys()
    assert all(0 <= value <= 1 or value != value for value in values.values())
    by_area = {"box_ap_area", "box_ap50_area", "box_ap75_area"}  # VOC's two definitions stand beside each other
    assert by_area & values.keys() == (by_area if layout == "voc" else set())


def test_two_processes_share_a_batch_and_the_test(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("eval", "run", "segmentation_scenes", *SMALL, "--out", str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(row["metric"] for row in rows) == [f"scenes_regions/{one}" for one in ("aacc", "macc", "miou")]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.falls=[9]", "lie behind the 6 steps"),
        ("training.warmup_steps=6", "make it shorter"),
        ("data.min_sizes=[]", "data.min_sizes is empty"),
        ("model.proposals=[3]", "needs two numbers"),
    ],
)
def test_what_cannot_work_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        small("detection_scenes", override)


def test_a_data_set_of_another_task_is_refused_with_those_that_fit() -> None:
    with pytest.raises(DataError, match="cannot use scenes_regions: choose another data.name"):
        load_images(load_protocol("detection_scenes", ["data.name=scenes_regions"]))
    with pytest.raises(DataError, match="has objects or regions"):
        load_labels(load_protocol("linear", ["data.name=scenes_objects"]).data)


def test_weights_bring_their_statistics(tmp_path: Path) -> None:
    from mls.config import AugmentConfig
    from mls.models import load_backbone, save_backbone

    augment = AugmentConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_backbone(tmp_path, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny"}, augment)
    network = dense.build_network(small("detection_scenes"), str(tmp_path), 0, list("ab"))
    assert network.model.transform.image_mean == [0.1, 0.2, 0.3]
    stored = load_backbone(str(tmp_path)).state_dict()
    assert torch.equal(network.state_dict()["model.backbone.trunk.conv1.weight"], stored["conv1.weight"])
