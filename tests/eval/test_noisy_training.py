"""The supervised loop with several networks, boosted class activations, scores from outside, and an epoch chosen on
weak labels. On a few embedded scenes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mls.errors import ConfigError, DataError
from mls.eval import load_protocol
from mls.eval.boosted import BoostedClassifier
from mls.eval.classifier import Several, last_map
from mls.eval.protocol import Supervised, fingerprint
from mls.eval.supervised import as_truth, prepare, prepare_training, validate
from mls.eval.training import Training

SMALL = ["data.scenes.count=60", "data.scenes.test_count=16", "training.epochs=3", "training.batch_size=16"]


def protocol(*overrides: str) -> Supervised:
    return load_protocol("spml_scenes", [*SMALL, *overrides])


def training(*overrides: str, folder: Path | None = None) -> Training:
    return prepare_training(protocol(*overrides), "random", 0, folder)


@pytest.mark.parametrize("loss", ["co_teaching", "jocor"])
def test_two_networks_start_apart_and_both_learn(loss: str) -> None:
    one = training(f"training.loss={loss}", "training.linear_epochs=1", "training.epochs=1")
    assert isinstance(one.learner, Several)
    first, second = one.learner.networks
    assert one.classifier is first and not torch.equal(first.head.weight, second.head.weight)
    before = [[value.clone() for value in network.parameters()] for network in (first, second)]
    one.train(quiet=True)
    for network, old in zip((first, second), before, strict=True):
        assert all(not torch.equal(value, was) for value, was in zip(network.parameters(), old, strict=True))
    assert one.scores().shape == one.observed.shape  # of the first alone
    assert all("peer" not in name for name in one.weights())


def test_two_networks_that_were_stopped_go_on_to_the_same_weights(
    tmp_path: Path, train_until: Callable[[Training, int], None]
) -> None:
    whole = training("training.loss=co_teaching")
    whole.train(quiet=True)
    train_until(training("training.loss=co_teaching", folder=tmp_path), 4)  # of 3 an epoch
    second = training("training.loss=co_teaching", folder=tmp_path)
    assert second.step == 4
    second.train(quiet=True)
    pairs = zip(whole.learner.state_dict().items(), second.learner.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(value, same) for (name, value), (other, same) in pairs)


@pytest.mark.parametrize("loss", ["crisp", "curriculum"])
def test_what_is_estimated_between_epochs_is_the_same_after_a_stop(
    loss: str, tmp_path: Path, train_until: Callable[[Training, int], None]
) -> None:
    changes = [f"training.loss={loss}", "training.pseudo_from=1", "data.labels=partial_positives"]
    whole = training(*changes)
    whole.train(quiet=True)
    train_until(training(*changes, folder=tmp_path), 4)
    second = training(*changes, folder=tmp_path)
    second.train(quiet=True)
    assert second.history == whole.history
    weights = second.weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.weights().items())
    if loss == "crisp":
        assert ((weights["loss.priors"] > 0) & (weights["loss.priors"] <= 1)).all()


def test_positive_class_activations_are_boosted_before_their_mean() -> None:
    one = training("training.loss=ll_r", "training.boost=5.0")
    assert isinstance(one.classifier, BoostedClassifier)
    _, images = next(one.batches.plain(torch.arange(3)))
    one.classifier.eval()
    maps = last_map(one.classifier.backbone, images)
    expected = torch.zeros(3, one.classes)
    for image in range(3):
        for row in maps[image].flatten(1).T:
            scores = one.classifier.head.weight @ row + one.classifier.head.bias
            expected[image] += torch.where(scores > 0, 5 * scores, scores) / maps[image, 0].numel()
    torch.testing.assert_close(one.classifier(images), expected, rtol=1e-4, atol=1e-5)
    one.train(quiet=True)
    with pytest.raises(ConfigError, match="set training.linear_epochs=0"):
        protocol("training.boost=5.0", "training.linear_epochs=1")
    with pytest.raises(ConfigError, match="takes cosines"):
        training("training.loss=hml", "training.boost=5.0")


def test_scores_from_a_file_label_the_images_that_they_belong_to(tmp_path: Path) -> None:
    truth = prepare(protocol("data.validation=0").data).train.truth
    file = tmp_path / "scores.npy"
    np.save(file, (truth > 0).numpy())
    one = training("training.loss=vlpl", f"training.prior_scores={file}")
    train = prepare(one.protocol.data).train
    assert torch.equal(~one.pseudo.isnan(), (train.truth > 0) & (one.observed == 0))
    one.train(quiet=True)

    other = fingerprint(one.protocol)
    moved = tmp_path / "moved.npy"
    file.rename(moved)
    assert fingerprint(protocol("training.loss=vlpl", f"training.prior_scores={moved}")) == other
    np.save(moved, (truth < 0).numpy())
    assert fingerprint(protocol("training.loss=vlpl", f"training.prior_scores={moved}")) != other


def test_mistakes_with_scores_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "scores.npy"
    with pytest.raises(DataError, match="is not there: give a .npy file"):
        training("training.loss=vlpl", f"training.prior_scores={file}")
    np.save(file, np.zeros((48, 10)))
    with pytest.raises(DataError, match=r"has the shape \(48, 10\), but there are 60 training images"):
        training("training.loss=vlpl", f"training.prior_scores={file}")
    np.save(file, np.full((60, 10), np.nan))
    with pytest.raises(DataError, match="not finite"):
        training("training.loss=vlpl", f"training.prior_scores={file}")
    file.write_text("0.1 0.2")
    with pytest.raises(DataError, match="write it with numpy.save"):
        training("training.loss=vlpl", f"training.prior_scores={file}")
    with pytest.raises(ConfigError, match="give training.prior_scores=FILE"):
        training("training.loss=vlpl")
    with pytest.raises(ConfigError, match="makes nothing of training.prior_scores"):
        training("training.loss=em", f"training.prior_scores={file}")


def test_the_epoch_may_be_chosen_by_labels_as_weak_as_those_it_trains_on() -> None:
    weak, best = training("training.select=weak"), training()
    prepared = prepare(weak.protocol.data)
    held_out = as_truth(prepared.weak)
    assert ((held_out == 1).sum(1) == 1).all() and (held_out != 0).all()  # one positive an image, the rest negative
    assert ((held_out == 1) <= (prepared.val.truth == 1)).all()
    assert validate(weak)["map"] < validate(best)["map"]
    values = iter([0.2, 0.5, 0.3])
    weak.validate = lambda _: {"map": next(values)}
    weak.train(quiet=True)
    assert weak.selection() == "epoch 2 of 3, best map on the weakly labelled validation part"
    with pytest.raises(ConfigError, match="training.select=weak has no validation part"):
        training("training.select=weak", "data.validation=0")
    with pytest.raises(ConfigError, match="data.labels=full: use best"):
        training("training.select=weak", "data.labels=full")


def test_known_negatives_of_the_weak_part_leave_what_is_unknown_out() -> None:
    prepared = prepare(protocol("data.labels=partial_labels", "data.proportion=0.3").data)
    assert torch.equal(as_truth(prepared.weak), prepared.weak)
    assert (prepared.weak == 0).float().mean() > 0.5


def test_younger_keys_at_their_defaults_do_not_move_stored_results() -> None:
    assert fingerprint(protocol()) == fingerprint(protocol("training.boost=1.0", "training.prior_scores=null"))
    assert fingerprint(protocol()) != fingerprint(protocol("training.boost=2.0"))
    assert fingerprint(protocol()) != fingerprint(protocol("training.select=weak"))
