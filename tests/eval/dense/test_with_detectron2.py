"""`backend: detectron2` from a protocol to stored numbers, with the real detectron2: layouts, resume, processes."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mls.config import AugmentConfig
from mls.data.layouts import write
from mls.errors import CheckpointError, ConfigError, DataError, DivergedError, Stopped
from mls.eval import cells, load_protocol
from mls.eval.data.objects import encode
from mls.eval.dense import detectron2_data, with_detectron2
from mls.eval.dense.coco_ap import Detections, coco_ap
from mls.eval.dense.prepare import backbone_source, load_images
from mls.eval.dense.schema import Detection
from mls.eval.dense.trunk import build_trunk
from mls.eval.dense.voc_ap import voc_ap
from mls.eval.dense.with_detectron2 import Detectron2Training, prepare
from mls.frameworks import installed as frameworks
from mls.models import load_backbone, save_backbone
from mls.models.resnet_names import to_detectron2
from mls.results import Results

needs_detectron2 = pytest.mark.skipif(
    bool(frameworks.missing("detectron2")),
    reason="detectron2 is not installed: `mls doctor --frameworks` has the command",
)
SMALL = """backend=detectron2 training.steps=4 training.batch_size=2 training.falls=[3] training.warmup_steps=1
training.precise_bn=2 training.device=cpu model.width=16 model.box_width=16 model.before_nms=[60,60]
model.proposals=[20,20] model.proposal_batch=16 model.box_batch=8 model.score=0.0 data.min_sizes=[64] data.test_size=64
data.max_size=96""".split()
SCENES = ["model.backbone=scratch:resnet18", "model.anchors=[8,12,18,27]", "data.scenes.size=64"]
SCENES += ["data.scenes.count=8", "data.scenes.test_count=4"]


def scenes(*overrides: str) -> Detection:
    return load_protocol("detection_scenes", [*SMALL, *SCENES, *overrides])


def on_disk(name: str, root: Path, *overrides: str) -> Detection:
    where = [f"data.root={root}", "data.check_sizes=false", "data.workers=0"]
    return load_protocol(name, [*SMALL, "model.backbone=scratch:resnet18", *where, *overrides])


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts") / "coco"
    write("coco", root, train=8, test=4, size=64)
    return root


def training(protocol: Detection, state: Path, seed: int = 0, **options: Any) -> Detectron2Training:
    cfg, images = prepare(protocol, "random", seed, state)
    return Detectron2Training(protocol, cfg, images, seed, state, **options)


@pytest.fixture
def silenced() -> Any:
    with frameworks.quiet():
        yield


def test_without_detectron2_the_command_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = frameworks.FRAMEWORKS["detectron2"]
    monkeypatch.setitem(frameworks.FRAMEWORKS, "detectron2", dataclasses.replace(known, needs=("not_there",)))
    with pytest.raises(ConfigError, match=r"detectron2 cannot be used, .*not_there is missing: pip install"):
        cells.run(scenes(), "pretrain:mls_scenes_tiny", 0, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def detections(model: Any, cfg: Any, masks: bool) -> list[Detections]:
    """Of detectron2's network on detectron2's test images, in their order."""
    from detectron2.data import build_detection_test_loader

    found = []
    with torch.no_grad():
        for batch in build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]):
            (one,) = (output["instances"] for output in model.eval()(batch))
            outlines = encode(one.pred_masks) if masks else None
            found.append(Detections(one.pred_boxes.tensor, one.scores, one.pred_classes, outlines))
    return found


def numbers_again(protocol: Detection, folder: Path, spare: Path) -> dict[str, float]:
    """Our metrics of the network that a cell stored."""
    from detectron2.modeling import build_model

    data = load_images(protocol)
    with frameworks.quiet():
        cfg, _ = prepare(protocol, "random", 0, spare)
        model = build_model(cfg)
        model.load_state_dict(load_file(folder / "classifier.safetensors"))
        found = detections(model, cfg, protocol.model.masks)
    assert sum(len(one.scores) for one in found) > 20
    if data.test.metric == "voc07":
        return voc_ap(found, data.test)
    return coco_ap(found, data.test, protocol.model.masks)


@needs_detectron2
def test_the_embedded_scenes_are_trained_on_and_the_kept_network_has_the_stored_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    protocol, root = scenes("training.steps=20", "training.falls=[18]", "training.lr=0.01"), tmp_path / "runs"
    values = cells.run(protocol, "random", 0, root, quiet=True)
    folder = cells.evaluation(protocol, "random").folder(root)
    assert values == pytest.approx(numbers_again(protocol, folder, tmp_path / "spare"), abs=1e-6)
    assert values["box_ap50"] > 0
    rows = Results(root / "results.jsonl").rows()
    assert {row["backend"] for row in rows} == {"detectron2"} and len(rows) == len(values)
    assert cells.run(protocol, "random", 0, root, quiet=True) == pytest.approx(values)
    assert {path.name for path in folder.iterdir()} == {"classifier.json", "classifier.safetensors", "protocol.yaml"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "spare"]


@needs_detectron2
def test_a_runs_weights_and_statistics_are_what_training_starts_from(tmp_path: Path) -> None:
    augment = AugmentConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    (tmp_path / "run").mkdir()
    save_backbone(tmp_path / "run", load_backbone("scratch:resnet18"), {"architecture": "resnet18"}, augment)
    with frameworks.quiet():
        protocol, state = scenes(), tmp_path / "cell" / "state"
        cfg, images = prepare(protocol, str(tmp_path / "run"), 0, state)
        network = Detectron2Training(protocol, cfg, images, 0, state).network
    stored = load_file(tmp_path / "run" / "backbone.safetensors")["conv1.weight"]
    assert torch.equal(network.get_submodule("backbone.bottom_up.stem.conv1").weight, stored)
    assert list(cfg.MODEL.PIXEL_MEAN) == pytest.approx([25.5, 51.0, 76.5])


@needs_detectron2
def test_a_data_set_in_cocos_layout_is_trained_on(coco: Path, tmp_path: Path) -> None:
    protocol = on_disk("coco_fpn_1x", coco)
    values = cells.run(protocol, "random", 0, tmp_path, quiet=True)
    folder = cells.evaluation(protocol, "random").folder(tmp_path)
    assert values == pytest.approx(numbers_again(protocol, folder, tmp_path / "spare"), abs=1e-6)


@needs_detectron2
def test_voc_is_trained_on_over_both_years_with_c4(tmp_path: Path) -> None:
    from detectron2.data import get_detection_dataset_dicts

    write("voc", tmp_path / "voc", train=8, test=2, size=64)
    few = ["training.steps=2", "training.falls=[]", "training.precise_bn=1", "model.backbone=scratch:resnet50"]
    few += ["model.proposals=[8,4]", "model.box_batch=4"]
    protocol = on_disk("voc0712_c4", tmp_path / "voc", *few)
    train, test = detectron2_data.register(protocol.data, tmp_path)
    with frameworks.quiet():
        counts = [len(get_detection_dataset_dicts(names)) for names in (train, test)]
    assert len(train) == 2 and counts == [8, 2]
    values = cells.run(protocol, "random", 0, tmp_path / "runs", quiet=True)
    assert sorted(values) == ["box_ap", "box_ap50", "box_ap75"] and all(0 <= one <= 1 for one in values.values())


@needs_detectron2
@pytest.mark.parametrize(("neck", "depth"), [("fpn", 18), ("c4", 50)])
@pytest.mark.usefixtures("silenced")
def test_the_network_starts_from_all_of_the_backbone(neck: str, depth: int, tmp_path: Path) -> None:
    anchors = "model.anchors=[8,12,18,27]"
    protocol = scenes(f"model.neck={neck}", f"model.backbone=scratch:resnet{depth}", anchors)
    held = training(protocol, tmp_path).network.state_dict()
    source = backbone_source(protocol, "random", 0)
    for name, tensor in source.tensors().items():
        place = to_detectron2(name)
        if neck == "c4" and place.startswith("res5"):
            where = f"roi_heads.{place}"
        else:
            where = f"backbone.{place}" if neck == "c4" else f"backbone.bottom_up.{place}"
        assert torch.equal(held[where], tensor), name


@needs_detectron2
@pytest.mark.parametrize(("backbone", "part"), [("vit_tiny", "net"), ("timm:convnext_atto", "bottom_up")])
@pytest.mark.usefixtures("silenced")
def test_a_network_that_detectron2_has_not_starts_from_its_weights_and_layers_learn_at_their_rates(
    backbone: str, part: str, tmp_path: Path
) -> None:
    decaying = ["training.optimizer=adamw", "training.layer_decay=0.5", "training.warmup_steps=0"]
    protocol = scenes(f"model.backbone={backbone}", *decaying)
    this = training(protocol, tmp_path)
    held = this.network.state_dict()
    for name, tensor in build_trunk(backbone_source(protocol, "random", 0).backbone).state_dict().items():
        assert torch.equal(held[f"backbone.{part}.trunk.{name}"], tensor), name
    this.train(quiet=True)
    shares = {group["share"]: group["lr"] / rate(this) for group in this.optimizer.param_groups}
    assert len(shares) > 4 and shares == pytest.approx({0.5**far: 0.5**far for far in range(len(shares))})
    again = training(protocol, tmp_path)
    assert again.step == 4
    pairs = zip(again.network.parameters(), this.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def rate(this: Detectron2Training) -> float:
    return this.optimizer.param_groups[0]["lr"]


def stop_at(this: Detectron2Training, step: int, what: Callable[[], None]) -> None:
    """Has something happen while a step is taken."""
    plain = this.schedule.step

    def stepping() -> None:
        plain()
        if this.step + 1 == step:
            what()

    this.schedule.step = stepping


@needs_detectron2
@pytest.mark.usefixtures("silenced")
def test_a_signal_saves_and_the_same_call_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = training(scenes(), tmp_path / "whole")
    whole.train(quiet=True)
    first = training(scenes(), tmp_path)
    stop_at(first, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped after step 2") as stopped:
        first.train(quiet=True)
    assert stopped.value.exit_code == 75
    rest = training(scenes(), tmp_path)
    assert rest.step == 2
    state, before = rest.network.state_dict(), first.network.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert rate(rest) == rate(first)
    momentum = [one["momentum_buffer"] for one in rest.optimizer.state.values()]
    assert all(
        torch.equal(ours, theirs["momentum_buffer"])
        for ours, theirs in zip(momentum, first.optimizer.state.values(), strict=True)
    )
    rest.train(quiet=True)
    assert rest.step == 4 and rate(rest) == rate(whole)
    again = training(scenes(), tmp_path)  # killed while it was tested, say
    again.train(quiet=True)
    state, before = again.network.state_dict(), rest.network.state_dict()
    assert again.step == 4 and all(torch.equal(state[name], before[name]) for name in before)


@needs_detectron2
@pytest.mark.usefixtures("silenced")
def test_what_dies_without_a_word_goes_on_from_what_was_saved_as_time_passed(tmp_path: Path) -> None:
    def die() -> None:
        raise MemoryError

    first = training(scenes(), tmp_path, save_every=0.0)
    stop_at(first, 3, die)
    with pytest.raises(MemoryError):
        first.train(quiet=True)
    assert training(scenes(), tmp_path).step == 2


@needs_detectron2
@pytest.mark.usefixtures("silenced")
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    first = training(scenes(), tmp_path)
    stop_at(first, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        first.train(quiet=True)
    (saved,) = tmp_path.glob("step-*.pt")
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 255
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="can be read: start a new run"):
        training(scenes(), tmp_path)


@needs_detectron2
@pytest.mark.usefixtures("silenced")
def test_another_seed_draws_anew_and_the_same_seed_does_not(tmp_path: Path) -> None:
    def last(seed: int, name: str) -> torch.Tensor:
        few = ["training.steps=2", "training.falls=[]", "training.precise_bn=0"]
        one = training(scenes(*few), tmp_path / name, seed)
        one.train(quiet=True)
        return torch.cat([p.detach().flatten() for p in one.network.parameters()])

    one = last(0, "a")
    assert torch.equal(one, last(0, "b")) and not torch.equal(one, last(1, "c"))


@needs_detectron2
@pytest.mark.usefixtures("silenced")
def test_a_training_that_diverges_says_what_to_lower(tmp_path: Path) -> None:
    protocol = scenes("training.lr=1e20", "training.warmup_steps=0")
    with pytest.raises(DivergedError, match=r"no number at step \d: lower training.lr"):
        training(protocol, tmp_path).train(quiet=True)


@needs_detectron2
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers: int, tmp_path: Path) -> None:
    write("coco", tmp_path / "coco", train=2, test=2, size=64)
    for image in (tmp_path / "coco" / "train2017").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    protocol = on_disk("coco_fpn_1x", tmp_path / "coco", f"data.workers={workers}")
    with pytest.raises(DataError, match=r"^\S*train2017/0+[12].jpg cannot be read .*download this one again$"):
        cells.run(protocol, "random", 0, tmp_path / "runs", quiet=True)


@needs_detectron2
def test_reduced_precision_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on a GPU alone: use fp32"):
        with_detectron2.run(scenes("training.precision=bf16"), "random", 0, tmp_path, quiet=True)


def test_masks_of_a_data_set_that_has_none_are_refused(tmp_path: Path) -> None:
    write("voc", tmp_path / "voc", train=4, test=2, size=48)
    with pytest.raises(DataError, match="has boxes and no masks: set model.masks=false"):
        load_images(on_disk("voc0712_c4", tmp_path / "voc", "model.masks=true"))


@needs_detectron2
def test_two_processes_share_a_batch_and_the_test(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("eval", "run", "detection_scenes", *SMALL, *SCENES, "--out", str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    names = [row["metric"] for row in Results(tmp_path / "results.jsonl").rows()]
    assert len(names) == len(set(names)) >= 6  # each is stored once
    assert "Warning" not in done.stderr and done.stdout.startswith("| metric")


@needs_detectron2
@pytest.mark.slow
def test_a_killed_command_goes_on_from_the_last_checkpoint(
    tmp_path: Path, mls_command_line: Callable[..., list[str]], coco: Path
) -> None:
    data = [f"data.root={coco}", "data.check_sizes=false", "data.workers=1", "model.backbone=scratch:resnet18"]
    data += ["training.steps=100", "--weights", "random", "--out", str(tmp_path)]
    line = mls_command_line("eval", "run", "coco_fpn_1x", *SMALL, *data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = lambda: subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    with begin() as first:
        assert first.stderr is not None
        next(text for text in first.stderr if "step" in text)  # it trains
        os.killpg(first.pid, signal.SIGINT)  # as a terminal's Ctrl-C reaches the data workers too
        assert first.wait(60) == 130, first.stderr.read()
    with begin() as second:
        assert second.stderr is not None
        next(text for text in second.stderr if "resumed after step" in text)
        time.sleep(3)
        os.killpg(second.pid, signal.SIGKILL)
    (saved,) = tmp_path.glob("eval/*/state/step-*.pt")
    assert 0 < int(saved.stem.split("-")[1]) < 100
    third = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert third.returncode == 0 and "resumed after step" in third.stderr, third.stderr
