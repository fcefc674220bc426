"""No number under a wrong name: what a stored number belongs to is the content of its data and the weights that were
read, random weights are called random, and no row of a suite is run on another network than it names."""

import hashlib
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mls.config import AugmentConfig, DataConfig
from mls.data.sources import build_source, hash_of_images
from mls.errors import CheckpointError, ConfigError, DataError
from mls.eval import cells, extraction, frozen, load_protocol, load_suite, splits, suites
from mls.eval import suite as suite_module
from mls.eval.comparison import as_text
from mls.eval.dense.prepare import backbone_source
from mls.eval.extraction import features_of
from mls.eval.pretraining import Pretraining
from mls.eval.protocol import fingerprint
from mls.eval.suite import Column, Part, Row, Suite, chosen_rows, plan
from mls.eval.weights import public_name, read
from mls.exporting import export
from mls.files import sha256
from mls.frozen.features import hash_of_weights
from mls.models import backbones, load_backbone, save_backbone
from mls.recipes import load_config
from mls.results import Results
from mls.tools.cli import app

VIT = "test_vit"  # 0.4 million parameters
FEW = ["data.scenes.count=120", "data.scenes.test_count=40"]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def birds(folder: Path, seed: int) -> Path:
    """Class folders with images of noise."""
    draws = np.random.default_rng(seed)
    for split, count in (("train", 6), ("test", 4)):
        for number in range(count):
            for name in ("ant", "bee"):
                file = folder / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder


def of_folder(root: Path) -> cells.Evaluation:
    overrides = ["data.name=folder", f"data.root={root}", "augment.size=32", "probe.k=[1,3]", "data.workers=0"]
    return cells.evaluation(load_protocol("knn", overrides), "resnet_tiny")


def saved(folder: Path, seed: int, step: int) -> str:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    card = {"architecture": "resnet_tiny", "method": "mls", "step": step}
    save_backbone(folder, load_backbone("resnet_tiny"), card, AugmentConfig(size=32))
    return str(folder)


# --------------------------------------------------------------------------------------------------------- the data


def test_a_second_folder_never_gets_the_numbers_of_the_first(tmp_path: Path) -> None:
    first, second = (of_folder(birds(tmp_path / name, seed)) for seed, name in enumerate(("a", "b")))
    found = [cell.finish(tmp_path) for cell in (first, second, first)]
    assert [one.stored_before for one in found] == [False, False, True]
    assert len({one.row["cell"] for one in found}) == 2
    with pytest.raises(DataError, match="nowhere is missing"):
        of_folder(tmp_path / "nowhere").finish(tmp_path)
    (tmp_path / "a").rename(tmp_path / "moved")  # the same images elsewhere are the same data
    assert of_folder(tmp_path / "moved").finish(tmp_path).stored_before


@pytest.mark.parametrize("change", ["another image", "another name", "another class", "another size", "another part"])
def test_a_changed_folder_is_other_data(tmp_path: Path, change: str) -> None:
    key = of_folder(birds(tmp_path / "a", 0)).key
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert of_folder(copy).key == key
    image = copy / "train/ant/0.png"
    if change == "another image":
        shutil.copy(image, copy / "train/bee/new.png")
    elif change == "another size":
        image.write_bytes(image.read_bytes() + b"\0")
    else:
        moved = {"another name": "train/ant/zero.png", "another class": "train/bee/zero.png"}
        image.rename(copy / moved.get(change, "test/ant/zero.png"))
    again = shutil.copytree(copy, tmp_path / "c")  # what was listed once in a process is listed
    assert of_folder(again).key != key


def test_another_image_under_the_same_name_gets_features_of_its_own(tmp_path: Path) -> None:
    source = build_source(DataConfig(root=str(birds(tmp_path / "a", 0) / "train")))
    before = hash_of_images(source)
    image = tmp_path / "a/train/ant/3.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert hash_of_images(source) != before


def test_augmented_passes_of_another_augmentation_are_other_features(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(extraction, "cached_features", lambda facts, *rest: keys.append(str(facts)) or rest[1](0))
    for change in ("augment.flip=0.5", "augment.jitter=0.8", "augment.blur=0.5"):
        protocol = load_protocol("linear_scenes", [*FEW, change])
        with pytest.raises(AttributeError):
            features_of(load_backbone("resnet_tiny"), splits.load(protocol.data).train, protocol, number=1)
    assert len(set(keys)) == 3


def test_a_pretraining_run_belongs_to_the_images_it_learnt_from(tmp_path: Path) -> None:
    overrides = ["data.source=folder", f"data.root={birds(tmp_path / 'a', 0)}"]
    config = load_config("mls_scenes_tiny", overrides)
    first = cells.config_hash(config)
    (tmp_path / "a/train/ant/0.png").unlink()
    cells._images_of.cache_clear()  # what was listed once in a process is listed
    assert cells.config_hash(config) != first
    cell = Pretraining("MLS", "mls_scenes_tiny", overrides)
    assert cells.config_hash(config) in replace(cell, seed=config.run.seed).name


# ------------------------------------------------------------------------------------------------------ the weights


def test_a_run_that_goes_on_training_is_measured_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, protocol = saved(tmp_path / "run", 0, step=100), load_protocol("linear_scenes", [*FEW, "probe.l2=[0.01]"])
    expected = cells.run(protocol, run, root=tmp_path / "quiet", quiet=True)
    hash_before = sha256(tmp_path / "run" / "backbone.safetensors")[:16]

    def while_training(*arguments: object, **options: object) -> object:
        saved(tmp_path / "run", 1, step=200)
        return frozen.run(*arguments, **options)

    monkeypatch.setitem(cells.RUNNERS, "linear", while_training)
    measured = cells.evaluation(protocol, run).finish(tmp_path, keep=True, quiet=True)
    assert measured.values == expected
    assert (measured.row["weights_hash"], measured.row["step"]) == (hash_before, 100)
    folder = tmp_path / "eval" / measured.row["run"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
        "protocol.yaml",
    ]
    monkeypatch.undo()
    later = cells.evaluation(protocol, run).finish(tmp_path, quiet=True)
    assert not later.stored_before and later.row["step"] == 200


def test_weights_and_card_that_were_read_at_two_saves_are_read_again(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path / "run", 0, step=100))
    old = (folder / "backbone.json").read_bytes()
    saved(folder, 1, step=200)
    new = (folder / "backbone.json").read_bytes()
    (folder / "backbone.json").write_bytes(old)
    threading.Timer(0.3, lambda: (folder / "backbone.json").write_bytes(new)).start()
    assert read(str(folder), "").facts["step"] == 200


SPELLINGS = ["resnet_tiny", "random:resnet_tiny", "scratch:mobilenet_v3_small", "random:timm:resnet10t"]
BACKBONES = ["resnet_tiny", "scratch:resnet18", "torchvision:resnet18", "torchvision:resnet18@IMAGENET1K_V1"]
BACKBONES += ["timm:resnet10t", "random:resnet18"]


@pytest.mark.parametrize(
    ("weights", "backbone"),
    [*((weights, "resnet_tiny") for weights in SPELLINGS), *(("random", backbone) for backbone in BACKBONES)],
)
def test_weights_that_two_seeds_draw_differently_are_stored_as_random(weights: str, backbone: str) -> None:
    protocol = load_protocol("knn_scenes", [*FEW, f"model.backbone={backbone}"])
    name = cells.evaluation(protocol, weights).facts()["weights"]
    train = splits.load(protocol.data).train
    drawn = [next(frozen.build_backbone(protocol, weights, seed, train).parameters()).detach() for seed in (0, 1)]
    assert not torch.equal(*drawn)
    assert name.startswith("random:")


def checkpoint(file: Path, **networks: str) -> Path:
    """Of another program: vision transformers of a few channels behind prefixes, each drawn anew."""
    timm = pytest.importorskip("timm")
    state = {}
    for number, (prefix, network) in enumerate(networks.items()):
        torch.manual_seed(number)
        drawn = timm.create_model(network, num_classes=0).state_dict()
        state |= {f"{prefix}.{name}": tensor for name, tensor in drawn.items()}
    torch.save({"state_dict": state}, file)
    return file


def test_a_transformers_file_is_measured_where_its_architecture_is_named(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "mae.pth", first=VIT, second=VIT)
    command = ["eval", "run", "knn_scenes", *FEW, "probe.k=[1]", "--weights", str(file), "--out", str(tmp_path)]
    call = lambda *more: CliRunner().invoke(app, [*command, *more], catch_exceptions=False).stdout
    with pytest.raises(CheckpointError, match="name its architecture with --architecture"):
        call()
    with pytest.raises(CheckpointError, match=r"behind 'first\.', 'second\.': say which one with --prefix"):
        call("--architecture", f"timm:{VIT}")
    for prefix in ("first", "second"):
        assert f"weights {file} ({prefix})\n" in call("--architecture", f"timm:{VIT}", "--prefix", prefix)
    rows = Results(tmp_path / "results.jsonl").rows(metric="scenes/map")
    assert len({row["weights_hash"] for row in rows}) == len({row["cell"] for row in rows}) == 2
    assert rows[0]["value"] != rows[1]["value"]


def test_what_is_evaluated_is_the_network_that_was_named(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "mae.pth", first=VIT, second=VIT)
    own = load_backbone(file, f"timm:{VIT}", "second")
    placed = read(str(file), "", f"timm:{VIT}", "second").placed(tmp_path)
    assert hash_of_weights(load_backbone(placed)) == hash_of_weights(own)
    assert hash_of_weights(load_backbone(file, f"timm:{VIT}", "first")) != hash_of_weights(own)
    with pytest.raises(ConfigError, match="says itself which network it is: leave out --architecture"):
        read("torchvision:resnet18", "", "resnet18")


def test_random_weights_that_were_exported_are_still_called_random(tmp_path: Path) -> None:
    export("random:resnet_tiny", ["safetensors"], tmp_path)
    assert read(str(tmp_path / "backbone.safetensors"), "").name.endswith("backbone.safetensors (random:resnet_tiny)")


def test_other_back_ends_take_the_statistics_of_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    network, half = backbones.timm_network, {"mean": [0.5] * 3, "std": [0.25] * 3}
    monkeypatch.setattr(backbones, "timm_network", lambda name, published=False: network(name))
    monkeypatch.setattr(backbones, "timm_card", lambda name: {"architecture": f"timm:{name}", **half})
    source = backbone_source(load_protocol("coco_fpn_1x"), "timm:resnet18.a1_in1k", 0)
    assert source.mean == [127.5] * 3 and source.std == [63.75] * 3
    assert source.plan is not None and source.facts()["origin"] == "timm:resnet18.a1_in1k"


def test_one_network_has_one_name() -> None:
    same = ["random", "resnet_tiny", "random:resnet_tiny"]
    assert {public_name(weights, "resnet_tiny") for weights in same} == {"random:resnet_tiny"}
    assert len({read(weights, "resnet_tiny").hash for weights in same}) == 1
    published = ["torchvision:resnet18", "torchvision:resnet18@DEFAULT", "torchvision:resnet18@IMAGENET1K_V1"]
    assert {read(weights, "").name for weights in published} == {"torchvision:resnet18@IMAGENET1K_V1"}
    assert read("timm:resnet10t", "").name == "timm:resnet10t.c3_in1k"
    for wrong in ("runs/mine", "resnet5O", "pretrain:mls_scenes_tiny"):
        with pytest.raises(ConfigError, match="unknown"):
            read("random", wrong)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("WRONG", "WRONG is neither a run folder nor a file: give the folder that a run printed"),
        ("resnet5O", "neither a run folder nor a file: did you mean resnet50"),
        ("torchvison:resnet50", "did you mean 'torchvision'"),
        ("torchvision:resnet5O", "did you mean 'resnet50'"),
        ("torchvision:resnet50@IMAGENET1K_V3", "did you mean 'IMAGENET1K_V2'"),
        ("random:resnet5O", "did you mean 'resnet50'"),
        ("timm:resnet10tt", "did you mean 'resnet10t'"),
        ("random:timm:resnet10tt", "did you mean 'resnet10t'"),
        ("pretrain:mls_scenes_tinny", "did you mean 'mls_scenes_tiny'"),
    ],
)
def test_wrong_weights_are_told_before_the_data_are_looked_for(tmp_path: Path, weights: str, sentence: str) -> None:
    protocol = load_protocol("knn", ["data.name=folder", f"data.root={tmp_path / 'nowhere'}"])
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(sentence)):
        cells.run(protocol, weights, root=tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- what is stored already


def test_a_stored_number_says_so_and_again_measures_it(tmp_path: Path, mls_command: Command) -> None:
    command = ["eval", "run", "knn_scenes", *FEW, "probe.k=[1]", "--out", str(tmp_path)]
    first, second, third = (mls_command(*command, *more) for more in ([], [], ["--again"]))
    assert first.returncode == 0, first.stderr
    today = Results(tmp_path / "results.jsonl").rows()[0]["time"][:10]
    sentence = f"measured on {today}, not run again; --again runs it\n"
    assert [sentence in done.stdout for done in (first, second, third)] == [False, True, False]
    assert "weights random:resnet_tiny\n" in first.stdout
    assert len(Results(tmp_path / "results.jsonl").rows(metric="scenes/map")) == 2


def test_a_suite_says_which_numbers_it_did_not_measure(tmp_path: Path) -> None:
    part = Part(tiny=True, seeds=1, only=["random"], overrides=[*FEW, "probe.l2=[0.01]", "data.shots=2"])
    suite = load_suite("paper_classification")
    suite = replace(suite, tiny=suite.tiny[:1])
    assert "--again" not in as_text(suite_module.run(suite, tmp_path, part))
    again = as_text(suite_module.run(suite, tmp_path, part))
    assert re.search(r"1 of 1 numbers: measured on \d{4}-\d\d-\d\d, not run again; --again runs them\.", again)
    part = replace(part, again=True)
    assert "--again" not in as_text(suite_module.run(suite, tmp_path, part))


def test_numbers_of_version_0_1_are_found_where_their_data_cannot_be_others(tmp_path: Path) -> None:
    """It took weights by the name that was given and knew nothing of the content of the data."""

    def store(protocol: object, given: str, task: str) -> None:
        name = hashlib.sha256(given.encode()).hexdigest()[:16]
        key = hashlib.sha256(f"{fingerprint(protocol)}/{name}/0".encode()).hexdigest()[:12]
        row = {"cell": key, "metrics": 2, "validation": 0.5, "selection": "", "run": "old", "weights": given}
        for metric in ("map", "map_11pt"):
            Results(tmp_path / "results.jsonl").add(metric=f"{task}/{metric}", value=0.25, **row)

    scenes = load_protocol("knn_scenes", [*FEW, "probe.k=[1]"])
    store(scenes, "random", "scenes")
    assert cells.run(scenes, "random", root=tmp_path) == {"map": 0.25}  # 11 points had other thresholds
    for loss, known in (("em", True), ("hml", False)):  # whose margin stood still
        weak = load_protocol("spml_scenes", [*FEW, f"training.loss={loss}"])
        store(weak, "random", "scenes")
        assert (cells.evaluation(weak, "random").stored(tmp_path) is not None) == known
    timm = cells.evaluation(scenes, "timm:resnet10t")
    store(scenes, "timm:resnet10t", "scenes")  # random weights under a published name
    assert timm.stored(tmp_path) is None
    folder = of_folder(birds(tmp_path / "a", 0))
    store(folder.protocol, "resnet_tiny", "folder")
    assert folder.stored(tmp_path) is None


# --------------------------------------------------------------------------------------------------------- the suites


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", suites())
def test_no_row_of_a_suite_is_run_on_weights_that_it_does_not_name(name: str, tiny: bool) -> None:
    suite = load_suite(name)
    columns = suite.tiny if tiny else suite.columns
    for column in {(one.protocol, *one.set): one for one in columns}.values():
        for row in chosen_rows(suite, (), tiny, ()):
            planned = plan(suite, row, column, 1, ())
            assert bool(planned) == row.ours
            for cell in planned:
                if suite.compares == "backbones":
                    original = next(one for one in suite.rows if one.name == row.name)
                    assert cell.weights == (original.tiny if tiny else original.weights) is not None
                elif row.network and not tiny:
                    assert cell.weights == suite.networks[row.network] and row.network in row.name
                elif row.network:
                    assert public_name(cell.weights, cell.protocol.model.backbone) in row.name
                    assert row.network not in row.name
                else:
                    assert cell.weights == (row.weights or cell.protocol.model.weights)


def test_a_row_without_weights_shows_the_papers_numbers_alone_and_plan_refuses_another_network() -> None:
    suite = load_suite("paper_dense")
    rows = {row.name: row for row in chosen_rows(suite, (), False, ())}
    assert [name for name, row in rows.items() if row.ours] == ["random", "supervised"]
    assert {"BYOL", "MoCo-v2", "SoCo", "DenseCL", "ORL", "MLS", "MLS, 400 epochs"} <= set(rows)
    assert plan(suite, rows["MLS"], suite.columns[0], 1, ()) == []
    with pytest.raises(ConfigError, match="row 'MLS' names a network and has no weights"):
        plan(suite, replace(rows["MLS"], ours=True), suite.columns[0], 1, ())
    with pytest.raises(ConfigError, match="names a network and has no weights"):
        plan(load_suite("paper_two_way"), Row("BCE, ResNet50", network="ResNet50"), suite.columns[0], 1, ())


def names(suite: str, weights: list[str], tiny: bool = False, overrides: list[str] | None = None) -> list[str]:
    loaded = load_suite(suite)
    columns = loaded.tiny if tiny else loaded.columns
    rows = chosen_rows(loaded, weights, tiny, (), overrides or ())
    networks = {row.name: plan(loaded, row, columns[0], 1, overrides or ())[0].source.name for row in rows if row.ours}
    assert len(networks) == len([row for row in rows if row.ours])  # no two networks share a row
    return list(networks)


def test_a_row_names_its_network_also_under_overrides_labels_and_paths_that_end_alike(tmp_path: Path) -> None:
    assert names("paper_two_way", [], True, ["model.backbone=resnet18"])[0] == "Softmax, random:resnet18"
    assert names("paper_two_way", ["random:resnet18"])[0] == "Softmax, random:resnet18"
    assert names("paper_two_way", ["mine=torchvision:resnet18"])[0] == "Softmax, mine"
    assert names("paper_dense", ["MLS=random:resnet18", "resnet_tiny"])[-2:] == [
        "ours: MLS (random:resnet18)",
        "ours: random:resnet_tiny",
    ]
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    runs = [saved(tmp_path / "a" / "run", 0, 1), saved(tmp_path / "b" / "run", 1, 1)]
    assert names("paper_dense", runs)[-2:] == [f"ours: {run}" for run in runs]
    assert names("paper_dense", [runs[0], runs[0]])[-1] == "ours: run"
    with pytest.raises(ConfigError, match="model.weights would run rows on another network than they name"):
        names("paper_spml", [], False, [f"model.weights={runs[0]}"])


def test_several_weights_with_one_label_are_each_measured(tmp_path: Path) -> None:
    """Also in columns that share a training."""
    columns = [Column("mAP", "knn_scenes"), Column("F1", "knn_scenes", metric="f1")]
    runs = [saved(tmp_path / name, seed, 1) for seed, name in enumerate("ab")]
    part = Part([f"MLS={run}" for run in runs], seeds=1, overrides=[*FEW, "probe.k=[3]"])
    found = suite_module.run(Suite(compares="backbones", columns=columns), tmp_path, part)
    rows = {name: Results(tmp_path / "results.jsonl").rows(metric=f"scenes/{name}") for name in ("map", "f1")}
    for column, name in (("mAP", "map"), ("F1", "f1")):
        assert found.values["ours: MLS", column] == [row["value"] for row in rows[name]]
        assert len({row["weights_hash"] for row in rows[name]}) == 2
    assert len(set(found.values["ours: MLS", "mAP"])) == 2


def test_a_row_names_the_network_in_the_place_of_the_papers() -> None:
    suite = load_suite("paper_two_way")
    assert chosen_rows(suite, (), True, ())[0].name == "Softmax, random:resnet_tiny"
    assert chosen_rows(suite, ["runs/mine"], False, ())[0].name == "Softmax, mine"
    found = suite_module.Comparison(suite, suite.columns, chosen_rows(suite, ["runs/mine"], False, ()))
    assert "The paper's columns are its own networks (ResNet50), not the one that a row names." in as_text(found)
