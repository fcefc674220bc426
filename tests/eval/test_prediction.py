"""`mls predict`: what was tested says the same of the same images, goes on where it was stopped, names bad files."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mls.config import AugmentConfig
from mls.data import Source
from mls.data.unreadable import Unreadable
from mls.errors import CheckpointError, ConfigError, DataError, Stopped
from mls.eval import load_protocol, prediction
from mls.eval.cells import Evaluation, evaluation
from mls.eval.dense.run import build_network
from mls.eval.outcome import Outcome, for_file
from mls.eval.prediction import Kept, predict, predict_batches, predict_dense
from mls.eval.protocol import to_yaml
from mls.files import write_atomically
from mls.models import load_backbone, save_backbone
from mls.tools.predict import predict as command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLS_RUNS", str(tmp_path / "runs"))
    for number in range(20):
        file = tmp_path / "images" / ("dark", "light")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (200 * (number % 2) + number, 60, 30)).save(file)
    save_backbone(tmp_path, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig(size=16))
    return tmp_path


def small(name: str, folder: Path, *more: str) -> Evaluation:
    settings = [f"data.root={folder / 'images'}", "augment.size=16", *more]
    return evaluation(load_protocol(name, settings), str(folder / "backbone.safetensors"))


def kept(cell: Evaluation, outcome: Outcome, root: Path) -> Path:
    """The folder of an evaluation that nobody trained."""
    folder = cell.folder(root)
    folder.mkdir(parents=True)
    write_atomically(folder / "protocol.yaml", to_yaml(cell.protocol).encode())
    cell.save(folder, outcome)
    return folder


@pytest.mark.parametrize("task", ["linear", "svm", "finetune"])
def test_predictions_are_those_that_were_measured(folder: Path, task: str) -> None:
    more = {"linear": ["probe.l2=[0.1]"], "finetune": ["training.epochs=1", "training.batch_size=8"]}
    more |= {"svm": ["task=svm", "probe.costs=[1.0]", "probe.folds=2"]}
    cell = small("linear" if task == "svm" else task, folder, *more[task])
    measured = cell.finish(folder / "runs", keep=True, quiet=True)
    found = predict(cell.folder(folder / "runs"), folder / "images", quiet=True)
    assert found.class_names == ["dark", "light"]
    if task == "svm":  # margins of features of unit length
        last = load_file(cell.folder(folder / "runs") / "classifier.safetensors")
        assert ((found.scores - last["bias"]).abs() <= last["weight"].norm(dim=1) + 1e-5).all()
    else:
        assert torch.allclose(found.scores.sum(1), torch.ones(20), atol=1e-5)
    from mls.eval.splits import load

    test = load(cell.protocol.data).test
    rows = [found.paths.index(test.describe(row)) for row in range(len(test))]
    right = (found.scores[rows].argmax(1) == test.truth).double().mean().item()
    assert right == measured.values["top1"]
    assert torch.equal(predict(folder / "backbone.safetensors", folder / "images", quiet=True).scores, found.scores)


def test_a_table_of_scores_leaves_out_what_cannot_be_read(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = small("linear", folder)
    made = kept(
        cell, Outcome({}, "", None, 0, {"weight": torch.randn(2, 128), "bias": torch.zeros(2)}), folder / "runs"
    )
    (folder / "images" / "dark" / "4.png").write_bytes(b"broken")
    command(str(made), str(folder / "images"), folder / "preds.csv")
    told = capfd.readouterr()
    assert "dark/4.png: not an image" in told.err
    assert "19 images, scores of 2 classes" in told.out
    lines = (folder / "preds.csv").read_text().splitlines()
    monkeypatch.setattr(prediction, "BATCH", 7)
    batches = list(predict_batches(made, folder / "images", quiet=True))
    assert [len(batch.paths) for batch in batches] == [7, 6, 6]
    assert [path for batch in batches for path in batch.paths] == [line.partition(",")[0] for line in lines[1:]]
    assert torch.allclose(
        torch.cat([batch.scores for batch in batches]), predict(made, folder / "images", True).scores, atol=1e-6
    )
    (folder / "broken").mkdir()
    (folder / "broken" / "4.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="none of the images can be read, of which there are 1 "):
        predict(made, folder / "broken", quiet=True)
    assert lines[0] == "path,dark,light"
    assert len(lines) == 20
    parquet = pytest.importorskip("pyarrow.parquet")
    command(str(made), str(folder / "images"), folder / "preds.parquet")
    columns = parquet.read_table(folder / "preds.parquet").to_pydict()
    assert [float(line.rpartition(",")[2]) for line in lines[1:]] == pytest.approx(columns["light"], abs=1e-5)


def test_a_probe_of_one_of_several_networks_in_a_file_predicts(folder: Path) -> None:
    state = load_backbone(folder / "backbone.safetensors").state_dict()
    both = {f"{part}.{key}": one for part in ("teacher", "student") for key, one in state.items()}
    torch.save(both, file := folder / "both.pth")
    alone = small("linear", folder)
    outcome = Outcome({}, "", None, 0, {"weight": torch.randn(2, 128), "bias": torch.zeros(2)})
    found, same = (
        predict(kept(cell, outcome, folder / "runs"), folder / "images", quiet=True).scores
        for cell in (replace(alone, weights=str(file), architecture="resnet_tiny", prefix="teacher"), alone)
    )
    assert torch.equal(found, same)


def test_what_cannot_predict_says_why(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has features and no classes: train a classifier"):
        predict(folder / "backbone.safetensors", folder / "images")
    cell = small("linear", folder)
    made = kept(
        cell, Outcome({}, "", None, 0, {"weight": torch.randn(2, 128), "bias": torch.zeros(2)}), folder / "runs"
    )
    with pytest.raises(ConfigError, match="gives scores of classes: write them with --out preds.csv"):
        predict_dense(made, folder / "images", folder / "out")
    save_backbone(folder, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny", "n": 2}, AugmentConfig(size=16))
    with pytest.raises(CheckpointError, match="holds other weights than .* was trained on: evaluate it again"):
        predict(made, folder / "images")
    random = kept(replace(cell, weights="random:resnet_tiny"), Outcome({}, "", None, 0, {"weight": torch.ones(2, 128),
        "bias": torch.zeros(2)}), folder / "others")  # fmt: skip
    with pytest.raises(ConfigError, match="is a probe of random:resnet_tiny, a control that is not kept"):
        predict(random, folder / "images")
    (made / "classifier.json").unlink()
    with pytest.raises(CheckpointError, match=r"keeps no class names .*: run its evaluation --again"):
        predict(made, folder / "images")


FEW = ["data.scenes.count=4", "data.scenes.test_count=2"]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_dense_predictions_go_on_where_they_were_stopped(
    folder: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = evaluation(load_protocol(f"{task}_scenes", FEW), str(folder / "backbone.safetensors"))
    network = build_network(cell.protocol, cell.weights, 0, [str(n) for n in range(10 + (task == "segmentation"))])
    made = kept(cell, Outcome({}, "", None, 0, for_file(network.state_dict())), folder / "runs")
    monkeypatch.setattr(prediction, "DENSE_BATCH", 6)
    written, (broken, *_) = prediction._Folder.write, sorted((folder / "images").rglob("*.png"))
    broken.write_bytes(b"broken")

    def stopping(self: object, number: int, *rest: object) -> object:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return written(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prediction._Folder, "write", stopping)
    with pytest.raises(Stopped, match="6 of 20 images are done; the same command goes on"):
        predict_dense(made, folder / "images", folder / "out", quiet=True)
    monkeypatch.setattr(prediction._Folder, "write", written)
    found = folder / "out" / "found.jsonl"
    found.write_bytes(found.read_bytes()[:-1])  # as a kill leaves it: five lines of the six of a batch, and a part
    decoding, read = prediction.decoded, list[int]()
    monkeypatch.setattr(
        prediction, "decoded", lambda source, ids, *rest: (read.extend(ids), decoding(source, ids, *rest))[1]
    )
    assert predict_dense(made, folder / "images", folder / "out", quiet=True) == 19
    assert read == list(range(20))  # the torn batch is done again, and each image is decoded once
    assert predict_dense(made, folder / "images", folder / "whole", quiet=True) == 19
    everything = [path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*") if path.is_file()]
    assert all((folder / "out" / path).read_bytes() == (folder / "whole" / path).read_bytes() for path in everything)
    assert sum(path.parts[0] == "pictures" for path in everything) == 19
    if task == "detection":
        content = json.loads((folder / "out" / "predictions.json").read_text())
        assert [image["file_name"] for image in content["images"]][:2] == ["dark/10.png", "dark/12.png"]
        assert [image["id"] for image in content["images"]] == list(range(1, 20))
        assert all({"score", "bbox", "area", "segmentation"} <= one.keys() for one in content["annotations"])
    else:
        mask = np.array(Image.open(folder / "out" / "masks" / "dark" / "10.png"))
        assert mask.shape == (20, 24)
        assert mask.max() < 11
    other = Kept.open(made).facts
    assert other["task"] == task
    with pytest.raises(ConfigError, match="holds predictions of another network, of other images"):
        predict_dense(made, folder / "images" / "dark", folder / "out", quiet=True)


class ByBrightness:
    """Says of each pixel whether it is bright."""

    def predict(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(image[0] > 100).long() for image in images]


def test_dense_predictions_are_made_of_an_image_that_was_out_of_reach(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = evaluation(load_protocol("segmentation_scenes", FEW), "random:resnet_tiny")
    made = kept(cell, Outcome({}, "", None, 0, {"weight": torch.ones(1)}), folder / "runs")
    monkeypatch.setattr(prediction, "_network", lambda _: ByBrightness())
    images, decoding, read = sorted((folder / "images").rglob("*.png")), prediction.decoded, list[int]()

    def without(source: Source, ids: Sequence[int], unreadable: Unreadable) -> dict[int, torch.Tensor]:
        unreadable.note([(9, "9 is out of reach")] if 9 in ids else [])
        return decoding(source, [number for number in ids if number != 9], unreadable)

    again = lambda source, ids, *rest: (read.extend(ids), decoding(source, ids, *rest))[1]
    for decode, count in ((without, 19), (again, 20), (again, 20)):
        monkeypatch.setattr(prediction, "decoded", decode)
        assert predict_dense(made, folder / "images", folder / "out", quiet=True) == count
    assert read == list(range(8, 20))  # from its batch on, once
    masks = [folder / "out" / "masks" / one.relative_to(folder / "images") for one in images]
    assert [mask.is_file() for mask in masks] == [True] * 20
    assert len((folder / "out" / "found.jsonl").read_bytes().splitlines()) == 20
