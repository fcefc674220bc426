"""Fine-tuning in the supervised loop: images of one class, rates by layer, what stays frozen, mixed images, and that
all of it resumes. On a few embedded scenes; the class of one is a digit that is in it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mls.config import ScenesConfig
from mls.errors import ConfigError
from mls.eval import load_protocol
from mls.eval.classifier import build_classifier
from mls.eval.data import LabelledImages, scenes
from mls.eval.images import Batches, mixing
from mls.eval.optimizer import lr_share, stages
from mls.eval.protocol import Supervised, TrainingConfig
from mls.eval.training import Training
from mls.models import load_backbone
from mls.models.backbones import Block

SMALL = ["training.epochs=3", "training.batch_size=16", "training.select=last", "data.workers=0"]
IMAGES = scenes.read(Path(), ScenesConfig(count=40, test_count=8)).train
ONE_CLASS = replace(IMAGES, truth=IMAGES.truth.argmax(dim=1))


def protocol(*overrides: str) -> Supervised:
    return load_protocol("spml_scenes", [*SMALL, *overrides])


def training(
    *overrides: str, images: LabelledImages = ONE_CLASS, folder: Path | None = None, network: str = "resnet_tiny"
) -> Training:
    wanted = ["training.loss=softmax", *overrides] if images.single_label else overrides
    classifier = build_classifier(network, classes=10)
    return Training(protocol(*wanted), classifier, images, images.truth, lambda _: {}, 0, folder)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    return {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}


# --------------------------------------------------------------------------------------------------- one class an image


def test_softmax_on_images_of_one_class_is_cross_entropy() -> None:
    one, rows = training(), torch.tensor([3, 0, 7, 5])
    outputs = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss, expected = one.loss_of(outputs, rows), F.cross_entropy(outputs, ONE_CLASS.truth[rows])
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, outputs)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_class_number_becomes_one_positive_among_known_negatives() -> None:
    labels = training().labels_of(torch.arange(40))
    assert labels.dtype == torch.int8
    assert torch.equal(labels.argmax(dim=1), ONE_CLASS.truth)
    assert ((labels == 1).sum(dim=1) == 1).all() and ((labels == -1).sum(dim=1) == 9).all()


def test_class_numbers_train_to_the_same_weights_as_the_matrix_they_stand_for() -> None:
    matrix = training().labels_of(torch.arange(40))
    numbers, rows = training(), training("training.loss=softmax", images=replace(IMAGES, truth=matrix))
    for one in (numbers, rows):
        one.train(quiet=True)
    assert numbers.history == rows.history
    assert not changed(state(numbers.classifier), rows.classifier)


def test_scores_of_images_of_one_class_do_not_tie_where_their_probabilities_would() -> None:
    one = training()
    one.classifier.head.weight.data.mul_(1000.0)
    scores = one.scores()
    assert (torch.sigmoid(scores) == 1).sum(dim=1).max() > 1
    assert all(len(row.unique()) == 10 for row in scores)


@pytest.mark.parametrize("loss", ["role", "ll_cp", "em_apl"])
def test_losses_that_complete_labels_refuse_images_of_one_class_and_mixed_images(loss: str) -> None:
    changes = [f"training.loss={loss}", "training.pseudo_from=1"]
    with pytest.raises(ConfigError, match=rf"training.loss={loss} .* just one class, .* use training.loss=softmax"):
        training(*changes)
    with pytest.raises(ConfigError, match=rf"training.loss={loss} .* set training.mixup=0"):
        training(*changes, "training.mixup=0.2", images=IMAGES)


# ---------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("network", "first"),
    [
        ("resnet_tiny", ["conv1", "layer1", "layer2", "layer3"]),
        ("resnet50", ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("random:timm:resnet18", ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("scratch:vit_b_32", ["class_token", *(f"encoder.layers.encoder_layer_{block}." for block in range(12))]),
        ("random:timm:vit_tiny_patch16_224", ["cls_token", *(f"blocks.{block}." for block in range(12))]),
        ("random:timm:convnext_atto", ["stem", *(f"stages.{stage}." for stage in range(4))]),
    ],
)
def test_stages_of_a_network_begin_where_its_authors_begin_them(network: str, first: list[str]) -> None:
    if "timm:" in network:
        pytest.importorskip("timm")
    with torch.device("meta"):
        backbone = load_backbone(network)
    found = stages(backbone)
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    assert len(found) == len(first)
    assert all(names[stage[0]].startswith(name) for stage, name in zip(found, first, strict=True))
    assert sorted(names[parameter] for stage in found for parameter in stage) == sorted(names.values())


def test_each_stage_learns_slower_than_the_one_after_it_and_the_head_by_its_own_factor() -> None:
    one = training("training.layer_decay=0.5", "training.head_lr=10", "training.lr=0.1", "training.optimizer=sgd")
    rate = {parameter: group["lr"] for group in one.optimizer.param_groups for parameter in group["params"]}
    backbone = one.classifier.backbone
    found = [rate[part.weight] for part in (backbone.conv1, backbone.bn1, backbone.layer1.conv1, backbone.layer3.bn2)]
    assert found == pytest.approx([0.1 / 16, 0.1 / 16, 0.1 / 8, 0.1 / 2])
    assert rate[one.classifier.head.weight] == rate[one.classifier.head.bias] == pytest.approx(1.0)
    assert set(rate) == set(one.classifier.parameters())


def test_weight_decay_is_on_all_parameters() -> None:
    one = training("training.weight_decay=0.01", "training.layer_decay=0.9")
    assert {group["weight_decay"] for group in one.optimizer.param_groups} == {0.01}


@given(
    st.sampled_from(["constant", "cosine", "steps"]),
    st.integers(1, 6),
    st.integers(1, 5),
    st.floats(0, 1),
    st.lists(st.integers(1, 6), max_size=3),
)
def test_every_schedule_warms_up_and_never_rises_again(
    schedule: str, epochs: int, steps_per_epoch: int, part: float, falls: list[int]
) -> None:
    config = TrainingConfig(epochs=epochs, schedule=schedule, warmup_epochs=part * epochs, steps=falls)
    shares = [lr_share(config, step, steps_per_epoch) for step in range(1, epochs * steps_per_epoch + 1)]
    warmup = round(part * epochs * steps_per_epoch)
    assert shares[:warmup] == [step / warmup for step in range(1, warmup + 1)]
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert all(0 <= share <= 1 for share in shares)
    if schedule == "constant":
        assert set(shares[warmup:]) <= {1.0}


def test_steps_divide_the_rate_by_ten_after_the_epochs_named() -> None:
    one = training("training.schedule=steps", "training.steps=[1,2]", "training.lr=0.1", "training.warmup_epochs=0.67")
    rates: list[float] = []
    step = one.train_step

    def watched(rows: Tensor, views: Tensor) -> Tensor:
        loss = step(rows, views)
        rates.append(one.optimizer.param_groups[0]["lr"])
        return loss

    one.train_step = watched  # type: ignore[method-assign]
    one.train(quiet=True)
    assert rates == pytest.approx([0.05, 0.1, 0.1, *[0.01] * 3, *[0.001] * 3])


# ----------------------------------------------------------------------------------------------------------- what stays


def test_train_head_leaves_the_backbone_and_its_statistics_as_they_were() -> None:
    one = training("training.train=head", "training.optimizer=sgd", "training.lr=30", "training.weight_penalty=l2")
    before = state(one.classifier)
    one.train(quiet=True)
    assert changed(before, one.classifier) == {"head.weight", "head.bias"}
    assert all(parameter.grad is None for parameter in one.classifier.backbone.parameters())


def test_train_head_trains_on_the_features_that_a_test_sees() -> None:
    one = training("training.train=head")
    _, views = next(one.batches.plain())
    one.classifier.train()
    features = one.classifier.features(views)
    assert not features.requires_grad
    assert torch.equal(features, one.classifier.eval().features(views))


def test_frozen_batch_norm_stays_while_convolutions_learn() -> None:
    one = training("training.batch_norm=frozen", "training.weight_decay=0.1")
    before = state(one.classifier)
    one.train(quiet=True)
    moved = changed(before, one.classifier)
    norms = {name for name in before if ".bn" in name or "downsample.1" in name}
    assert len(norms) == 9 * 5  # weight, bias, mean, variance and count of each
    assert moved == set(before) - norms


# ------------------------------------------------------------------------------------------------ mixed, changed images


@given(st.floats(0.05, 5), st.integers(1, 40), st.integers(0, 2**62))
def test_partners_of_mixup_are_a_permutation_and_depend_on_the_seed_alone(alpha: float, count: int, seed: int) -> None:
    share, order = mixing(alpha, count, seed)
    assert 0 <= share <= 1
    assert sorted(order.tolist()) == list(range(count))
    again, same = mixing(alpha, count, seed)
    assert share == again and torch.equal(order, same)


def test_shares_of_mixup_follow_the_beta_distribution() -> None:
    shares = torch.tensor([mixing(0.5, 2, seed)[0] for seed in range(2000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(0.125, abs=0.01)  # 1 / (4 (2 alpha + 1))


def test_the_loss_of_a_mixed_batch_is_the_mixture_of_both_losses() -> None:
    one, plain = training("training.mixup=0.5"), training()
    rows, views = next(one.batches.training(1))
    seen: list[Tensor] = []
    one.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    one.step = 1
    loss = one.train_step(rows, views)
    (mixed,) = seen
    # Each mixed image is share · image + (1 - share) · partner: found here from the images alone.
    flat, target = views.flatten(1).double(), mixed.flatten(1).double()
    solutions = torch.linalg.lstsq(flat.T, target.T).solution.T
    share = float(solutions.diagonal().median())
    partner = (solutions - share * torch.eye(len(rows))).argmax(dim=1)
    assert sorted(partner.tolist()) == list(range(len(rows)))
    with torch.no_grad():
        outputs = plain.classifier.train()(mixed)
    expected = share * plain.loss_of(outputs, rows) + (1 - share) * plain.loss_of(outputs, rows[partner])
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_rand_augment_changes_training_images_by_seed_epoch_and_row_alone() -> None:
    device = torch.device("cpu")
    config = protocol("training.rand_augment=2", "data.workers=2")
    here = Batches(ONE_CLASS, config, 0, device)  # scenes are cut in this process
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = dict(_by_row(here, 1))
    assert torch.equal(torch.get_rng_state(), before)  # the global stream stays untouched
    here.workers = 2
    in_workers = dict(_by_row(here, 1))
    assert all(torch.equal(first[row], in_workers[row]) for row in first)
    plain = dict(_by_row(Batches(ONE_CLASS, protocol(), 0, device), 1))
    for other in (plain, dict(_by_row(here, 2)), dict(_by_row(Batches(ONE_CLASS, config, 1, device), 1))):
        assert sum(not torch.equal(first[row], other[row]) for row in first) > 20  # of 40: some operations do nothing


def _by_row(batches: Batches, epoch: int) -> list[tuple[int, Tensor]]:
    return [
        (row, view) for rows, views in batches.training(epoch) for row, view in zip(rows.tolist(), views, strict=True)
    ]


def test_test_images_are_not_changed_by_rand_augment() -> None:
    device = torch.device("cpu")
    with_it, without = (Batches(ONE_CLASS, protocol(f"training.rand_augment={n}"), 0, device) for n in (2, 0))
    assert torch.equal(next(with_it.plain())[1], next(without.plain())[1])


# -------------------------------------------------------------------------------------------------------------- resumed


@pytest.mark.parametrize(
    "changes",
    [
        ["training.mixup=0.3", "training.rand_augment=1", "training.layer_decay=0.7", "training.schedule=cosine"],
        ["training.train=head", "training.optimizer=sgd", "training.schedule=steps", "training.steps=[1,2]"],
        [
            "training.batch_norm=frozen",
            "training.warmup_epochs=1.5",
            "training.optimizer=sgd",
            "training.nesterov=true",
        ],
    ],
)
def test_fine_tuning_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_weights(
    changes: list[str], tmp_path: Path, train_until: Callable[[Training, int], None]
) -> None:
    whole, first = training(*changes), training(*changes, folder=tmp_path)
    whole.train(quiet=True)
    train_until(first, 5)  # of 3 an epoch
    second = training(*changes, folder=tmp_path)
    assert second.step == 5
    second.train(quiet=True)
    assert second.history == whole.history
    assert not changed(state(whole.classifier), second.classifier)


def test_dropout_of_a_frozen_backbone_is_off() -> None:
    one = training("training.train=head")
    one.classifier.backbone.layer3 = nn.Sequential(Block(64, 128, 2), nn.Dropout(0.5))
    assert not one.classifier.train().backbone.layer3[1].training
    assert one.classifier.head.training
