"""The supervised loop: labels that change while it learns, what resumes, when it stops. On a few embedded scenes."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mls.errors import ConfigError
from mls.eval import load_protocol
from mls.eval.optimizer import build_linear_init, weight_penalty
from mls.eval.protocol import Supervised, fingerprint
from mls.eval.supervised import metrics, prepare, prepare_training, run
from mls.eval.training import Training
from mls.tools.bench.faults.commands import Command

SMALL = ["data.scenes.count=80", "data.scenes.test_count=32", "training.epochs=4", "training.batch_size=16"]


def protocol(*overrides: str) -> Supervised:
    return load_protocol("spml_scenes", [*SMALL, *overrides])


def training(*overrides: str, folder: Path | None = None, seed: int = 0) -> Training:
    return prepare_training(protocol(*overrides), "random", seed, folder)


def test_pseudo_labels_are_each_class_lowest_scores_and_stay_as_they_are() -> None:
    seen: list[torch.Tensor] = []
    one = training("training.loss=em_apl", "training.pseudo_from=2")
    unannotated = (one.observed == 0).sum(0)
    scores: list[torch.Tensor] = []

    def look(now: Training) -> None:
        seen.append(now.pseudo.clone())
        scores.append(now.scores())

    one.train(quiet=True, after_epoch=look)
    a_round = (0.9 * unannotated / 2).int()
    assert [int((~pseudo.isnan()).sum()) for pseudo in seen] == [
        0,
        int(a_round.sum()),
        int(2 * a_round.sum()),
        int(2 * a_round.sum()),  # a round after the last epoch would train nothing
    ]
    first, second = seen[1], seen[2]
    chosen = ~first.isnan()
    assert torch.equal(second[chosen], first[chosen])  # soft labels are frozen
    assert not (chosen & (one.observed != 0)).any()
    for column in range(first.shape[1]):
        others = (one.observed[:, column] == 0) & ~chosen[:, column]
        assert scores[1][others, column].min() >= scores[1][chosen[:, column], column].max()


def test_an_epoch_of_one_batch_gets_its_pseudo_labels_too() -> None:
    one = training("training.loss=em_apl", "training.batch_size=64", "training.epochs=2", "training.pseudo_from=1")
    assert one.steps_per_epoch == 1
    one.train(quiet=True)
    assert (~one.pseudo.isnan()).any()


def test_what_ll_cp_corrects_stays_positive_and_nothing_else_changes() -> None:
    one = training("training.loss=ll_cp", "training.options.delta_rel=5.0")
    before = one.observed.clone()
    counts: list[int] = []
    one.train(quiet=True, after_epoch=lambda now: counts.append(int((now.observed != before).sum())))
    assert counts[0] == 0  # the first epoch is plain AN
    assert 0 < counts[1] < counts[3]
    changed = one.observed != before
    assert (before[changed] == 0).all()
    assert (one.observed[changed] == 1).all()


def test_linear_init_moves_the_last_layer_alone() -> None:
    one = training("training.linear_epochs=2")
    body = {name: value.clone() for name, value in one.classifier.backbone.state_dict().items()}
    head = one.classifier.head.weight.detach().clone()
    moved: list[bool] = []
    linear_init = one.linear_init

    def watched() -> None:
        linear_init()
        moved.append(not torch.equal(head, one.classifier.head.weight))
        assert all(torch.equal(body[name], value) for name, value in one.classifier.backbone.state_dict().items())

    one.linear_init = watched  # type: ignore[method-assign]
    one.train(quiet=True)
    assert moved == [True]


@pytest.mark.parametrize(("kind", "size"), [("l1", lambda w: w.abs().sum()), ("l2", lambda w: w.square().sum())])
def test_weight_penalty_counts_weights_and_no_biases(kind: str, size: Callable[..., torch.Tensor]) -> None:
    one = training(f"training.weight_penalty={kind}", "training.penalty=0.5")
    expected = sum(size(p.detach().double()) for p in one.classifier.parameters() if p.ndim > 1)
    assert float(weight_penalty(one.protocol.training, one.classifier).detach()) == pytest.approx(
        0.5 * float(expected), rel=1e-5
    )


def test_the_best_epoch_is_tested_and_named() -> None:
    one = training("training.epochs=3")
    values = iter([0.2, 0.5, 0.3])
    one.validate = lambda _: {"map": next(values)}
    kept: list[torch.Tensor] = []
    one.train(quiet=True, after_epoch=lambda now: kept.append(now.classifier.head.weight.detach().clone()))
    assert torch.equal(one.classifier.head.weight, kept[1])
    assert one.selection() == "epoch 2 of 3, best map on the validation part"


def test_patience_and_a_fall_end_training_early() -> None:
    patient = training("training.patience=0")
    values = iter([0.2, 0.1, 0.9, 0.9])
    patient.validate = lambda _: {"map": next(values)}
    patient.train(quiet=True)
    assert len(patient.history) == 2
    assert "stopped after epoch 2" in patient.selection()
    falling = training("training.drop=3")
    more = iter([0.5, 0.48, 0.46, 0.9])
    falling.validate = lambda _: {"map": next(more)}
    falling.train(quiet=True)
    assert len(falling.history) == 3


def test_a_loss_that_labels_what_is_unknown_cannot_leave_it_out() -> None:
    with pytest.raises(ConfigError, match="ll_cp labels what is unknown, and training.ignore_unknown=true"):
        training("training.loss=ll_cp", "training.ignore_unknown=true")


@pytest.mark.parametrize("loss", ["em_apl", "ll_cp", "hml", "role"])
def test_training_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_weights(
    loss: str, tmp_path: Path, train_until: Callable[[Training, int], None]
) -> None:
    changes = [f"training.loss={loss}"] + ["training.pseudo_from=1"] * (loss == "em_apl")
    whole = training(*changes)
    whole.train(quiet=True)
    first = training(*changes, folder=tmp_path)
    train_until(first, 6)  # of 4 an epoch
    second = training(*changes, folder=tmp_path)
    assert second.step == 6
    second.train(quiet=True)
    assert second.history == whole.history
    weights = second.weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.weights().items())


def test_training_stopped_at_the_last_step_of_an_epoch_still_ends_that_epoch(
    tmp_path: Path, train_until: Callable[[Training, int], None]
) -> None:
    changes = ["training.loss=em_apl", "training.pseudo_from=1"]
    whole = training(*changes)
    whole.train(quiet=True)
    first = training(*changes, folder=tmp_path)
    train_until(first, 8)  # of 4 an epoch
    assert (first.step, len(first.history)) == (8, 1)
    second = training(*changes, folder=tmp_path)
    second.train(quiet=True)
    assert second.history == whole.history
    assert torch.equal(second.pseudo.nan_to_num(7), whole.pseudo.nan_to_num(7))
    weights = second.weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.weights().items())


def test_a_run_killed_by_a_signal_ends_in_the_same_result(
    tmp_path: Path,
    mls_command: Callable[..., subprocess.CompletedProcess[str]],
    mls_started: Callable[..., list[Command]],
) -> None:
    arguments = ["eval", "run", "spml_scenes", *SMALL, "data.scenes.count=400", "training.epochs=6", "--out"]

    def whole(out: Path) -> str:
        done = mls_command(*arguments, str(out))
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(str(out), "OUT")

    expected = whole(tmp_path / "whole")
    (killed,) = mls_started(*arguments, str(tmp_path / "killed"))
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("eval/*/state/*.pt")):
        assert time.monotonic() < deadline and killed.running
        time.sleep(0.02)
    killed.send(signal.SIGKILL)
    assert killed.code() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.jsonl").exists()
    assert whole(tmp_path / "killed") == expected


def test_batches_of_an_epoch_depend_on_seed_and_epoch_alone() -> None:
    one, same, other = training(), training(), training(seed=1)
    rows = [[ids.tolist() for ids, _ in now.batches.training(2)] for now in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]
    assert sorted(row for batch in rows[0] for row in batch) == list(range(64))
    later = [ids.tolist() for ids, _ in one.batches.training(2, done=3)]
    assert later == rows[0][3:]


def test_test_images_are_not_augmented_and_training_images_are() -> None:
    one = training("augment.flip=1.0")
    _, plain = next(one.batches.plain(torch.arange(4)))
    rows, views = next(one.batches.training(1))
    place = rows.tolist().index(min(rows.tolist()))
    _, same = next(one.batches.plain(rows[place : place + 1]))
    assert torch.allclose(views[place].flip(2), same[0])
    assert plain.shape == (4, 3, 32, 32)


def test_labels_are_drawn_before_the_validation_part_is_held_out() -> None:
    prepared = prepare(protocol().data)
    assert prepared.val is not None
    assert len(prepared.train) == 64 and len(prepared.val) == 16
    positives = (prepared.observed == 1).sum(1)
    assert positives.max() == 1
    assert (prepared.observed != -1).all()
    assert ((prepared.observed == 1) <= (prepared.train.truth == 1)).all()


def test_fingerprint_ignores_where_data_lies_and_other_losses_options() -> None:
    same = protocol("data.root=/elsewhere", "data.workers=3", "options_of.asl={clip: 0.1}", "training.pseudo_from=2")
    assert fingerprint(same) == fingerprint(protocol())
    assert fingerprint(protocol("training.lr=0.5")) != fingerprint(protocol())
    assert fingerprint(protocol("training.loss=em")) != fingerprint(protocol())


def test_metrics_leave_out_what_nobody_annotated() -> None:
    truth = torch.tensor([[1, -1], [0, 1], [-1, -1]], dtype=torch.int8)
    scores = torch.tensor([[0.6, 0.1], [0.9, 0.8], [0.2, 0.3]])
    found = metrics(scores, truth)
    assert found["map"] == found["map_class"] == 1.0  # the unannotated 0.9 does not count as a mistake


def test_mistakes_in_a_protocol_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'training\.loss'"):
        protocol("training.los=em")
    with pytest.raises(ConfigError, match=r"pseudo_from is 9 of 4 epochs"):
        training("training.loss=em_apl", "training.pseudo_from=9")
    with pytest.raises(ConfigError, match=r"training.precision=fp16 needs a GPU"):
        training("training.precision=fp16", "training.device=cpu")
    with pytest.raises(ConfigError, match="no validation part"):
        run(protocol("data.validation=0"), "random", 0, None)


def test_a_margin_that_does_not_move_is_warned_about() -> None:
    def warnings(*overrides: str) -> list[str]:
        one, lines = training("training.loss=hml", "training.options.scale=1.0", *overrides), []
        one.session.say = lines.append  # type: ignore[method-assign]
        one.train(quiet=True)
        return [line for line in lines if "warning" in line]

    assert warnings() == []
    idle = warnings("training.loss_lr=1.0e-5")
    assert len(idle) == 2  # once for each, not once an epoch
    assert "the margin that hml learns moved by" in idle[1] and "raise training.loss_lr" in idle[1]
    warm = ["training.loss_lr=1.0e-5", "training.schedule=cosine", "training.warmup_epochs=1"]
    assert len(warnings(*warm)) == 2


def test_linear_init_gives_what_the_loss_learns_its_own_rate() -> None:
    one = training("training.loss=role", "training.loss_lr=null", "training.linear_epochs=1")
    groups = build_linear_init(one.protocol.training, one.classifier, one.loss).param_groups
    assert [group["lr"] for group in groups] == [1e-3, pytest.approx(1e-2)]  # ROLE's published ratio


@pytest.mark.parametrize("loss", ["an", "asl", "two_way", "softmax"])
def test_ignore_unknown_leaves_out_of_training_what_nobody_annotated(loss: str) -> None:
    partial = [f"training.loss={loss}", "data.labels=partial_labels", "training.ignore_unknown=true"]
    one = training(*partial)
    rows = torch.arange(16)
    outputs = torch.randn(16, one.classes, requires_grad=True)
    one.loss_of(outputs, rows).backward()
    unknown = one.observed[rows] == 0
    assert unknown.any() and (outputs.grad[unknown] == 0).all() and (outputs.grad[~unknown] != 0).any()
    one.train(quiet=True)
    with pytest.raises(ConfigError, match="training.loss=epr cannot leave unknown labels out"):
        training("training.loss=epr", "training.ignore_unknown=true")


def test_linear_init_as_published_goes_on_from_its_best_epoch() -> None:
    def head_after(select: str, good: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        one, heads = training("training.linear_epochs=3", f"training.linear_select={select}"), []

        def validate(now: Training) -> dict[str, float]:
            heads.append(now.classifier.head.weight.detach().clone())
            return {"map": 1.0 if len(heads) == good else 0.5}

        one.validate, one.title = validate, ""
        with one.session.running("", True):
            one.linear_init()
        return one.classifier.head.weight.detach().clone(), heads

    for good in (1, 2, 3):
        found, heads = head_after("best", good)
        assert torch.equal(found, heads[good - 1]) and len(heads) == 3
    last, heads = head_after("last", 1)
    assert heads == [] and torch.equal(last, found)
    assert fingerprint(protocol()) == fingerprint(protocol("training.linear_select=last"))
    with pytest.raises(ConfigError, match="linear_select=best has no validation part"):
        training("training.linear_select=best", "training.select=last", "data.validation=0")
