"""Methods against plain formulas in float64, and against the contract: forward moves nothing, after_step moves once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mls.config import Config
from mls.core import methods
from mls.core.method import gradient_norms
from mls.core.methods.moco import MoCo
from mls.data import Views
from mls.errors import ConfigError
from mls.recipes import load_config

BATCH, SIZE, TAU = 8, 32, 0.2
BASE = [f"data.batch_size={BATCH}", f"dictionary.size={SIZE}", "objective.k=5", "model.projection=16"]


def config_of(*overrides: str) -> Config:
    others = {"objective.method=moco_v2", "objective.method=supervised"} & set(overrides)
    base = [one for one in BASE if not (others and one.startswith("objective.k"))]  # a key that these do not have
    return load_config("mls_scenes_tiny", [*base, "objective.in_batch_negatives=false", *overrides])


def method_of(config: Config, labels: torch.Tensor | None = None) -> MoCo:
    method = methods.build(config, image_labels=labels)
    stream = torch.Generator().manual_seed(1)
    rows = [F.normalize(torch.randn(SIZE, dim, generator=stream), dim=1) for dim in (128, 16)]
    method.dictionary.enqueue(*rows, ids=torch.arange(SIZE), boxes=torch.rand(SIZE, 4, generator=stream))
    return method


def views_of(first_id: int = 100, crops: int = 2) -> Views:
    stream = torch.Generator().manual_seed(2)
    images = [torch.randn(BATCH, 3, 32, 32, generator=stream) for _ in range(crops)]
    boxes = [torch.rand(BATCH, 4, generator=stream) for _ in range(crops)]
    return Views(images, boxes, torch.arange(first_id, first_id + BATCH))


def embeddings(method: MoCo, views: Views) -> list[np.ndarray]:
    """g1, z1, g2, z2 as unit vectors in float64."""
    with torch.no_grad():
        outputs = [*method.pair.query(views.images[0]), *method.pair.key(views.images[1])]
    arrays = [output.double().numpy() for output in outputs]
    return [array / np.linalg.norm(array, axis=1, keepdims=True) for array in arrays]


def plain_info_nce(z1: np.ndarray, z2: np.ndarray, rows: np.ndarray) -> float:
    losses = []
    for query, key in zip(z1, z2, strict=True):
        logits = np.array([query @ key, *(query @ row for row in rows)]) / TAU
        losses.append(-logits[0] + np.log(np.exp(logits).sum()))
    return float(np.mean(losses))


def plain_labels(queries: np.ndarray, rows: np.ndarray, k: int = 5) -> np.ndarray:
    labels = np.zeros((len(queries), len(rows)))
    for i, query in enumerate(queries):
        labels[i, np.argsort(-(rows @ query))[:k]] = 1
    return labels


def memories(method: MoCo) -> tuple[np.ndarray, np.ndarray]:
    rows = method.dictionary.rows()
    return rows.backbone.double().numpy(), rows.projection.double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_moco_loss_equals_the_plain_formula() -> None:
    method, views = method_of(config_of("objective.method=moco_v2")), views_of()
    _, z1, _, z2 = embeddings(method, views)
    assert method(views).loss.item() == pytest.approx(plain_info_nce(z1, z2, memories(method)[1]), abs=1e-5)


@pytest.mark.parametrize("labels_from", ["backbone", "projection", "union", "intersection"])
@pytest.mark.parametrize("classify_with", ["backbone", "projection"])
def test_mls_loss_equals_the_plain_formula(labels_from: str, classify_with: str) -> None:
    config = config_of(f"objective.labels_from={labels_from}", f"objective.classify_with={classify_with}")
    method, views = method_of(config), views_of()
    g1, z1, _, z2 = embeddings(method, views)
    backbone, projection = memories(method)
    by_g, by_z = plain_labels(g1, backbone), plain_labels(z1, projection)
    y = {"backbone": by_g, "projection": by_z, "union": np.maximum(by_g, by_z), "intersection": by_g * by_z}[
        labels_from
    ]
    p = sigmoid((z1 @ projection.T if classify_with == "projection" else g1 @ backbone.T) / TAU)
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert method(views).loss.item() == pytest.approx(plain_info_nce(z1, z2, projection) + 0.5 * bce, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_info_nce_has_a_weight_and_at_zero_the_multi_label_loss_trains_alone(weight: float) -> None:
    config = config_of(f"objective.info_nce_weight={weight}", "objective.warmup_epochs=0")
    method, views = method_of(config), views_of()
    _, z1, _, z2 = embeddings(method, views)
    out = method(views)
    contrast, term = plain_info_nce(z1, z2, memories(method)[1]), 0.5 * out.scalars["loss/multi_label"].item()
    assert out.loss.item() == pytest.approx(weight * contrast + term, abs=1e-5)
    assert out.scalars["loss/info_nce"].item() == pytest.approx(contrast, abs=1e-5)  # logged without its weight
    assert (gradient_norms(out)["info_nce"] > 0) == (weight > 0)
    method.set_progress(step=1, epoch=1, steps_per_epoch=9)
    assert ("nothing is learnt until" in method.introduction()[-1]) == (weight == 0)


def test_a_warm_up_with_info_nce_needs_its_weight() -> None:
    with pytest.raises(ConfigError, match=r"info_nce_weight=0 switches off: set objective.warmup_epochs=0"):
        config_of("objective.info_nce_weight=0", "objective.warmup_epochs=1")


def test_knn_moco_loss_equals_the_plain_formula() -> None:
    method, views = method_of(config_of("objective.method=knn_moco", "objective.weight=0.4")), views_of()
    g1, z1, _, z2 = embeddings(method, views)
    backbone, projection = memories(method)
    y, logits = plain_labels(g1, backbone), z1 @ projection.T / TAU
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = plain_info_nce(z1, z2, projection) - 0.4 * ((y * log_softmax).sum(1) / 5).mean()
    assert method(views).loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalise", ["positives", "balanced"])
def test_normalise_weighs_the_two_sides_as_documented(normalise: str) -> None:
    method, views = method_of(config_of(f"objective.normalise={normalise}")), views_of()
    g1, z1, _, _ = embeddings(method, views)
    backbone, projection = memories(method)
    y, p = plain_labels(g1, backbone), sigmoid(z1 @ projection.T / TAU)
    entries = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    expected = entries.sum(1) / 5
    if normalise == "balanced":
        expected = (entries * y).sum(1) / 5 + (entries * (1 - y)).sum(1) / (SIZE - 5)
    assert method(views).scalars["loss/multi_label"].item() == pytest.approx(expected.mean(), abs=1e-5)


def test_in_batch_negatives_are_the_other_images_keys() -> None:
    method, views = method_of(config_of("objective.method=moco_v2", "objective.in_batch_negatives=true")), views_of()
    _, z1, _, z2 = embeddings(method, views)
    projection = memories(method)[1]
    expected = np.mean(
        [
            plain_info_nce(z1[i : i + 1], z2[i : i + 1], np.vstack([projection, np.delete(z2, i, 0)]))
            for i in range(BATCH)
        ]
    )
    assert method(views).loss.item() == pytest.approx(expected, abs=1e-5)


def test_the_momentum_step_equals_the_plain_formula() -> None:
    method = method_of(config_of("model.momentum=0.9"))
    with torch.no_grad():
        for parameter in method.pair.query.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    before = [p.detach().double().clone() for p in method.pair.key.parameters()]
    query = [p.detach().double().clone() for p in method.pair.query.parameters()]
    method.after_step([])
    for old, online, now in zip(before, query, method.pair.key.parameters(), strict=True):
        assert torch.allclose(now.double(), 0.9 * old + 0.1 * online, atol=1e-6)


def test_forward_moves_nothing_and_after_step_enqueues_once() -> None:
    method, views = method_of(config_of()), views_of()
    before = method.dictionary.state_dict()
    key = [p.clone() for p in method.pair.key.parameters()]
    out = method(views)
    after = method.dictionary.state_dict()
    assert all(
        torch.equal(torch.as_tensor(before[name]).nan_to_num(), torch.as_tensor(after[name]).nan_to_num())
        for name in before
    )
    assert all(torch.equal(a, b) for a, b in zip(key, method.pair.key.parameters(), strict=True))
    out.loss.backward()
    method.after_step([out])
    rows = method.dictionary.rows()
    assert rows.ids[:BATCH].tolist() == views.ids.tolist()
    assert torch.equal(rows.boxes[:BATCH], views.boxes[1])
    assert method.dictionary.count == before["count"] + 1


def test_own_rows_excluded_are_neither_matched_nor_pushed_away() -> None:
    views = views_of(first_id=0)  # images 0..7, which have rows 0..7 in the dictionary
    for overrides in (["objective.method=mls"], ["objective.method=mls", "objective.in_batch_negatives=true"]):
        kept = method_of(config_of(*overrides))
        excluded = method_of(config_of(*overrides, "dictionary.own_rows=exclude"))
        out = excluded(views)
        assert out.matched_ids is not None
        assert not (out.matched_ids == views.ids[:, None]).any()
        assert out.loss.item() != pytest.approx(kept(views).loss.item(), abs=1e-6)
    # The rows of the queries' own images may hold anything: nothing changes.
    plain = method_of(config_of("dictionary.own_rows=exclude"))
    loss = plain(views).loss.item()
    only_own = views_of(first_id=0)
    for i in range(BATCH):
        plain.dictionary.rows().projection[i] = F.normalize(torch.randn(16), dim=0)
    mixed = plain(only_own).loss.item()
    assert mixed != loss  # other queries' rows did change
    single = Views([x[:1] for x in views.images], [b[:1] for b in views.boxes], views.ids[:1])
    first = plain.eval()(single).loss.item()
    plain.dictionary.rows().projection[0] = F.normalize(torch.randn(16), dim=0)
    assert plain(single).loss.item() == pytest.approx(first, abs=1e-6)


def test_no_multi_label_term_before_k_rows_and_during_warm_up() -> None:
    config = config_of()
    method = methods.build(config)
    assert "loss/multi_label" not in method(views_of()).scalars
    method = method_of(config)
    method.warming_up = True
    assert "loss/multi_label" not in method(views_of()).scalars
    method.warming_up = False
    assert "loss/multi_label" in method(views_of()).scalars


def test_small_crops_are_queries_too() -> None:
    method, views = method_of(config_of()), views_of(crops=4)
    small = Views([*views.images[:2], *(x[..., :16, :16] for x in views.images[2:])], views.boxes, views.ids)
    out = method(small)
    parts = [
        method(Views([query, small.images[1]], small.boxes[:2], small.ids)).loss
        for query in (small.images[0], *small.images[2:])
    ]
    assert out.loss.item() == pytest.approx(torch.stack(parts).mean().item(), abs=1e-5)


def test_both_loss_parts_report_how_hard_they_pull() -> None:
    norms = gradient_norms(method_of(config_of())(views_of()))
    assert norms["info_nce"] > 0
    assert norms["multi_label"] > 0
    assert norms["multi_label"] < norms["info_nce"]  # the literal mean over the dictionary (docs/architecture.md)


def test_controls_choose_rows_by_chance_or_by_true_label() -> None:
    labels = torch.eye(4)[torch.arange(200) % 4]
    oracle = method_of(config_of("objective.pseudo_labels=oracle"), labels)
    matched = oracle(views_of(first_id=100)).matched_ids
    assert matched is not None
    assert bool((matched % 4 == (torch.arange(100, 108) % 4)[:, None]).all())
    chance = method_of(config_of("objective.pseudo_labels=random"), labels)(views_of()).matched_ids
    assert chance is not None
    assert not torch.equal(chance, matched)
    mixed = method_of(config_of("objective.pseudo_labels=oracle", "objective.oracle_share=0.5"), labels)(views_of())
    assert mixed.matched_ids is not None
    right = (mixed.matched_ids % 4 == (torch.arange(100, 108) % 4)[:, None]).float().mean()
    assert 0.4 < right < 0.9  # half of them, and a quarter of the other half by chance
    assert all(len(set(rows.tolist())) == len(rows) for rows in mixed.matched_ids)
    with pytest.raises(ConfigError, match="oracle needs images with labels"):
        method_of(config_of("objective.pseudo_labels=oracle"))(views_of())


def test_impossible_objectives_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="weighs single entries, objective.loss=softmax has none"):
        method_of(config_of("objective.loss=softmax", "objective.normalise=balanced"))
    with pytest.raises(ConfigError, match="unknown loss 'bec': did you mean 'bce'"):
        method_of(config_of("objective.loss=bec"))
    with pytest.raises(ConfigError, match="supervised needs images with labels"):
        method_of(config_of("objective.method=supervised"))


def test_supervised_control_learns_from_the_labels() -> None:
    labels = (torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    method, views = method_of(config_of("objective.method=supervised"), labels), views_of()
    first = method(views).loss
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(20):
        loss = method(views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first.item()
