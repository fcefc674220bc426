"""Every loss as a pretraining objective: it trains, its schedule and parameters survive a resume, and rows that are
left out of the dictionary neither pull nor push."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mls
from mls.config import Config
from mls.core import losses, methods
from mls.core.dictionary import Dictionary
from mls.core.method import gradient_norms
from mls.core.methods.mls import MLS
from mls.core.positives import Positives
from mls.core.queried_rows import QueriedRows
from mls.data import Views
from mls.engine import Run, optim
from mls.engine.checkpoint import Checkpoints
from mls.errors import ConfigError, Stopped
from mls.recipes import load_config

BATCH, ROWS, K = 8, 40, 5
USABLE = [name for name in losses.names() if not losses.LOSSES[name].only_supervised]
OF_ENTRIES = [name for name in USABLE if losses.build(name).elementwise]
COUNT_CLASSES = {
    "wan",
    "dw",
    "epr",
    "hml",
    "pairwise_rank",
    "ll_r",
    "ll_ct",
    "ll_cp",
    "gr",
}  # rows left out count


def config_of(loss: str, *overrides: str) -> Config:
    base = [f"data.batch_size={BATCH}", f"dictionary.size={ROWS}", f"objective.k={K}", "model.projection=16"]
    return load_config("mls_scenes_tiny", [*base, f"objective.loss={loss}", *overrides])


def method_of(loss: str, *overrides: str) -> MLS:
    config = config_of(loss, *overrides)
    method = methods.build(config)
    stream = torch.Generator().manual_seed(1)
    rows = [F.normalize(torch.randn(ROWS, dim, generator=stream), dim=1) for dim in (128, 16)]
    method.dictionary.enqueue(*rows, ids=torch.arange(ROWS))
    assert isinstance(method, MLS)
    return method


def views_of() -> Views:
    stream = torch.Generator().manual_seed(2)
    images = [torch.randn(BATCH, 3, 32, 32, generator=stream) for _ in range(2)]
    return Views(images, [torch.zeros(BATCH, 4)] * 2, torch.arange(100, 100 + BATCH))


def similar() -> tuple[Tensor, Tensor]:
    """Cosines of queries and rows, and labels: the k largest."""
    cosines = torch.rand(BATCH, ROWS, generator=torch.Generator().manual_seed(3)) * 1.8 - 0.9
    return cosines, torch.zeros(BATCH, ROWS).scatter_(1, cosines.topk(K).indices, 1.0)


def value_and_gradient(
    method: MLS, cosines: Tensor, labels: Tensor, own_rows: Tensor | None = None
) -> tuple[float, Tensor]:
    cosines = cosines.clone().requires_grad_()
    value = multi_label(method, cosines, labels, own_rows)
    return value.item(), torch.autograd.grad(value, cosines)[0]


def multi_label(method: MLS, cosines: Tensor, labels: Tensor, own_rows: Tensor | None = None) -> Tensor:
    """With the unit vectors as rows a query's entries are its cosines."""
    found = labels.topk(min(K, labels.shape[1]))
    unit_rows = Dictionary(labels.shape[1], projection=labels.shape[1])
    unit_rows.enqueue(torch.eye(labels.shape[1]), torch.arange(labels.shape[1]))
    rows = QueriedRows(unit_rows, torch.arange(len(labels)))
    if own_rows is not None:
        rows.exclude, rows.counts = own_rows, rows.counts - own_rows.sum(1)
    return method.multi_label(cosines, rows, Positives(found.indices, found.values > 0))[0]


@pytest.mark.parametrize("loss", USABLE)
def test_every_loss_pulls_and_trains(loss: str) -> None:
    method, views = method_of(loss), views_of()
    optimizer = optim.build(method.config, method, method.own_rates())
    for step in (47, 93, 139):  # epochs 2, 3 and 4 of 46 steps, warm-up over
        method.set_progress(step + 3 * 46, epoch=(step - 1) // 46 + 4, steps_per_epoch=46)
        before = [parameter.detach().clone() for parameter in method.pair.query.parameters()]
        out = method(views)
        pull = gradient_norms(out)["multi_label"]
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out])
        assert 0 < pull < float("inf")
        assert torch.isfinite(out.loss)
        assert any(not torch.equal(a, b) for a, b in zip(before, method.pair.query.parameters(), strict=True))


def test_a_loss_that_labels_training_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective.loss=role .* use objective.loss=em or an"):
        method_of("role")


def test_a_reduction_that_gives_no_number_is_refused() -> None:
    for loss in ("bce", "softmax"):
        with pytest.raises(ConfigError, match=r"reduction=none gives no single number"):
            method_of(loss, "objective.options.reduction=none")


def test_expected_positives_are_the_k_neighbours_unless_told() -> None:
    cosines, labels = similar()
    value = lambda *overrides: multi_label(method_of("epr", *overrides), cosines, labels).item()
    assert value() == value(f"objective.options.expected_positives={K}")
    assert value() != value("objective.options.expected_positives=1.5")


@pytest.mark.parametrize("warmup", [0.0, 1.0, 1.5])
def test_a_schedule_counts_from_the_first_epoch_of_the_term_and_depends_on_the_step_alone(warmup: float) -> None:
    method = method_of("ll_r", "objective.options.delta_rel=5.0", f"objective.warmup_epochs={warmup}")
    (cosines, labels), steps = similar(), range(1, 16)  # 5 epochs of 3 steps
    plain = losses.build("ll_r", delta_rel=5.0)
    values, expected = {}, {}
    for step in reversed(steps):  # from the end: nothing may be remembered
        epoch = (step + 2) // 3
        method.set_progress(step, epoch, steps_per_epoch=3)
        values[step] = value_and_gradient(method, cosines, labels)[0]
        assert method.warming_up == (step <= 3 * warmup)
        plain.set_epoch(max(1, epoch - int(warmup)))
        expected[step] = plain(cosines / method.config.objective.temperature, labels).item()
    assert values == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 5) for value in values.values()}) == 5 - int(warmup)  # every epoch rejects more


@pytest.mark.parametrize("loss", USABLE)
def test_own_rows_get_no_gradient_and_what_they_hold_changes_nothing(loss: str) -> None:
    method, (cosines, labels) = method_of(loss, "dictionary.own_rows=exclude"), similar()
    method.set_progress(1000, epoch=9, steps_per_epoch=125)
    own = (torch.rand(BATCH, ROWS, generator=torch.Generator().manual_seed(4)) < 0.1) & (labels == 0)
    value, gradient = value_and_gradient(method, cosines, labels, own)
    again, same_gradient = value_and_gradient(method, torch.where(own, 0.99, cosines), labels, own)
    assert own.any()
    assert (gradient[own] == 0).all()
    assert torch.isfinite(gradient).all()
    assert again == value
    assert torch.equal(same_gradient, gradient)


@pytest.mark.parametrize(
    ("loss", "normalise"),
    [(name, "mean") for name in USABLE if name not in COUNT_CLASSES]
    + [(name, kind) for name in OF_ENTRIES if name not in COUNT_CLASSES for kind in ("positives", "balanced")],
)
def test_own_rows_left_out_equal_rows_that_are_not_there(loss: str, normalise: str) -> None:
    method, (cosines, labels) = method_of(loss, f"objective.normalise={normalise}"), similar()
    absent = torch.zeros(ROWS, dtype=torch.bool)
    absent[torch.arange(3, ROWS, 7)] = True
    labels = labels.masked_fill(absent, 0.0)
    value, gradient = value_and_gradient(method, cosines, labels, absent.expand(BATCH, -1))
    expected, removed = value_and_gradient(method, cosines[:, ~absent], labels[:, ~absent])
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient[:, ~absent], removed)


def test_a_sum_over_entries_stays_a_sum() -> None:
    cosines, labels = similar()
    plain = losses.build("asl")
    assert plain.reduction == "sum"
    expected = plain(cosines / 0.2, labels).item()
    assert value_and_gradient(method_of("asl"), cosines, labels)[0] == pytest.approx(expected, rel=1e-5)


def test_cosine_losses_get_cosines() -> None:
    cosines, labels = similar()
    expected = losses.build("hml")(cosines, labels).item()
    assert value_and_gradient(method_of("hml"), cosines, labels)[0] == pytest.approx(expected, rel=1e-6)


def own_groups(*overrides: str) -> list[tuple[float, float]]:
    """Share of the learning rate and weight decay of what hml learns."""
    method = method_of("hml", *overrides)
    groups = optim.build(method.config, method, method.own_rates()).param_groups
    mine = {id(parameter) for parameter in method.loss.parameters()}
    return [(group["share"], group["weight_decay"]) for group in groups for p in group["params"] if id(p) in mine]


def test_learnt_scale_and_margin_go_to_the_optimizer_at_a_rate_for_the_number_of_entries() -> None:
    share = losses.build("hml").lr_multiplier * 64 * 80 / (BATCH * ROWS)
    assert own_groups() == [(pytest.approx(share), 0.0)] * 2
    assert own_groups("engine.accumulate=2") == [(pytest.approx(2 * share), 0.0)] * 2
    assert own_groups("optim.name=adamw") == [(1.0, 0.0)] * 2  # Adam's step has no gradient's size
    assert own_groups("objective.options.learn=false") == []


def stopped_and_resumed(config: Config, stop: int) -> tuple[Run, Run]:
    """The same training whole, and stopped in between."""
    whole = mls.pretrain(replace(config, run=replace(config.run, name="whole")), quiet=True)
    short = replace(config, run=replace(config.run, name="stopped"), engine=replace(config.engine, max_steps=stop))
    with pytest.raises(Stopped):
        mls.pretrain(short, quiet=True)
    return whole, mls.resume(Path(config.run.root or "") / "stopped", ["engine.max_steps=null"], quiet=True)


@pytest.mark.parametrize("loss", ["hml", "ll_r", "two_way"])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(loss: str, tiny: list[str]) -> None:
    short = ["optim.epochs=2", "data.scenes.count=160", "monitor.knn_every_epochs=0"]  # 10 steps an epoch
    options = ["objective.options.delta_rel=20"] if loss == "ll_r" else []
    config = load_config("mls_scenes_tiny", [*tiny, *short, *options, f"objective.loss={loss}"])
    whole, resumed = stopped_and_resumed(config, stop=13)
    first, second = (Checkpoints(run.checkpoints, 1).newest() for run in (whole, resumed))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first["method"], second["method"], rtol=0, atol=0, equal_nan=True)
    logged = [
        [row["loss/multi_label"] for row in run.metrics() if "loss/multi_label" in row] for run in (whole, resumed)
    ]
    assert logged[0] == logged[1]
    if loss == "hml":
        assert {"loss.scale", "loss.margin"} <= first["method"].keys()


def test_two_processes_wait_for_no_gradient_in_silent_steps_and_learn_one_margin(
    tiny: list[str], tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    small = ["optim.epochs=2", "data.scenes.count=128", "monitor.knn_every_epochs=0", "objective.warmup_epochs=1"]
    command = ["pretrain", "mls_scenes_tiny", *tiny, *small, "objective.loss=hml", "monitor.log_every=1"]
    done = mls_command(*command, "--name", "run", processes=2)
    assert done.returncode == 0, done.stderr
    rows = Run.open(tmp_path / "runs" / "run").metrics()
    silent, acting = [row for row in rows if row["step"] <= 8], [row for row in rows if row["step"] > 8]
    assert all("loss/multi_label" not in row and row["gradient/multi_label"] == 0 for row in silent if "loss" in row)
    margins = [row["loss/margin"] for row in acting if "loss/margin" in row]
    scales = [row["loss/scale"] for row in acting if "loss/scale" in row]
    assert len(margins) == 8
    assert margins[0] == pytest.approx(0.3)
    assert scales[0] == pytest.approx(20.0)
    assert all(a != b for a, b in pairwise(margins))
