"""A run that starts from weights: rates that fall towards the stem, a clipped gradient, schedules that are functions of
the step, the guard against forgetting, and its resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mls
from mls.config import AugmentConfig, Config, OptimConfig
from mls.data.scenes import ScenesSource
from mls.distributed import Process
from mls.engine import Trainer, optim
from mls.engine.checkpoint import Checkpoints
from mls.engine.events import read
from mls.engine.schedule import between
from mls.engine.sizing import Facts, choose
from mls.errors import DivergedError, Stopped
from mls.models import load_backbone, save_backbone
from mls.models.stages import stages
from mls.monitor.guard import Guard
from mls.recipes import load_config

CONTINUED = """data.scenes.count=96 data.batch_size=32 optim.epochs=2 optim.layer_decay=0.5 optim.clip_norm=0.5
optim.final_weight_decay=0.01 model.final_momentum=1.0 monitor.guard=warn monitor.guard_images=64
monitor.guard_fall=0.01 monitor.moments=0 monitor.knn_every_epochs=0 monitor.linear_every_epochs=0
monitor.log_every=1""".split()
LOGGED = ("loss", "guard/rankme")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    save_backbone(folder, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    return folder


def run(tiny: list[str], name: str, *changes: str) -> Any:
    return mls.pretrain(load_config("mls_scenes_tiny", [*tiny, *CONTINUED, f"run.name={name}", *changes]), quiet=True)


def test_a_continued_run_resumes_exactly_and_its_guard_still_knows_the_start(start: Path, tiny: list[str]) -> None:
    weights = f"model.weights={start}"
    whole = run(tiny, "whole", weights)
    with pytest.raises(Stopped):
        run(tiny, "cut", weights, "engine.max_steps=4")
    cut = mls.resume(whole.path.with_name("cut"), ["engine.max_steps=null"], quiet=True)
    losses, guarded = ([[row.get(name) for row in one.metrics()] for one in (whole, cut)] for name in LOGGED)
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert guarded[0] == guarded[1] and [value is not None for value in guarded[0]] == [False, False, True] * 2
    first, second = (Checkpoints(one.checkpoints, 1).newest() for one in (whole, cut))
    assert first is not None and second is not None
    for part in ("method", "optimizer", "guarded"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert first["guarded"].keys() == {"guard/rankme", "guard/knn_map"}
    for images, known in ((64, first["guarded"]), (60, {})):
        config = load_config(str(cut.path / "config.yaml"), [f"monitor.guard_images={images}"])
        guard = Trainer(config, cut, Process(0, 1, torch.device("cpu")), quiet=True).build_guard()
        assert guard is not None and guard.start == known
    assert "no start was measured on these 60 images" in read(cut.path / "events.jsonl")[-1]["text"]
    groups = first["optimizer"]["param_groups"]
    assert {group["share"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}
    assert groups[0]["weight_decay"] == between(6, 6, 5e-4, 0.01)


def test_a_guard_that_is_crossed_warns_or_ends_the_run_with_what_fell(
    start: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter([50.0, 48.0, 40.0] * 2)
    monkeypatch.setattr(Guard, "measure", lambda *_: {"guard/rankme": next(falling)})
    changes = [f"model.weights={start}", "monitor.guard_fall=0.1", "data.scenes.count=32"]
    warned = run(tiny, "warned", *changes)
    sentence = "RankMe on fixed images is 40, 20 % below the 50 of the start"
    (told,) = [event for event in read(warned.path / "events.jsonl") if event["event"] == "forgotten"]
    assert (told["what"], told["epoch"]) == (sentence, 2)
    with pytest.raises(DivergedError, match=f"after epoch 2 {sentence}: lower optim.lr"):
        run(tiny, "ended", *changes, "monitor.guard=stop")


def test_the_guard_measures_fixed_images_and_ignores_what_rises() -> None:
    config = load_config("mls_scenes_tiny", ["monitor.guard=warn", "monitor.guard_images=60", "data.scenes.count=90"])
    made = [Guard.build(config, ScenesSource(config.data.scenes)) for _ in range(2)]
    assert made[0] is not None and made[1] is not None and torch.equal(made[0].sample.ids, made[1].sample.ids)
    network = load_backbone("resnet_tiny")
    values = [guard.measure(network, torch.device("cpu")) for guard in made if guard is not None]
    assert values[0] == values[1] and 1 < values[0]["guard/rankme"] <= 60
    assert made[0].sample.ids.tolist() != sorted(made[0].sample.ids.tolist())  # else folders of classes were split
    made[0].start = values[0]
    assert not made[0].fallen({name: 1.05 * value for name, value in values[0].items()})
    assert "RankMe on fixed images is" in made[0].fallen({"guard/rankme": 0.8 * values[0]["guard/rankme"]})


def test_rates_fall_from_the_heads_to_the_stem_and_without_decay_the_groups_are_as_ever() -> None:
    backbone = load_backbone("resnet_tiny")
    network = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(8, 2)})
    plain = optim.build(Config(), network, backbone=backbone)
    assert [(len(group["params"]), group["share"]) for group in plain.param_groups] == [
        (len(list(network.parameters())), 1.0)
    ]
    falling = optim.build(Config(optim=OptimConfig(layer_decay=0.5)), network, backbone=backbone)
    share = {id(p): group["share"] for group in falling.param_groups for p in group["params"]}
    found = [{share[id(p)] for p in stage} for stage in stages(backbone)]
    assert found == [{0.5**far} for far in range(len(found), 0, -1)]
    assert share[id(network["head"].weight)] == 1.0  # type: ignore[union-attr]


def test_the_network_of_a_start_is_that_of_its_weights(start: Path) -> None:
    facts = Facts(5_000, 300, None)
    config, _ = choose(load_config("mls_continue", [f"model.weights={start}"]), facts)
    alone, _ = choose(load_config("mls_folder_r50"), facts)
    assert config.model.backbone == "resnet_tiny" and config.optim.epochs == alone.optim.epochs // 4
    assert choose(load_config("mls_continue"), facts)[0].model.backbone == "resnet50"
