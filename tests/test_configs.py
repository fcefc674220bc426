"""Every YAML under configs/ is known, builds and takes steps with its own optimizer without diverging, on networks and
images that are small; and what a row of a suite is run on is what its stored name says, by hash. Rows of suites that
train classifiers: tests/eval/test_suite_optimizers.py; scripts of the SLURM profiles: tests/slurm/test_launch.py."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mls.config import AugmentConfig, GridConfig
from mls.core import methods
from mls.core.matching import Matches
from mls.core.neighbour_lists import NeighbourLists
from mls.data import Views
from mls.engine import optim
from mls.engine.sizing import Facts, choose
from mls.eval import cells, frozen, load_protocol, load_suite, protocols, suites, supervised
from mls.eval.dense import run as dense
from mls.eval.dense.loop import DenseTraining
from mls.eval.dense.prepare import build_backbone, load_images
from mls.eval.dense.schema import Dense, Detection, FrozenDense
from mls.eval.extraction import Features
from mls.eval.frozen import PROBES, Split
from mls.eval.protocol import AnyProtocol, Frozen
from mls.eval.suite import chosen_rows, plan
from mls.exporting import to_detectron2
from mls.frozen.features import hash_of_weights
from mls.models import load_backbone, save_backbone
from mls.recipes import applicable, load_config, recipes
from mls.slurm.profile import profiles
from mls.streams import derive

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS, BATCH = 3, 4
SMALL = "model.backbone=resnet_tiny augment.size=32 model.projection=32 dictionary.size=64 data.batch_size=16"
SMALL += " objective.k=5 engine.device=cpu model.weights=null model.drop_path=0 model.freeze_patches=false"
FEW = ["data.scenes.count=40", "data.scenes.test_count=16"]
BOXES = """data.name=scenes_objects data.min_sizes=[32] data.test_size=32 data.max_size=32 model.backbone=resnet_tiny
model.width=16 model.box_width=32 model.before_nms=[20,20] model.proposals=[20,20] model.proposal_batch=16
model.box_batch=16 training.batch_size=4""".split()
REGIONS = """data.name=scenes_regions data.resize=[32,32] data.crop=[32,32] model.backbone=resnet_tiny model.width=16
model.output_stride=4 model.auxiliary_width=8 training.batch_size=4""".split()


def test_every_file_belongs_to_a_walk() -> None:
    walked = {("pretrain", f"{name}.yaml") for name in recipes()} | {("eval", f"{name}.yaml") for name in protocols()}
    walked |= {("eval/suites", f"{name}.yaml") for name in suites()}
    walked |= {("slurm", f"{name}.yaml") for name in profiles()}
    walked |= {("export", name) for name in (to_detectron2.FPN, to_detectron2.C4)}
    found = {(str(path.parent.relative_to(CONFIGS)), path.name) for path in CONFIGS.rglob("*.yaml")}
    assert found == walked


def bounded(values: list[float]) -> bool:
    """Finite, and never far above the start."""
    return all(math.isfinite(value) and value <= values[0] + 0.1 * abs(values[0]) for value in values)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_learns_with_its_own_optimizer(name: str) -> None:
    """At its highest rate on one batch, against keys and rows that stay."""
    config, _ = choose(load_config(name, applicable(name, SMALL.split())), Facts(20_000, 300, 80.0))
    torch.manual_seed(0)
    method = methods.build(config)
    optimizer = optim.build(config, method, method.own_rates())
    images = [torch.randn(16, 3, 32, 32) for _ in method.views().views]
    whole, flips = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(16, 1), torch.zeros(16, dtype=torch.bool)
    views = Views(images, [whole] * len(images), torch.arange(16), [flips] * len(images))
    rows = [torch.nn.functional.normalize(torch.randn(64, width), dim=1) for width in (128, 32)]
    if "dictionary" in method.memories():
        method.dictionary.enqueue(*rows, ids=torch.arange(100, 164))
    if getattr(method, "regions", None) is not None:  # which a run would ask of all its images
        rows_of_images = Matches(torch.arange(100, 164).repeat(16, 1), torch.rand(16, 64).sort(descending=True).values)
        method.regions.lists = NeighbourLists.of(rows_of_images, {})
    if "bags" in method.memories():
        method.bags.keep(torch.rand(16, method.count), None, "", GridConfig())  # type: ignore[operator, union-attr, arg-type]
    optim.set_lr(optimizer, optim.scaled_lr(config))
    method.set_progress(step=9, epoch=9, steps_per_epoch=1)
    losses, found = [], []
    for _ in range(STEPS):
        out = method(views)
        losses.append(out.loss.item())
        found.append(out.parts.get("info_nce", out.loss).item())  # what HML's margin does is no loss of the network
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert bounded(losses) and bounded(found) and found[-1] < found[0], (losses, found)


@functools.cache
def loaded() -> dict[str, AnyProtocol]:
    return {name: load_protocol(name) for name in protocols()}


def small(name: str, protocol: Dense) -> Dense:
    """The same heads and optimizer on the embedded scenes, its rate for the smaller batch."""
    changes = REGIONS
    if isinstance(protocol, Detection):
        changes = [*BOXES, f"model.anchors={[8] if protocol.model.neck == 'c4' else [6, 9, 13]}"]
        changes += ["model.masks=true"] if protocol.model.neck == "fpn" else []  # boxes alone are noise in three steps
    lr = protocol.training.lr * BATCH / protocol.training.batch_size
    fast = [
        "training.device=cpu",
        "training.precision=fp32",
        "seeds=1",
        "training.steps=99999",
        "training.precise_bn=0",
    ]
    return load_protocol(name, [*changes, *FEW, *fast, f"training.lr={lr}", "recipe=small", "training.falls=[]"])


def test_every_detector_and_segmenter_learns_with_its_own_optimizer() -> None:
    """At its highest rate, behind the warm-up, on one batch with the same draws. Those that differ in their data or in
    how long they train are the same here."""
    dense_ones = [small(name, protocol) for name, protocol in loaded().items() if isinstance(protocol, Dense)]
    for protocol in {repr((one.model, one.training)): one for one in dense_ones}.values():
        data = load_images(protocol).train
        training = DenseTraining(protocol, dense.build_network(protocol, "random", 0, data.class_names), data, seed=0)
        training.step = protocol.training.warmup_steps + 1
        batch = next(iter(training.batches(1, 1)))
        found = [float(sum(training.train_step(batch).values())) for _ in range(STEPS)]
        assert bounded(found) and found[-1] < found[0], (protocol, found)


def test_every_probe_beats_chance_with_its_own_settings() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    features = torch.randn(120, 8, generator=draws) + 3 * torch.nn.functional.one_hot(labels, 8)
    truth = torch.where(torch.nn.functional.one_hot(labels, 4) > 0, 1, -1).to(torch.int8)
    parts = [Features(features[rows], truth[rows], list("abcd"), "") for rows in (slice(80), slice(80, 120))]
    for name, protocol in loaded().items():
        if isinstance(protocol, Frozen):
            quick = replace(protocol, probe=replace(protocol.probe, epochs=3))
            found = PROBES[protocol.task](quick, Split(*parts, val=None, passes=0), 0, lambda *_: None)
            assert (found.scores.argmax(1) == labels[80:]).float().mean() > 0.8, name


# ------------------------------------------------------------------------------------------ rows of suites, by hash


def own(network: torch.nn.Module) -> str:
    """Of its parameters: an untrained network gets its statistics from the images."""
    return hash_of_weights(torch.nn.ParameterList(network.parameters()))


def built(cell: cells.Evaluation, folder: Path) -> torch.nn.Module:
    """The backbone that the cell's task evaluates."""
    protocol, weights, seed = cell.protocol, cell.source.placed(folder), cell.seed
    if isinstance(protocol, Dense | FrozenDense):
        return build_backbone(protocol, weights, seed)[0]
    if isinstance(protocol, Frozen):
        return frozen.build_backbone(protocol, weights, seed, supervised.load(protocol.data).train)
    few = replace(protocol, data=replace(protocol.data, shots=None))  # of few images
    return supervised.prepare_training(few, weights, seed, None).classifier.backbone


@pytest.mark.parametrize("name", suites())
def test_what_a_row_is_run_on_is_what_its_stored_name_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, runs = load_suite(name), {}

    def pretrained(weights: str, seed: int, *rest: object) -> str:
        folder = tmp_path / str(len(runs))
        if weights not in runs:
            folder.mkdir()
            torch.manual_seed(100 + len(runs))
            save_backbone(folder, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
        return runs.setdefault(weights, str(folder))

    monkeypatch.setattr(cells, "pretrained", pretrained)
    tiny = bool(suite.tiny)
    rows = chosen_rows(suite, (), tiny, ())
    seen: dict[tuple[str, str], str] = {}
    for column in suite.tiny if tiny else suite.columns:
        for row in [row for row in rows if row.ours]:
            if (column.protocol, row.weights or "") in seen:
                continue
            cell = plan(suite, row, column, 1, FEW)[0].ready(tmp_path, quiet=True).with_weights()
            stored = cell.facts()["weights"]
            torch.manual_seed(derive(cell.seed, "init"))
            named = load_backbone(runs.get(stored, stored))
            seen[column.protocol, row.weights or ""] = own(named)
            assert own(built(cell, tmp_path / "cell")) == own(named), (row.name, column.name)
    assert len(set(seen.values())) == len({weights for _, weights in seen})  # other weights are another hash
