"""The contract of a method, by methods that have little in common with MoCo: they train on the scenes, resume exactly,
and the rest of mls asks them nothing that they do not have."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

import mls
from mls.config import AugmentConfig, ObjectiveConfig
from mls.core import methods
from mls.core.method import Method, StepOutput
from mls.core.methods import moco_v3
from mls.data import View, ViewPlan, Views
from mls.data.augment import Augment
from mls.data.crops import CropDataset
from mls.data.scenes import ScenesSource
from mls.engine.checkpoint import Checkpoints
from mls.engine.gallery import gallery
from mls.errors import CheckpointError, ConfigError, Stopped
from mls.recipes import load_config

ROOT = Path(__file__).parents[2]
PREDICTOR = "objective.predictor=64"
OWN_KEYS = {"simsiam": PREDICTOR, "byol": PREDICTOR, "densecl": "objective.dense_weight=0.5"}
OWN_KEYS["slotcon"] = "objective.hidden=64"
OWN_KEYS["moco_v3"] = "objective.hidden=64 model.backbone=timm:test_vit model.drop_path=0.3 model.freeze_patches=true"
OWN_KEYS["moco_v3"] += " optim.name=adamw engine.checkpointing=true"


def settings(tiny: list[str], method: str) -> list[str]:
    """The tiny recipe without the keys that only mls has."""
    others = [one for one in tiny if not one.startswith("objective.")]
    return [*others, f"objective.method={method}", *OWN_KEYS[method].split()]


@pytest.mark.parametrize("method", OWN_KEYS)
def test_a_method_of_another_kind_trains_and_resumes_exactly(tiny: list[str], method: str) -> None:
    config = [*settings(tiny, method), "monitor.log_every=1", "data.scenes.count=160", "optim.lr=0.05"]
    whole = mls.pretrain(load_config("mls_scenes_tiny", [*config, "run.name=whole"]), quiet=True)
    with pytest.raises(Stopped):
        mls.pretrain(load_config("mls_scenes_tiny", [*config, "run.name=halves", "engine.max_steps=17"]), quiet=True)
    halves = mls.resume(whole.path.with_name("halves"), ["engine.max_steps=null"], quiet=True)
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (whole, halves)]
    assert losses[0] == losses[1]
    if method != "slotcon":  # its targets sharpen while the centre settles: no loss to compare in 30 steps
        assert sum(losses[0][-10:]) < sum(losses[0][4:14])  # of 30 steps; before the fifth few negatives are there
    first, second = (Checkpoints(run.checkpoints, 1).newest() for run in (whole, halves))
    assert first is not None and second is not None
    torch.testing.assert_close(first["method"], second["method"], rtol=0, atol=0, equal_nan=True)
    assert mls.load_backbone(whole.path).feature_dim == (64 if method == "moco_v3" else 128)
    assert any("knn/map" in row for row in whole.metrics())
    with pytest.raises(CheckpointError, match="keeps no crops that could match"):
        gallery(whole)
    assert not (whole.path / "moments").exists()


def test_a_method_without_a_memory_says_nothing_of_one(tiny: list[str]) -> None:
    run = mls.pretrain(load_config("mls_scenes_tiny", settings(tiny, "simsiam")), quiet=True)
    assert not [name for row in run.metrics() for name in row if "dictionary" in name or "labels" in name]


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("own_rows", ["keep", "exclude"])
def test_densecl_equals_the_plain_formula(in_batch: bool, own_rows: str) -> None:
    keys = ["objective.method=densecl", "dictionary.size=32", "data.batch_size=4", "model.projection=16"]
    keys += [f"objective.in_batch_negatives={in_batch}", f"dictionary.own_rows={own_rows}"]
    config = load_config("mls_scenes_tiny", keys)
    method = methods.build(config).eval()
    stream = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(32, dim, generator=stream), dim=1) for dim in (16, 128)]
    method.memories()["dictionary"].enqueue(*rows, ids=torch.arange(32))  # type: ignore[attr-defined]
    views = Views(
        [torch.randn(4, 3, 32, 32, generator=stream) for _ in range(2)], [torch.zeros(4, 4)] * 2, torch.arange(4)
    )
    with torch.no_grad():
        out = method(views)
        (z1, c1, d1, _), (z2, c2, d2, _) = method.pair.query(views.images[0]), method.pair.key(views.images[1])
        # DenseCL's own key of a crop: its cells' projections pooled before they have unit length.
        maps = method.pair.key.dense_head(method.pair.key.encoder.spatial(views.images[1])[2])
    pooled, expected, count = F.normalize(maps.mean((2, 3)), dim=1), 0.0, 0.0
    torch.testing.assert_close(out.keys["dense"], pooled)
    for image in range(4):
        held = [row for row in range(32) if row != image or own_rows == "keep"]  # row i is of image i
        others = [other for other in range(4) if other != image and in_batch]
        whole, dense = (torch.cat([rows[n][held], keys[others]]) for n, keys in ((0, z2), (1, pooled)))
        logits = torch.cat([(z1[image] @ z2[image])[None], whole @ z1[image]]) / 0.2
        expected += 0.5 * -logits.log_softmax(0)[0].item() / 4
        count += math.log(len(logits)) / 4
        cells = len(c1[image])
        for cell in range(cells):
            match = int((c2[image] @ c1[image, cell]).argmax())
            logits = torch.cat([(d1[image, cell] @ d2[image, match])[None], dense @ d1[image, cell]]) / 0.2
            expected += 0.5 * -logits.log_softmax(0)[0].item() / (4 * cells)
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    assert out.scalars["chance/info_nce"].item() == out.scalars["chance/dense"].item() == pytest.approx(count, abs=1e-6)


def test_slotcon_equals_the_official_steps_in_plain_loops() -> None:
    """models/slotcon.py of CVMI-Lab/SlotCon at 30ff33d, restated for one process: grouping on the overlap, turned back
    where the crop was flipped, the slots' InfoNCE among those that are present, the key's momentum and the centre."""
    keys = ["objective.method=slotcon", "objective.prototypes=6", "objective.hidden=32", "model.projection=16"]
    method = methods.build(load_config("mls_scenes_tiny", [*keys, "augment.flip=0.5"]))
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.pair.key.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=stream))
        method.centre.copy_(0.1 * torch.randn(6, generator=stream))
    corners = torch.tensor([[[0, 0, 0.8, 0.8], [0.1, 0, 1, 0.7]], [[0.2, 0.1, 1, 1], [0, 0.25, 0.75, 1]]])
    views = Views(
        [torch.randn(2, 3, 32, 32, generator=stream) for _ in range(2)],
        list(corners),
        torch.arange(2),
        [torch.tensor([True, False]), torch.tensor([False, True])],
    )
    method.predictor.eval()  # its batch would be the slots that are present
    with torch.no_grad():
        out = method(views)
        sides = {"q": [method.pair.query(x) for x in views.images], "k": [method.pair.key(x) for x in views.images]}

    def turned_back(dots: torch.Tensor, view: int, image: int) -> torch.Tensor:
        (ax, ay, bx, by), (cx, cy, dx, dy) = corners[view, image].tolist(), corners[1 - view, image].tolist()
        x0, x1 = (max(ax, cx) - ax) / (bx - ax), (min(bx, dx) - ax) / (bx - ax)
        y0, y1 = (max(ay, cy) - ay) / (by - ay), (min(by, dy) - ay) / (by - ay)
        if views.flips[view][image]:
            x0, x1 = 1 - x1, 1 - x0
        height, width = dots.shape[1:]
        roi = torch.tensor([[0, x0 * width, y0 * height, x1 * width, y1 * height]])
        found = roi_align(dots[None], roi, (height, width), aligned=True)[0]
        return found.flip(-1) if views.flips[view][image] else found

    expected = 0.0
    for one, other in ((0, 1), (1, 0)):
        (q, dots_q), (k, dots_k) = sides["q"][one], sides["k"][other]
        terms = []
        for image in range(2):
            student = turned_back(dots_q[image], one, image).flatten(1).T / 0.1  # [cells, prototypes]
            teacher = (turned_back(dots_k[image], other, image).flatten(1).T - method.centre) / 0.07
            terms += [-(b.softmax(0) * a.log_softmax(0)).sum().item() for a, b in zip(student, teacher, strict=True)]
        expected += 0.5 * sum(terms) / len(terms)
        there = [{(i, int(p)) for i in range(2) for p in dots[i].argmax(0).unique()} for dots in (dots_q, dots_k)]
        rows = sorted(there[1])
        terms = []
        for image, slot in sorted(there[0] & there[1]):
            predicted = F.normalize(method.predictor(q[image, slot][None]), dim=1)[0].detach()
            logits = torch.stack([predicted @ F.normalize(k[i, p], dim=0) for i, p in rows]) / 0.2
            terms.append(-logits.log_softmax(0)[rows.index((image, slot))].item())
        expected += 0.5 * 0.4 * sum(terms) / len(terms)
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)

    centre = method.centre.clone()
    query, key = (side.head[0].weight.clone() for side in (method.pair.query, method.pair.key))
    method.after_step([out])
    torch.testing.assert_close(method.pair.key.head[0].weight, key + (query - key) * (1 - method.momentum))
    dots = torch.cat([sides["k"][0][1], sides["k"][1][1]])
    torch.testing.assert_close(method.centre, 0.9 * centre + 0.1 * dots.mean((0, 2, 3)))


def test_moco_v3_equals_the_official_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """moco/builder.py of facebookresearch/moco-v3 restated, for the second of two processes: labels count on from the
    first one's keys."""
    config = load_config("mls_scenes_tiny", ["objective.method=moco_v3", "objective.hidden=32", "model.projection=16"])
    method, stream = methods.build(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.pair.key.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=stream))
    others = F.normalize(torch.randn(4, 16, generator=stream), dim=1)
    monkeypatch.setattr(moco_v3, "gather", lambda keys: [torch.cat([others, key]) for key in keys])
    monkeypatch.setattr(moco_v3, "rank", lambda: 1)
    images = [torch.randn(4, 3, 32, 32, generator=stream) for _ in range(2)]
    loss = method(Views(images, [torch.zeros(4, 4)] * 2, torch.arange(4))).loss

    def contrastive_loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = F.normalize(q, dim=1), torch.cat([others, F.normalize(k, dim=1)])
        logits = torch.einsum("nc,mc->nm", q, k) / 0.2
        labels = torch.arange(len(q), dtype=torch.long) + len(q) * 1
        return torch.nn.CrossEntropyLoss()(logits, labels) * (2 * 0.2)

    q1, q2 = (method.predictor(method.pair.query(x)[1]) for x in images)
    k1, k2 = (method.pair.key(x)[1].detach() for x in images)
    assert loss.item() == pytest.approx((contrastive_loss(q1, k2) + contrastive_loss(q2, k1)).item(), abs=1e-6)
    loss.backward()
    learnt = {
        name.partition(".")[0] for name, parameter in method.pair.named_parameters() if parameter.grad is not None
    }
    assert learnt == {"query"}


@pytest.mark.parametrize("method", ["simsiam", "byol", "moco_v3", "densecl", "slotcon"])
def test_small_crops_are_refused_where_they_would_be_cut_and_never_used(method: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.method={method} takes two crops: use augment.small_crops=0"):
        load_config("mls_scenes_tiny", [f"objective.method={method}", "augment.small_crops=2"])


def test_moco_v3_names_the_keys_of_the_model_that_it_does_not_use() -> None:
    config = load_config("mls_scenes_tiny", ["objective.method=moco_v3", "objective.hidden=32", "model.key_norm=split"])
    (sentence,) = methods.build(config).introduction()
    assert "not used by moco_v3: model.hidden, model.head_norm, model.key_norm (" in sentence
    with torch.device("meta"):
        assert methods.build(load_config("moco_v3_scenes_vit")).introduction() == []


def test_a_key_of_another_method_is_refused_and_a_recipe_s_are_left_out() -> None:
    with pytest.raises(
        ConfigError, match=r"moco_v2 has no objective.k \(the command line\): it is a key of knn_moco, mls"
    ):
        load_config("moco_v2_scenes_tiny", ["objective.k=5"])
    with pytest.raises(ConfigError, match=r"unknown objective.method 'simsaim': did you mean 'simsiam'\?"):
        load_config("mls_scenes_tiny", ["objective.method=simsaim"])
    other = load_config("em_scenes_tiny", ["objective.method=simsiam"])  # objective.loss was the recipe's for mls
    assert set(vars(other.objective)) == {"method", "predictor"}


def test_views_are_cut_and_placed_as_the_plan_says() -> None:
    augment = AugmentConfig(size=32, flip=0.5, jitter=0, grey=0, blur=0, small_crops=1, small_size=16)
    plan = ViewPlan.crops(augment, positions=True).with_grid(2, 2, size=8).with_windows(3, 12, (0.1, 0.2))
    assert [view.size for view in plan.views] == [32, 32, 16, 8, 8, 8, 8, 12, 12, 12]
    source = ScenesSource(load_config("mls_scenes_tiny").data.scenes)
    batch = CropDataset(source, augment, seed=0, plan=plan).__getitems__([(1, i) for i in range(8)])
    plain = CropDataset(source, augment, seed=0).__getitems__([(1, i) for i in range(8)])
    assert all(torch.equal(one, other) for one, other in zip(plain.crops, batch.crops[:3], strict=True))
    quarters = [box[0].tolist() for box in batch.boxes[3:7]]
    assert quarters == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    views = Augment(augment, 0, "cpu", positions=True)(batch)
    assert {bool(flip) for flip in views.flips[0]} == {True, False}
    # A pixel of a view, found where `positions` says it lies in the image.
    pictures = torch.stack([torch.as_tensor(source.read(i)) for i in range(8)]).float()
    place = 2 * views.positions(3, 8, 8) - 1  # [images, cells, 2]
    expected = F.grid_sample(pictures / 255, place[:, None], align_corners=False)[:, :, 0]
    mean, std = (torch.tensor(values)[:, None] for values in (augment.mean, augment.std))
    found = views.images[3].flatten(2) * std + mean
    assert (found - expected).abs().mean() < 0.12 < (found.flip(2) - expected).abs().mean()


def test_a_method_gets_the_views_that_it_asks_for(tiny: list[str]) -> None:
    seen: list[list[int]] = []

    class Options(ObjectiveConfig):
        pass

    @methods.register("windows_only", Options)
    class WindowsOnly(methods.find("simsiam")):  # type: ignore[misc]
        def __init__(self, config, precision="fp32", image_labels=None) -> None:  # type: ignore[no-untyped-def]
            from dataclasses import replace

            from mls.config import SimSiamOptions

            super().__init__(replace(config, objective=SimSiamOptions(predictor=32)), precision, image_labels)

        def views(self) -> ViewPlan:
            return ViewPlan((View(16, (0.1, 0.3)),) * 2, positions=True)

        def forward(self, views: Views) -> StepOutput:
            seen.append([*(len(image[0, 0]) for image in views.images), len(views.flips)])
            return super().forward(views)

    rest = [one for one in tiny if not one.startswith("objective.")]
    try:
        run = mls.pretrain(
            load_config("mls_scenes_tiny", [*rest, "objective.method=windows_only", "optim.epochs=1"]), quiet=True
        )
    finally:
        from mls.config import OBJECTIVES

        del OBJECTIVES["windows_only"], methods.METHODS["windows_only"]
    assert run.done
    assert set(map(tuple, seen)) == {(16, 16, 2)}


def test_nothing_around_the_methods_imports_one_or_asks_for_its_class() -> None:
    files = [*ROOT.glob("mls/engine/*.py"), *ROOT.glob("mls/monitor/*.py")]
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("mls.core.methods."), file
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "method"
            ):
                assert node.attr in {*dir(Method), "items", "method"}, f"{file}: method.{node.attr}"
