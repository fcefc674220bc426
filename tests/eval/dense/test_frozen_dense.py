"""Protocols on frozen maps: what is computed on patches equals plain restatements, and a cell goes through."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mls.core import matching
from mls.errors import ConfigError, DataError
from mls.eval import cells, data, load_protocol
from mls.eval.dense import maps as extraction
from mls.eval.dense.prepare import load_images
from mls.eval.protocol import fingerprint
from mls.frozen import discovery, patches
from mls.frozen.confusion import confusion, segmentation_metrics
from mls.frozen.probe import linear_probe
from mls.models.spatial import dense_features

EXACT = "donot_use_mm_for_euclid_dist"
FEW = ["data.scenes.count=48", "data.scenes.test_count=24", "features.device=cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("keys", "before"),
    [
        (["probe.solver=lbfgs"], "62b1206b0313"),
        (["probe.solver=lbfgs", "probe.first=null"], "62b1206b0313"),
        (["probe.first=null"], "fab7542cc746"),
    ],
)
def test_a_fit_that_the_first_epochs_do_not_choose_for_keeps_its_stored_results(keys: list[str], before: str) -> None:
    """Fingerprints are those of the program that had no `probe.first`."""
    assert fingerprint(load_protocol("dense_linear_scenes", keys)) == before
    assert fingerprint(load_protocol("dense_linear_scenes")) != before


def test_a_mask_of_which_pixels_are_left_out_has_results_of_its_own() -> None:
    """Fingerprints are those of the program that took the pixel at the floor."""
    assert fingerprint(load_protocol("dense_knn_scenes", ["data.size=[64,64]"])) == "2fcaee9d3055"
    assert fingerprint(load_protocol("dense_knn_scenes", ["data.size=[48,64]"])) != "fdd09a0ac2fa"
    assert fingerprint(load_protocol("dense_knn_camvid")) != "2f2e0d63260d"
    assert fingerprint(load_protocol("objects_scenes", ["data.size=[48,64]"])) == "f6575a0419b1"


def hummingbird(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, side: int, k: int) -> torch.Tensor:
    """open-hummingbird-eval (hbird_eval.py), step by step: `_create_memory`, `_find_nearest_key_to_query`,
    `_cross_attention`, `evaluate`. Maps are [images, dim, rows, columns], labels [images, height, width]."""
    classes, rows = int(labels.max()) + 1, train.shape[2]
    features = train.flatten(2).transpose(1, 2)
    memory = (features / torch.norm(features, dim=2, keepdim=True)).flatten(0, 1)
    cut = labels.reshape(len(labels), rows, side, rows, side).permute(0, 1, 3, 2, 4).flatten(3)
    label_memory = F.one_hot(cut.long(), classes).float().mean(3).flatten(0, 2)
    found = []
    for one in test:
        query = one.flatten(1).T
        nearest = (query @ memory.T).topk(k, dim=1).indices
        q, keys = F.normalize(query, dim=-1), F.normalize(memory[nearest], dim=-1)
        attention = F.softmax(torch.bmm(q[:, None], keys.transpose(1, 2))[:, 0] / 0.02, dim=-1)
        label = torch.bmm(attention[:, None], label_memory[nearest])[:, 0]
        label = label.reshape(1, rows, rows, classes).permute(0, 3, 1, 2)
        found.append(F.interpolate(label, size=labels.shape[1:], mode="bilinear").argmax(1)[0])
    return torch.stack(found)


def test_segmentation_in_context_is_open_hummingbirds(tmp_path: Path) -> None:
    protocol = load_protocol("dense_knn_scenes", [*FEW, "features.store=fp32", "probe.k=[5]", "probe.shares=[1.0]"])
    found = cells.run(protocol, "resnet_tiny", root=tmp_path, quiet=True)
    images = load_images(protocol)
    torch.manual_seed(0)
    extractor = extraction.Extractor(protocol, "resnet_tiny", 0, images.train)
    train, test = (extractor.of(part, "", True) for part in (images.train, images.test))
    labels = torch.stack([train.labels(row) for row in range(48)])
    predicted = hummingbird(train.of(slice(None)), labels, test.of(slice(None)), 64 // train.grid[0], 5)
    classes = len(images.train.class_names)
    counts = torch.stack([confusion(one, test.labels(row), classes) for row, one in enumerate(predicted)]).sum(0)
    for name, value in segmentation_metrics(counts).items():
        assert found[name] == pytest.approx(value, abs=2e-3), name  # our memory is in fp16


def test_a_bounded_memory_takes_the_patches_that_open_hummingbird_takes() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (1, 4, 4), generator=draws).repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    shares = patches.patch_labels(labels, (8, 8), 5)[0].flatten(0, 1)
    present = torch.stack([shares[:, one] > 0 for one in range(5)], dim=1)
    frequency = present.sum(0)
    noise = torch.rand(64, generator=torch.Generator().manual_seed(1))
    scores = torch.stack([frequency[row].sum() * one for row, one in zip(present, noise, strict=True)])
    expected = set(scores.argsort()[:10].tolist())
    assert set(patches.drawn_patches(shares, 10, torch.Generator().manual_seed(1)).tolist()) == expected


def test_void_pixels_belong_to_no_class_and_no_test() -> None:
    labels = torch.tensor([[[0, 1, 255, 255], [0, 0, 255, 255]]], dtype=torch.uint8)
    assert patches.patch_labels(labels, (1, 2), 2)[0, 0].tolist() == [[0.75, 0.25], [0, 0]]
    features, numbers = patches.pixels_of(torch.rand(1, 3, 1, 2), labels, 50, torch.Generator().manual_seed(0))
    assert features.shape == (50, 3)
    assert set(numbers.tolist()) == {0, 1}


def test_the_linear_probe_is_scikit_learns_logistic_regression_on_pixels() -> None:
    draws = torch.Generator().manual_seed(0)
    maps = torch.randn(12, 6, 4, 6, generator=draws)
    wide = F.interpolate(maps, (16, 24), mode="bilinear")
    labels = wide[:, :3].argmax(1).byte()  # the same where clamping makes pixels of a corner equal
    features, numbers = patches.pixels_of(maps, labels, 100, torch.Generator().manual_seed(1))
    plain, truth = wide.permute(0, 2, 3, 1).flatten(1, 2), labels.flatten(1)
    for image in range(12):  # every drawn pixel is one of the interpolated map, with its class
        part = slice(100 * image, 100 * (image + 1))
        distance, place = torch.cdist(features[part], plain[image], compute_mode=EXACT).min(dim=1)
        assert distance.max() < 1e-5
        assert torch.equal(truth[image][place].long(), numbers[part])
    ours = linear_probe(features, numbers, features[:1], l2=[1e-3], tolerance=1e-9, validation=(features, numbers))
    mean, std = features.mean(0), features.std(0, correction=0)
    theirs = LogisticRegression(C=1 / (2 * 1e-3 * len(features)), tol=1e-8, max_iter=1000)
    theirs.fit(((features - mean) / std).numpy(), numbers.numpy())
    scores = torch.einsum("ndhw,dc->nchw", maps, ours.weight.float()) + ours.bias.float()[:, None, None]
    dense = F.interpolate(scores, (16, 24), mode="bilinear").softmax(1)
    on_pixels = theirs.predict_proba(((plain.flatten(0, 1) - mean) / std).numpy())
    expected = torch.from_numpy(on_pixels).float().view(12, 16, 24, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(dense, expected, atol=5e-3, rtol=0)


def test_clusters_are_named_so_that_no_other_assignment_has_more_overlap() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = torch.randint(0, 50, (4, 6), generator=draws)
        iou = counts / (counts.sum(0) + counts.sum(1, keepdim=True) - counts)
        best = max(
            sum(float(iou[row, column]) for row, column in enumerate(columns))
            for columns in itertools.permutations(range(6), 4)
        )
        found = patches.assignment(counts, "hungarian")
        assert sum(float(iou[one, column]) for column, one in enumerate(found.tolist()) if one < 4) == pytest.approx(
            best
        )
        merged = patches.merged(counts, found)
        assert merged.sum() == counts.sum()
        assert merged[:, 4].sum() == counts[:, found == 4].sum()  # clusters without a class are missed pixels
        by_majority = patches.merged(counts, patches.assignment(counts, "majority"))
        assert segmentation_metrics(by_majority)["aacc"] == pytest.approx(float(counts.amax(0).sum() / counts.sum()))


@pytest.mark.parametrize("task", ["knn", "linear", "cluster"])
def test_a_cell_reads_maps_that_are_stored(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [*FEW, "probe.pixels=2000", "probe.epochs=2", "probe.clusters=[0,20]", "probe.k=[5]"]
    protocol = load_protocol(f"dense_{task}_scenes", few if task != "knn" else [*few, "probe.memory=480"])
    first = cells.run(protocol, "resnet_tiny", root=tmp_path / "first", quiet=True)
    assert {"miou", "macc", "aacc"} <= first.keys()
    assert all(0 <= value <= 1 for value in first.values())
    monkeypatch.setattr(extraction, "in_workers", lambda *_: pytest.fail("maps were computed again"))
    assert cells.run(protocol, "resnet_tiny", root=tmp_path / "second", quiet=True) == first


def test_stored_maps_are_the_networks_and_go_on_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "BLOCK", 10)
    protocol = load_protocol("dense_knn_scenes", [*FEW, "features.batch_size=7", "features.layer=layer2"])
    images = load_images(protocol).test
    extractor = extraction.Extractor(protocol, "resnet_tiny", 0, images)
    real, calls = extractor._images, []

    def stops(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(extractor, "_images", stops)
    with pytest.raises(KeyboardInterrupt):
        extractor.of(images, "", True)
    maps = extractor.of(images, "", True)
    assert calls[3:] == [7, 7]  # the first ten images were stored
    pixels = extraction.SquashedImages(images, (64, 64), 24)[0]
    with torch.no_grad():
        expected = dense_features(extractor.network.backbone, real(pixels), "layer2")
    assert maps.features.dtype == torch.float16
    torch.testing.assert_close(maps.of(slice(None)), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("published", [True, False], ids=["SegNet's folders", "images and masks"])
def test_camvid_is_read(published: bool, tmp_path: Path) -> None:
    for phase in ("train", "val", "test"):
        inside, masks = (phase, f"{phase}annot") if published else (f"images/{phase}", f"masks/{phase}")
        for folder in (tmp_path / inside, tmp_path / masks):
            folder.mkdir(parents=True)
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / inside / "a.png")
        Image.fromarray(np.full((6, 8), 11 if phase == "val" else 10, np.uint8)).save(tmp_path / masks / "a.png")
    found = data.build("camvid", tmp_path, check_sizes=False)
    assert found.train.labels(0).unique().tolist() == [10]
    assert found.val is not None
    assert found.val.labels(0).unique().tolist() == [255]
    assert found.train.class_names[found.train.labels(0)[0, 0]] == "bicyclist"
    Image.fromarray(np.full((6, 8), 12, np.uint8)).save(
        tmp_path / ("testannot" if published else "masks/test") / "a.png"
    )
    with pytest.raises(DataError, match="48 pixels of unknown classes, such as 12"):
        found.test.labels(0)


def test_one_search_answers_for_every_k_and_temperature() -> None:
    draws = torch.Generator().manual_seed(0)
    queries, memory = (F.normalize(torch.randn(n, 8, generator=draws), dim=1) for n in (5, 40))
    shares = torch.rand(40, 3, generator=draws)
    build = matching.build
    both = patches.in_context(queries, memory, shares, [3, 9], [0.02, 0.1], build("torch"))
    assert len(both) == 4
    for (k, temperature), votes in both.items():
        alone = patches.in_context(queries, memory, shares, [k], [temperature], build("faiss"))
        torch.testing.assert_close(votes, alone[k, temperature])


@pytest.mark.parametrize("how", ["lost", "tokencut"])
def test_the_one_object_of_a_map_is_found_whatever_its_place(how: str) -> None:
    draws = torch.Generator().manual_seed(0)
    for top, left in ((1, 2), (5, 0), (3, 6)):
        maps = 0.1 * torch.randn(4, 10, 12, generator=draws)
        maps[0] += 1
        maps[:, top : top + 3, left : left + 4] += torch.tensor([-2.0, 1, 0, 0]).view(4, 1, 1)
        found = getattr(discovery, how)(maps)
        expected = torch.zeros(10, 12, dtype=torch.bool)
        expected[top : top + 3, left : left + 4] = True
        assert torch.equal(found, expected)
        assert discovery.box_of(found).tolist() == pytest.approx([left / 12, top / 10, (left + 4) / 12, (top + 3) / 10])


@pytest.mark.parametrize("how", ["lost", "tokencut"])
def test_objects_are_discovered_in_a_cell(how: str, tmp_path: Path) -> None:
    protocol = load_protocol("objects_scenes", [*FEW, f"probe.discovery={how}"])
    found = cells.run(protocol, "resnet_tiny", root=tmp_path, quiet=True)
    assert 0 <= found["corloc"] <= 1
    assert found["best_iou"] > 0


def test_a_mask_is_judged_as_tokencuts_code_judges_it() -> None:
    """metric.py: `IoU`, `accuracy`, `precision_recall` and `F_score`."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask, truth = torch.rand(2, 9, 7, generator=draws) > torch.rand(1, generator=draws)
        truth[0, 0] = True
        iou = (mask * (mask == truth)).sum() / (mask + truth).sum()
        precision = (truth * (truth == mask)).sum() / mask.sum() if mask.any() else 1.0
        recall = (truth * (truth == mask)).sum() / truth.sum()
        f_beta = (1 + 0.3) * precision * recall / (0.3 * precision + recall) if recall else 0.0
        expected = {"iou": iou, "accuracy": (mask == truth).float().mean(), "f_beta": f_beta}
        found = discovery.overlap(mask.flatten(), truth.flatten())
        assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


SALIENT = {
    "ecssd": [("images", "ground_truth_mask")] * 2,
    "dut_omron": [("DUT-OMRON-image", "pixelwiseGT-new-PNG")] * 2,
    "duts": [(f"DUTS-{one}/DUTS-{one}-Image", f"DUTS-{one}/DUTS-{one}-Mask") for one in ("TR", "TE")],
}


@pytest.mark.parametrize("name", SALIENT)
def test_salient_objects_are_read_and_found(name: str, tmp_path: Path) -> None:
    """A bright object on a dark ground, its mask with soft edges, in one file of three channels."""
    for images, masks in SALIENT[name]:
        for folder in (images, masks):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            mask = np.zeros((40, 60), np.uint8)
            mask[8:30, 10 * number : 10 * number + 30], mask[30] = 255, 100
            Image.fromarray(np.stack([mask] * 3, 2)).save(tmp_path / images / f"{number}.jpg", quality=95)
            Image.fromarray(mask).convert("RGB" if number else "L").save(tmp_path / masks / f"{number}.png")
    found = data.build(name, tmp_path, check_sizes=False)
    assert found.test.class_names == ["background", "salient"]
    assert [int(found.test.labels(row).sum()) for row in range(3)] == [22 * 30] * 3
    here = [f"data.name={name}", f"data.root={tmp_path}", "data.check_sizes=false", "features.device=cpu"]
    protocol = load_protocol("saliency_scenes", [*here, "features.layer=layer1", "data.size=[48,48]"])
    values = cells.run(protocol, "resnet_tiny", root=tmp_path / "runs", quiet=True)
    assert values["iou"] > values["iou_centre"] > 0.3 and values["accuracy"] > 0.8 and values["f_beta"] > 0.5
    if name != "duts":
        with pytest.raises(DataError, match=f"{name} has no training images, and task dense_knn learns from some"):
            load_images(load_protocol("dense_knn", here))
    (tmp_path / SALIENT[name][1][1] / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2.png cannot be read .*unpack the annotations again"):
        found.test.labels(2)


def test_saliency_needs_a_background(tmp_path: Path) -> None:
    here = [f"data.root={tmp_path}", "data.check_sizes=false"]
    for phase in ("train", "val", "test"):
        for folder in (f"images/{phase}", f"masks/{phase}"):
            (tmp_path / folder).mkdir(parents=True)
            Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match="and that of camvid is sky, no background or ground"):
        load_images(load_protocol("saliency_scenes", ["data.name=camvid", *here]))


def test_a_task_of_pixels_refuses_boxes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task dense_knn cannot use scenes_objects"):
        cells.run(load_protocol("dense_knn_scenes", ["data.name=scenes_objects"]), "resnet_tiny", root=tmp_path)
    with pytest.raises(DataError, match="task objects cannot use scenes_regions"):
        cells.run(load_protocol("objects_scenes", ["data.name=scenes_regions"]), "resnet_tiny", root=tmp_path)


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("saliency_scenes", ["data.size=[4,4]"], "TokenCut cuts maps of two places or more"),
        ("dense_linear_scenes", ["data.images=1"], "all 1 training images are held out"),
        ("dense_cluster_scenes", ["probe.clusters=[500]"], "500 clusters need as many patches, there are 160"),
        ("dense_knn_scenes", ["data.size=[1,1]"], "data.size"),
    ],
)
def test_too_little_is_one_sentence(task: str, keys: list[str], message: str, tmp_path: Path) -> None:
    few = ["data.scenes.count=20", "data.scenes.test_count=10", "data.size=[32,32]"]
    with pytest.raises(ConfigError, match=message):
        cells.run(load_protocol(task, [*few, *keys]), "resnet_tiny", root=tmp_path)


def test_more_clusters_than_patches_are_left_out_and_said(tmp_path: Path) -> None:
    few = ["data.scenes.count=20", "data.scenes.test_count=10", "data.size=[32,32]"]
    values = cells.run(load_protocol("dense_cluster_scenes", few), "resnet_tiny", root=tmp_path)
    assert not [name for name in values if name.endswith("_500")] and "miou" in values
    assert "[500] clusters left out, there are 160 patches" in (tmp_path / "results.jsonl").read_text()
