"""Windows that are told apart, and pseudo-labels from regions: against plain formulas, and in runs that are resumed."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mls
from mls.config import AugmentConfig, RegionsConfig, ScenesConfig
from mls.core import methods, regions
from mls.core.matching import Matches
from mls.core.methods.mls import MLS
from mls.core.neighbour_lists import NeighbourLists
from mls.core.positives import Positives
from mls.core.regions import (
    RegionEncoder,
    best_pairs,
    chamfer,
    most_alike,
    nearest_images,
    neighbours_of_all,
    region_boxes,
)
from mls.data import ViewPlan, Views
from mls.data.augment import GREY
from mls.data.crops import CropDataset, moved
from mls.data.scenes import ScenesSource
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.engine.gallery import gallery, last_moment
from mls.engine.replay import replay
from mls.errors import CheckpointError, ConfigError, DataError, Stopped
from mls.models.backbones import TinyResNet
from mls.monitor.log import TIMES
from mls.progress import TrainingProgress
from mls.recipes import load_config
from mls.streams import watched

QUIET = lambda what, done, of: None
RECIPE = "mls_regions_scenes_tiny"
FEW = ["data.batch_size=8", "dictionary.size=32", "objective.k=5", "model.projection=16"]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ------------------------------------------------------------------------------------------------------------- windows


@given(st.integers(1, 60), st.integers(1, 60), st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0, 1))
def test_a_moved_box_stays_in_its_image_and_near(height: int, width: int, draws: list[float], jitter: float) -> None:
    box = (height // 3, width // 3, max(1, height // 2), max(1, width // 2))
    top, left, h, w = moved(box, height, width, jitter, draws)
    assert 0 <= top < top + h <= height and 0 <= left < left + w <= width
    assert abs(h - box[2]) <= jitter * box[2] + 1 and abs(w - box[3]) <= jitter * box[3] + 1
    assert abs((top + h / 2) - (box[0] + box[2] / 2)) <= 1.5 * jitter * box[2] + 1.5  # half of it from the new size
    assert moved(box, height, width, 0.0, draws) == box


def test_pairs_of_windows_are_cut_at_one_place_and_leave_the_crops_as_they_were() -> None:
    augment = AugmentConfig(size=32, small_crops=1, small_size=16)
    plan = ViewPlan.crops(augment).with_window_pairs(2, 12, (0.1, 0.3), 0.1)
    source = ScenesSource(ScenesConfig(count=32, test_count=8))
    batch = CropDataset(source, augment, seed=0, plan=plan).__getitems__([(1, i) for i in range(32)])
    plain = CropDataset(source, augment, seed=0).__getitems__([(1, i) for i in range(32)])
    assert all(torch.equal(one, other) for one, other in zip(plain.crops, batch.crops[:3], strict=True))
    assert [crops.shape[-1] for crops in batch.crops[3:]] == [12] * 4
    for first, second in ((3, 5), (4, 6)):
        near = (batch.boxes[first] - batch.boxes[second]).abs()
        assert 0 < near.max() < 0.15
    assert (batch.boxes[3] - batch.boxes[4]).abs().max() > 0.3


@pytest.mark.parametrize("same_image", [True, False])
def test_the_window_term_equals_the_plain_formula(same_image: bool) -> None:
    keys = [one for one in FEW if not one.startswith("objective.k")] + ["objective.method=moco_v2"]
    config = load_config(RECIPE, [*keys, "augment.small_crops=1", f"objective.windows.same_image={same_image}"])
    method = methods.build(config).eval()
    stream = torch.Generator().manual_seed(0)
    sizes = (32, 32, 16, 16, 16, 16, 16)
    images = [torch.randn(8, 3, size, size, generator=stream) for size in sizes]
    views = Views(images, [torch.zeros(8, 4)] * 7, torch.arange(8))
    out = method(views)
    pair, heads = method.pair, method.windows.heads  # type: ignore[attr-defined]
    first = torch.cat(images[3:5]), pair.query, heads.query
    second = torch.cat(images[5:7]), pair.key, heads.key
    u1, u2 = (F.normalize(head(encoder.backbone(x)), dim=1).detach() for x, encoder, head in (first, second))
    losses = []
    for one in range(16):
        others = [v for v in range(16) if v == one or same_image or v % 8 != one % 8]
        logits = torch.stack([u1[one] @ u2[v] / 0.2 for v in others]).double()
        losses.append(float(logits.logsumexp(0) - u1[one].double() @ u2[one].double() / 0.2))
    assert out.scalars["loss/windows"].item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert out.scalars["chance/windows"].item() == pytest.approx(math.log(16 if same_image else 15))
    without = methods.build(load_config(RECIPE, [*keys, "augment.small_crops=1", "objective.windows.count=0"])).eval()
    plain = without(Views(images[:3], views.boxes[:3], views.ids))
    assert out.loss.item() == pytest.approx(plain.loss.item() + np.mean(losses), abs=1e-4)


@pytest.mark.parametrize("method", ["densecl", "supervised"])
def test_methods_without_the_term_refuse_windows(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} has no term of windows: use objective.windows.count=0"):
        load_config(RECIPE, [f"objective.method={method}"])


# ------------------------------------------------------------------------------------------------------------- regions


def test_novelty_takes_the_whole_images_similarity_off_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "BUDGET", {"cpu": 7 * 64 * 16})  # a few images at a time
    features, whole = unit(30, 4, 8), unit(30, 6, seed=1)
    found = regions.nearest_images(features, torch.arange(30), 5, lambda *done: None, whole, weight=0.7)
    scores = regions.chamfer(features, features) - 0.7 * whole @ whole.T
    expected = scores.fill_diagonal_(-torch.inf).topk(5)
    torch.testing.assert_close(found.scores, expected.values)
    assert torch.equal(found.indices, expected.indices)
    spread = regions.chamfer(features, features).std(1) / (whole @ whole.T).std(1)
    assert regions.relative_spread(features, whole) == pytest.approx(float(spread.mean()), rel=1e-5)


def test_whole_images_keep_the_statistics_of_their_training() -> None:
    config, source = load_config(RECIPE), ScenesSource(ScenesConfig(count=20, test_count=8))
    network = TinyResNet(width=4, stride=1).eval()
    options = replace(config.objective.regions, novelty=0.5)  # type: ignore[attr-defined]
    encoder = RegionEncoder.fitted(network, source, config.augment, options, torch.device("cpu"))
    image = torch.as_tensor(source.read(3)).float()[None] / 255
    grey = (image * torch.tensor(GREY)[:, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = F.normalize(network((grey - 0.5) / 0.25), dim=1)
    torch.testing.assert_close(encoder.whole_images(source, [3]), expected, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 4), st.floats(0.05, 1))
def test_regions_lie_in_the_image_and_reach_its_edges(height: int, width: int, grid: int, side: float) -> None:
    boxes = region_boxes(height, width, RegionsConfig(grid=grid, side=side))
    assert len(boxes) == grid**2
    assert len({box[2:] for box in boxes}) == 1
    assert all(0 <= t < t + h <= height and 0 <= x < x + w <= width for t, x, h, w in boxes)
    if grid > 1:
        assert (boxes[0][:2], boxes[-1][0] + boxes[-1][2], boxes[-1][1] + boxes[-1][3]) == ((0, 0), height, width)


def test_neighbours_are_those_of_the_plain_formula_whatever_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    features = unit(23, 4, 6)
    scores = torch.zeros(23, 23)
    for one, other in np.ndindex(23, 23):
        products = features[one] @ features[other].T
        scores[one, other] = products.max(1).values.mean() + products.max(0).values.mean()
    torch.testing.assert_close(chamfer(features, features), scores)
    expected = scores.fill_diagonal_(-9).topk(7, dim=1)
    for budget, queries in ((1 << 22, 64), (4 * 16 * 5, 4)):
        monkeypatch.setitem(regions.BUDGET, "cpu", budget)
        monkeypatch.setattr(regions, "QUERIES", queries)
        found = nearest_images(features, torch.arange(23), 7, QUIET)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.scores, expected.values)
    pairs = best_pairs(features[0], features[1], 4)
    assert pairs[0][2] == pytest.approx(float((features[0] @ features[1].T).max()))


def test_region_features_are_centred_whitened_and_of_the_windows() -> None:
    config = load_config(RECIPE)
    source = ScenesSource(ScenesConfig(count=100, test_count=8))
    options = replace(config.objective.regions, grid=2, side=0.5, whiten=8, neighbours=9)  # type: ignore[attr-defined]
    network = TinyResNet(width=4, stride=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    encoder = RegionEncoder.fitted(network, source, config.augment, options, torch.device("cpu"))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    features = encoder(source, range(100))
    assert features.shape == (100, 4, 8)
    with torch.no_grad():
        raw = torch.cat(list(encoder.features(source, range(100)))) - encoder.mean
    assert raw.mean(0).abs().max() < 1e-5
    white = raw @ encoder.projection  # type: ignore[operator]
    covariance = white.T @ white / len(white)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert float(covariance[0, 0]) == pytest.approx(1 / (1 + regions.RIDGE), rel=1e-3)
    # The last region of an image is its lower right quarter, without its colours.
    image = torch.as_tensor(source.read(3)).float()[None, :, 16:, 16:] / 255
    grey = (image * torch.tensor(GREY)[:, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = encoder.network((grey - 0.5) / 0.25)[0] - encoder.mean
    torch.testing.assert_close(raw[4 * 3 + 3], expected[0], atol=1e-4, rtol=1e-4)
    found, _ = neighbours_of_all([encoder], source, options, QUIET)
    assert found.indices.shape == (100, 9)
    assert not (found.indices == torch.arange(100)[:, None]).any()


def test_of_several_networks_the_cosines_of_regions_are_averaged() -> None:
    config, source = load_config(RECIPE), ScenesSource(ScenesConfig(count=20, test_count=8))
    options = replace(config.objective.regions, grid=2, side=0.5, whiten=4, neighbours=19)  # type: ignore[attr-defined]
    fitted = lambda width: RegionEncoder.fitted(TinyResNet(width), source, config.augment, options, torch.device("cpu"))
    encoders, told = [fitted(4), fitted(8)], []
    found, _ = neighbours_of_all(encoders, source, options, lambda *done: told.append(done))
    of_both = torch.stack([encoder(source, range(20)) for encoder in encoders])
    cosines = torch.einsum("nard,nbsd->abrs", of_both, of_both) / 2  # [images, images, regions, regions]
    scores = cosines.amax(dim=3).mean(dim=2) + cosines.amax(dim=2).mean(dim=2)
    torch.testing.assert_close(found.scores, scores.gather(1, found.indices), atol=1e-5, rtol=0)
    assert (found.scores.diff(dim=1) <= 1e-6).all()
    assert told == [("regions", 20, 40), ("regions", 40, 40), ("neighbours", 20, 20)]
    whole = replace(options, novelty=0.5)
    encoders = [replace(encoder, whole=encoder.network) for encoder in encoders]
    assert not torch.equal(neighbours_of_all(encoders, source, whole, QUIET)[0].indices, found.indices)


# --------------------------------------------------------------------------------------------------------------- lists


def lists_of(images: int, neighbours: int, seed: int = 0) -> NeighbourLists:
    stream = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(images, generator=stream)[:neighbours] for _ in range(images)])
    scores = torch.rand(images, neighbours, generator=stream).sort(dim=1, descending=True).values
    return NeighbourLists.of(Matches(ids, scores), {"images": "x"})


@given(st.lists(st.integers(0, 11), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_rows_are_positives_where_their_image_is_in_the_list(
    rows: list[int], k: int, seed: int, threshold: bool
) -> None:
    lists = lists_of(12, 5, seed)
    rows = [row for number, row in enumerate(rows) if rows[:number].count(row) < 2]
    least = 0.5 if threshold else None
    found = lists.among(torch.arange(12), torch.tensor(rows), k, least)
    for query in range(12):
        of_image = dict(zip(lists.ids[query].tolist(), lists.scores[query].tolist(), strict=True))
        hits = sorted((-of_image[row], slot) for slot, row in enumerate(rows) if row in of_image)
        hits = [hit for hit in hits if -hit[0] >= 0.5] if threshold else hits[:k]
        present = found.scores[query] > -math.inf
        assert (-found.scores[query][present]).tolist() == [score for score, _ in hits]
        chosen = found.indices[query][present].tolist()
        assert len(set(chosen)) == len(chosen)
        assert {rows[slot] for slot in chosen} == {rows[slot] for _, slot in hits}


def test_of_watched_images_the_two_regions_that_are_most_alike_are_kept(tmp_path: Path) -> None:
    features = unit(70, 4, 6)
    found = nearest_images(features, torch.arange(70), 7, QUIET)
    lists = NeighbourLists.of(found, {"images": "x"}, most_alike(features, found.indices))
    lists.save(tmp_path / "lists")
    queries = torch.tensor([watched(70)[5], next(image for image in range(70) if image not in watched(70))])
    alike = NeighbourLists.open(tmp_path / "lists").most_alike(queries, found.indices[queries])
    assert alike is not None and (alike[1] == -1).all()
    for image, pair in zip(found.indices[queries[0]], alike[0].tolist(), strict=True):
        assert tuple(pair) == best_pairs(features[queries[0]], features[image], 1)[0][:2]
    stranger = next(image for image in range(70) if image not in found.indices[queries[0]])
    assert lists.most_alike(queries[:1], torch.tensor([[stranger]])).tolist() == [[[-1, -1]]]  # type: ignore
    assert lists_of(40, 7).most_alike(queries[:1], torch.tensor([[0]])) is None  # of an older file
    assert lists.regions is not None
    replace(lists, regions=lists.regions[:, 1:]).save(tmp_path / "lists")
    with pytest.raises(CheckpointError, match="lists is damaged: make it again with `mls regions`"):
        NeighbourLists.open(tmp_path / "lists")


def test_lists_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    lists = lists_of(40, 7)
    lists.save(tmp_path / "lists.safetensors")
    again = NeighbourLists.open(tmp_path / "lists.safetensors")
    assert torch.equal(lists.ids, again.ids) and torch.equal(lists.scores, again.scores)
    assert again.identity == {"images": "x"}
    assert lists.least(7) == -math.inf
    scores, least = lists.scores.float(), lists.least(2)
    assert (scores > least).sum() < 80 <= (scores >= least).sum()  # there are ties in half precision
    (tmp_path / "other").write_bytes(b"nothing")
    for name in ("other", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name} holds no neighbour lists .*: `mls regions` writes them"):
            NeighbourLists.open(tmp_path / name)


# -------------------------------------------------------------------------------------------------------- in the method


def method_of(*overrides: str) -> MLS:
    method = methods.build(load_config(RECIPE, [*FEW, *overrides]), image_labels=torch.eye(4)[torch.arange(40) % 4])
    assert isinstance(method, MLS) and method.regions is not None
    method.regions.lists = lists_of(40, 12)
    method.dictionary.enqueue(unit(32, 64), unit(32, 16, seed=1), ids=torch.arange(32))
    return method


def views_of() -> Views:
    sizes = (32, 32, 16, 16, 16, 16)
    images = [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    return Views(images, [torch.zeros(8, 4)] * 6, torch.arange(32, 40))


def test_an_image_is_found_as_often_as_it_lies_among_the_rows() -> None:
    """Each epoch leaves out its last, incomplete batch, so that an image may come more often than the whole data set
    fits among the rows."""
    method = method_of("dictionary.size=256", "data.batch_size=32")  # one batch of 40 images is an epoch
    assert method.regions is not None and method.regions.lists is not None
    ids, query = torch.arange(32).repeat(8), torch.tensor([35])
    wanted = method.regions.lists.ids[35].long()
    found = method.regions.among(query, ids)
    method.regions.least = -1.0
    every = Positives.of(method.regions.among(query, ids)).counts()
    assert int(every) == int((ids[:, None] == wanted).sum()) > 40
    assert (found.scores[0] > -math.inf).all()


def test_positives_are_rows_of_listed_images_and_controls_choose_as_many() -> None:
    method, views = method_of(), views_of()
    matched = method(views).matched_ids
    assert matched is not None and method.regions is not None and method.regions.lists is not None
    counts = []
    for query, own in zip(views.ids.tolist(), matched.tolist(), strict=True):
        listed = [image for image in method.regions.lists.ids[query].tolist() if image < 32][:5]
        assert sorted(own) == sorted([*listed, *[-1] * (5 - len(listed))])
        counts.append(len(listed))
    for kind in ("random", "oracle"):
        control = method_of(f"objective.pseudo_labels={kind}")(views).matched_ids
        assert control is not None
        assert ((control >= 0).sum(1) == torch.tensor(counts)).all()
        if kind == "oracle":
            assert ((control % 4 == views.ids[:, None] % 4) | (control < 0)).all()
    method = method_of("objective.regions.choose=threshold", "objective.k=3")
    assert method.regions is not None
    found = Positives.of(method.regions.among(views.ids, method.dictionary.ids)).counts()
    assert 1 < found.float().mean() < 6 and len(set(found.tolist())) > 1


@pytest.mark.parametrize("classify_with", ["projection", "backbone"])
def test_windows_are_queries_of_the_same_labels_if_asked(classify_with: str) -> None:
    views, keys = views_of(), ["objective.normalise=positives", f"objective.classify_with={classify_with}"]
    without = method_of(*keys).eval()(views)
    method = method_of("objective.label_windows=true", *keys).eval()
    out = method(views)
    rows = getattr(method.dictionary.rows(), classify_with)
    losses = []
    for images in views.images[2:4]:
        g1, z1 = (F.normalize(one, dim=1).detach() for one in method.pair.query(images))
        logits = (z1 if classify_with == "projection" else g1) @ rows.T / 0.2
        for query, matched in enumerate(without.matched_ids.tolist()):  # type: ignore[union-attr]
            positives = [one for one in matched if one >= 0]
            labels = torch.zeros(32).index_fill_(0, torch.tensor(positives), 1.0)  # row i is of image i
            entries = F.binary_cross_entropy_with_logits(logits[query], labels, reduction="sum")
            losses.append(float(entries) / len(positives))
    term = method.options.weight * np.mean(losses)
    assert term > 0.1
    assert out.loss.item() == pytest.approx(without.loss.item() + term, rel=1e-5)
    method.warming_up = True
    assert method(views).loss.item() < without.loss.item()
    with pytest.raises(ConfigError, match="label_windows=true has no windows to label: set objective.windows.count=2"):
        method_of("objective.label_windows=true", "objective.windows.count=0")


def test_soft_weights_are_those_of_the_plain_formula() -> None:
    views, losses = views_of(), {}
    for soft in (0.0, 0.3):
        method = method_of(f"objective.regions.soft={soft}", "objective.normalise=positives").eval()
        out = method(views)
        losses[soft] = out.scalars["loss/multi_label"].item()
    z1 = F.normalize(method.pair.query(views.images[0])[1], dim=1).detach()
    logits = z1 @ method.dictionary.rows().projection.T / 0.2
    assert method.regions is not None
    found, total = method.regions.among(views.ids, method.dictionary.ids), {0.0: 0.0, 0.3: 0.0}
    for query in range(8):
        present = found.scores[query] > -math.inf
        slots, scores = found.indices[query][present], found.scores[query][present]
        labels = torch.zeros(32).index_fill_(0, slots, 1.0)
        entries = F.binary_cross_entropy_with_logits(logits[query], labels, reduction="none")
        for soft in total:
            weights = torch.ones(32)
            if soft:
                weights[slots] = (scores / soft).exp() / (scores / soft).exp().mean()
            total[soft] += float((entries * weights).sum()) / len(slots) / 8
    assert losses[0.0] == pytest.approx(total[0.0], rel=1e-5)
    assert losses[0.3] == pytest.approx(total[0.3], rel=1e-5)
    assert abs(total[0.0] - total[0.3]) > 1e-3
    with pytest.raises(ConfigError, match="objective.regions.soft weighs single entries, objective.loss=softmax has"):
        method_of("objective.regions.soft=1", "objective.loss=softmax", "objective.normalise=mean")
    with pytest.raises(ConfigError, match="knn_moco weighs its positives alike: use objective.regions.soft=0"):
        method_of(
            "objective.regions.soft=1",
            "objective.method=knn_moco",
            "objective.loss=softmax",
            "objective.normalise=mean",
        )


SHORT = """data.scenes.count=64 data.scenes.test_count=16 data.batch_size=16 dictionary.size=48 objective.k=5
optim.epochs=3 objective.warmup_epochs=1 objective.regions.every_epochs=1 objective.regions.neighbours=30
model.projection=16 monitor.log_every=1 monitor.knn_every_epochs=0 monitor.linear_every_epochs=0 monitor.health_every=99
engine.threads=1""".split()  # 4 steps an epoch; lists before steps 5 and 9


def pretrain(root: Path, name: str, *overrides: str) -> Run:
    return mls.pretrain(load_config(RECIPE, [*SHORT, f"run.root={root}", f"run.name={name}", *overrides]), quiet=True)


def newest(run: Run) -> dict[str, Any]:
    state = Checkpoints(run.checkpoints, 1).newest()
    assert state is not None
    return state["method"]


def neighbours_of(run: Run) -> dict[str, Any]:
    return newest(run)["_extra_state"]["neighbours"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(tmp_path_factory.mktemp("runs"), "whole")


def test_a_run_resumed_between_lists_and_right_before_them_equals_one_never_stopped(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain(tmp_path, "parts", "engine.max_steps=6")
    with pytest.raises(Stopped):
        mls.resume(tmp_path / "parts", ["engine.max_steps=8"], quiet=True)
    halves = mls.resume(tmp_path / "parts", ["engine.max_steps=null"], quiet=True)
    first, second = newest(halves), newest(whole)
    identities = [state["_extra_state"]["neighbours"].pop("identity") for state in (first, second)]
    assert identities[0] == identities[1]
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    timeless = lambda run: [{key: value for key, value in row.items() if key not in TIMES} for row in run.metrics()]
    assert timeless(halves) == timeless(whole)


def test_a_signal_while_neighbours_are_found_is_heeded_and_they_are_found_by_the_resume(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def note(progress: TrainingProgress, what: str, done: int, of: int) -> None:
        told.append(what)
        if told == ["regions", "neighbours", "regions"]:  # of the second lists
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "note", note)
    with pytest.raises(Stopped, match="stopped after step 8 of 12, everything is saved"):
        pretrain(tmp_path, "stopped", "engine.milestone_epochs=1", "engine.keep_last=1")
    run = mls.resume(tmp_path / "stopped", quiet=True)
    assert told == ["regions", "neighbours", "regions", "regions", "neighbours"]
    assert neighbours_of(run)["identity"] == neighbours_of(whole)["identity"]
    assert torch.equal(neighbours_of(run)["ids"], neighbours_of(whole)["ids"])
    assert Checkpoints(run.checkpoints, 1).steps() == [4, 8, 12], "the epoch's milestone is one still"


def test_lists_are_made_anew_and_noted(whole: Run) -> None:
    events = [json.loads(line) for line in (whole.path / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "refresh"] == [5, 9]
    noted = [row for row in whole.metrics() if "regions/score" in row]
    assert [row["step"] for row in noted] == [5, 9]
    assert 0 < noted[1]["regions/kept"] <= 1
    losses = [row["step"] for row in whole.metrics() if "loss/multi_label" in row]
    assert losses == list(range(5, 13))
    neighbours = neighbours_of(whole)
    assert neighbours["ids"].shape == (64, 30) and neighbours["identity"]["step"] == 9


def test_the_gallery_shows_rows_of_listed_images(whole: Run) -> None:
    listed = neighbours_of(whole)["ids"]
    rows = gallery(whole, queries=6)
    assert any(row.match_ids for row in rows)
    assert all(image in listed[row.query_id] for row in rows for image in row.match_ids)


def test_replay_takes_the_lists_that_the_run_has_found(whole: Run, tmp_path: Path) -> None:
    queries = last_moment(whole).queries
    assert any(query.regions for query in queries)
    assert all(len(query.regions) == len(query.matches["regions"]) for query in queries)
    found = {(one.labels_from, one.k): one for one in replay(whole, [2, 4]).settings}
    assert list(found) == [(name, k) for name in ("regions", "backbone", "projection") for k in (2, 4)]
    assert found["regions", 4].matches == np.mean([len(query.matches["regions"][:4]) for query in queries])
    lists, plain = found["regions", 2], found["backbone", 2]
    assert (lists.percentile, lists.two_views, lists.own) == (None, None, None)
    assert plain.percentile is not None and plain.percentile > 50 and 0 <= (plain.two_views or 0) <= 1
    with pytest.raises(Stopped):
        pretrain(tmp_path, "young", "engine.max_steps=2")  # before its first lists
    with pytest.raises(CheckpointError, match="holds no neighbour lists .* name a file of `mls regions` with --region"):
        replay(Run(tmp_path / "young"), [2], ["regions"])


def test_lists_of_a_file_are_used_as_they_are_and_no_others(whole: Run, tmp_path: Path) -> None:
    file = tmp_path / "lists.safetensors"
    lists = NeighbourLists(**neighbours_of(whole))
    lists.save(file)
    given = f"objective.regions.lists={file}"
    with pytest.raises(Stopped):
        pretrain(tmp_path, "given", given, "engine.max_steps=6")
    run = Run(tmp_path / "given")
    assert neighbours_of(run) == {"identity": lists.identity}
    assert not [row for row in run.metrics() if "regions/score" in row]
    replace(lists, identity={**lists.identity, "step": 1}).save(file)
    with pytest.raises(CheckpointError, match="holds other neighbour lists than those that the run began with"):
        mls.resume(run.path, ["engine.max_steps=7"], quiet=True)
    replace(lists, identity={"images": "others"}).save(file)
    with pytest.raises(DataError, match=r"lists.safetensors are not of the images in scenes: bring back the images"):
        pretrain(tmp_path, "again", given)
    assert not (tmp_path / "again").exists()  # nothing was trained
