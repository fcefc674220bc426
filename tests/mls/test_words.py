"""`objective.method=mls_words`: bags of words of the run's own regions, as targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mls
from mls.config import GridConfig, ScenesConfig
from mls.core import methods
from mls.core.methods import words as module
from mls.core.methods.words import Bags, Words, clustered
from mls.data import Views
from mls.data.scenes import ScenesSource
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.errors import ConfigError, Stopped
from mls.recipes import load_config

RECIPE = "mls_regions_scenes_tiny"
SHORT = """objective.method=mls_words objective.words=12 data.scenes.count=64 data.scenes.test_count=16
data.batch_size=16 dictionary.size=48 optim.epochs=3 objective.warmup_epochs=1 objective.regions.every_epochs=1
model.projection=16 monitor.log_every=1 monitor.knn_every_epochs=0 monitor.linear_every_epochs=0
monitor.health_every=99 engine.threads=1""".split()  # 4 steps an epoch; words before steps 5 and 9
QUIET = lambda *done: None


def test_clusters_that_lie_apart_are_found_and_none_stays_empty() -> None:
    draws = torch.Generator().manual_seed(0)
    true = torch.linalg.qr(torch.randn(8, 6, generator=draws))[0].T  # six directions at right angles
    points = F.normalize(true.repeat(50, 1) + 0.05 * torch.randn(300, 8, generator=draws), dim=1)
    fit = lambda found: float((points @ found[0].T).amax(dim=1).mean())
    centres, clusters = max((clustered(points, 6, torch.Generator().manual_seed(seed)) for seed in range(8)), key=fit)
    assert (true @ centres.T).amax(dim=1).min() > 0.99
    assert torch.equal(clusters, (points @ centres.T).argmax(dim=1))
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=draws))  # other features, in which the same lie together
    again, same = clustered(points @ turned, 6, draws, clusters)
    assert torch.equal(same, clusters)  # by the same numbers
    torch.testing.assert_close(again, centres @ turned, atol=1e-5, rtol=0)
    one = points[:1].repeat(9, 1)  # one point many times: clusters without points begin anew
    torch.testing.assert_close(clustered(one, 4, draws)[0], one[:4])


def test_of_a_bag_the_largest_shares_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 2)
    bags = Bags()
    bags.keep(torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.2, 0.6]]), None, "data", GridConfig())
    found = bags.of(torch.tensor([1, 0]), 3)
    torch.testing.assert_close(found[1], torch.tensor([5 / 9, 0.0, 4 / 9]))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(bags.usual, torch.tensor([0.35, 0.15, 0.5]))
    again = Bags()
    again.load_state_dict(bags.state_dict())
    assert torch.equal(again.of(torch.tensor([1, 0]), 3), found)
    assert (again.images, again.cut) == ("data", [3, 0.5])
    away = Bags()  # a resume loads to the CPU what a GPU asks for
    away.to("meta")
    away.load_state_dict(bags.state_dict())
    assert away.words is not None and away.words.device.type == "meta"


def built(*overrides: str, source: ScenesSource | None = None) -> Words:
    labels = None if source is None else source.labels.float()
    method = methods.build(load_config(RECIPE, [*SHORT, "objective.windows.count=0", *overrides]), image_labels=labels)
    assert isinstance(method, Words)
    method.set_progress(step=5, epoch=2, steps_per_epoch=4)
    return method


def test_the_term_equals_the_plain_formula() -> None:
    method = built("model.key_norm=none")
    draws = torch.Generator().manual_seed(0)
    bags = torch.rand(64, 12, generator=draws).softmax(dim=1)
    method.bags.keep(bags, None, "data", GridConfig())
    ids = torch.arange(8)
    rows = (F.normalize(torch.randn(48, width, generator=draws), dim=1) for width in (64, 16))
    method.dictionary.enqueue(*rows, ids=ids.repeat(6))
    views = Views([torch.randn(8, 3, 32, 32, generator=draws) for _ in range(2)], [torch.rand(8, 4)] * 2, ids)
    out = method(views)
    g1, expected = out.outputs[1].detach(), 0.0
    weight, bias = method.classifier.weight.detach(), method.classifier.bias.detach()
    for image in range(8):
        shares = torch.stack([10 * weight[word] @ g1[image] + bias[word] for word in range(12)]).softmax(dim=0)
        expected -= sum(float(bags[image, word] * shares[word].log()) for word in range(12)) / 8
    assert float(out.scalars["loss/words"]) == pytest.approx(expected, rel=1e-5)
    assert out.parts["words"].item() == pytest.approx(method.options.weight * expected, rel=1e-5)
    assert out.loss.item() == pytest.approx((out.parts["info_nce"] + out.parts["words"]).item(), rel=1e-6)


def test_each_window_tells_its_image_s_bag_if_asked() -> None:
    draws, losses, bags = torch.Generator().manual_seed(0), {}, torch.rand(64, 12).softmax(dim=1)
    images = [torch.randn(8, 3, size, size, generator=draws) for size in (32, 32, 16, 16, 16, 16)]
    views = Views(images, [torch.rand(8, 4)] * 6, torch.arange(8))
    for labelled in (False, True):
        method = built("objective.windows.count=2", f"objective.label_windows={labelled}", "model.key_norm=none").eval()
        method.bags.keep(bags, None, "data", GridConfig())
        losses[labelled] = method(views).loss.item()
    expected = 0.0
    for windows in images[2:4]:
        shares = method.classifier(10 * F.normalize(method.backbone(windows), dim=1)).softmax(dim=1).detach()
        expected -= float((bags[:8] * shares.log()).sum()) / 16
    assert losses[True] - losses[False] == pytest.approx(method.options.weight * expected, rel=1e-4)


def test_bags_are_of_an_image_s_own_regions_and_controls_are_what_they_say() -> None:
    source = ScenesSource(ScenesConfig(count=64, test_count=16))
    own, random, oracle = (built(*one, source=source) for one in ((), (RANDOM,), (ORACLE,)))
    noted = own.refresh(source, QUIET)
    assert 1 <= noted["words/used"] <= 12
    random.refresh(source, QUIET)
    oracle.refresh(source, QUIET)
    ids = torch.arange(64)
    bags, others, labels = (method.bags.of(ids, method.count) for method in (own, random, oracle))
    assert (bags.std(dim=0) > 0).any()
    rows = lambda of: sorted(map(tuple, of.tolist()))
    assert rows(bags) == rows(others) and not torch.equal(bags, others)  # the same, at other images
    truth = source.labels.float()
    torch.testing.assert_close(labels, truth / truth.sum(dim=1, keepdim=True))
    own.set_progress(step=6, epoch=2, steps_per_epoch=4)
    assert own.refresh(source, QUIET) == {}
    own.bags.images = "other data"  # after a resume with --accept-data
    assert own.refresh(source, QUIET)
    finer = built("objective.regions.grid=2", source=source)  # a branch with another grid: its words are new ones
    finer.bags.keep(torch.rand(64, 12), own.bags.clusters, own.images, GridConfig())
    assert finer.refresh(source, QUIET)
    ended = built(source=source)  # by a branch, at a step that is not due
    ended.set_progress(step=7, epoch=2, steps_per_epoch=4)
    assert ended.refresh(source, QUIET)
    many = built("objective.words=2000", source=source)
    with pytest.raises(ConfigError, match="1024 regions cannot make 2000 words: lower objective.words to 102 or so"):
        many.refuse(source)
    with pytest.raises(ConfigError, match="objective.pseudo_labels=oracle needs images with labels"):
        built(ORACLE)


RANDOM, ORACLE = "objective.pseudo_labels=random", "objective.pseudo_labels=oracle"


def newest(run: Run) -> dict[str, Any]:
    state = Checkpoints(run.checkpoints, 1).newest()
    assert state is not None
    return state["method"]


def test_a_run_resumed_between_words_and_right_before_them_equals_one_never_stopped(tmp_path: Path) -> None:
    def pretrain(name: str, *overrides: str) -> Run:
        keys = [*SHORT, f"run.root={tmp_path}", f"run.name={name}", *overrides]
        return mls.pretrain(load_config(RECIPE, keys), quiet=True)

    whole = pretrain("whole")
    with pytest.raises(Stopped):
        pretrain("parts", "engine.max_steps=6")
    with pytest.raises(Stopped):
        mls.resume(tmp_path / "parts", ["engine.max_steps=8"], quiet=True)
    halves = mls.resume(tmp_path / "parts", ["engine.max_steps=null"], quiet=True)
    first, second = newest(halves), newest(whole)
    bags = [state["_extra_state"]["bags"] for state in (first, second)]
    assert bags[0].pop("images") == bags[1].pop("images") and bags[0]["words"].shape == (64, 12)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    logged = [row["step"] for row in whole.metrics() if "loss/words" in row]
    assert logged == list(range(5, 13))
    assert [row["step"] for row in whole.metrics() if "words/used" in row] == [5, 9]
    assert any("gradient/words" in row for row in whole.metrics())


def test_a_resume_on_other_images_makes_the_words_anew(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for number in range(48):
        Image.fromarray(draws.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    keys = [*(key for key in SHORT if "scenes" not in key), f"data.root={tmp_path}", "data.source=folder"]
    keys += ["objective.regions.every_epochs=0", f"run.root={tmp_path / 'runs'}", "run.name=run"]
    with pytest.raises(Stopped):  # one step behind the words, of 3 an epoch
        mls.pretrain(load_config(RECIPE, [*keys, "engine.max_steps=5"]), quiet=True)
    (tmp_path / "00.png").rename(tmp_path / "99.png")
    run = mls.resume(tmp_path / "runs/run", ["engine.max_steps=null"], quiet=True, accept_data=True)
    assert [row["step"] for row in run.metrics() if "words/used" in row] == [4, 6]
