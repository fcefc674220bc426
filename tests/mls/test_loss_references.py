"""Every loss against a plain loop in double precision written from its paper, its gradients, its edges, and the
equalities between losses. The loss interface itself and InfoNCE are in test_losses.py."""

import inspect
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mls.core import losses
from mls.errors import ConfigError

Rows = list[list[float]]
Options = dict[str, Any]

# ------------------------------------------------------------------------------------------- the plain references
# A reference is a function (x, y, s, index, o): logits, labels and soft labels as lists, the samples' row numbers, and
# the options with the learnable parameters, "epoch" and the stopped values "x0" and "estimates0" among them.


neg = lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))  # -log(1 - sigmoid(x))
pos = lambda x: neg(-x)  # -log sigmoid(x)
sigmoid = lambda x: math.exp(-pos(x))
soft = lambda x, target: target * pos(x) + (1 - target) * neg(x)
entropy = lambda x: soft(x, sigmoid(x))
observed_or = lambda x, y, unknown: pos(x) if y > 0 else neg(x) if y < 0 else unknown
mean = lambda values: sum(values) / len(values)
flat = lambda value: [leaf for part in value for leaf in flat(part)] if isinstance(value, list) else [value]
cells = lambda *matrices: zip(*map(flat, matrices), strict=True)


def asl(x: float, y: float, o: Options, x0: float) -> float:
    if y > 0:
        return sigmoid(-x0) ** o["gamma_pos"] * pos(x)
    shifted, shifted0 = (max(sigmoid(at) - o["clip"], 0.0) for at in (x, x0))
    return shifted0 ** o["gamma_neg"] * (neg(x) if o["clip"] == 0 else -math.log1p(-shifted))


def generalised_robust(x: float, o: Options, f0: float) -> float:
    """As the released code: V (K (1 - f^q2) / q2 + (1 - K) (1 - (1 - f)^q3) / q3), in epoch t of T."""
    w0, w1, b0, b1 = o["beta"] or (0.0, 2.0, -2.0, -2.0)
    m0, s0, m1, s1 = o["alpha"] or (0.5, 2.0, 0.8, 0.5)
    before, now = (min(at, o["epochs"]) / o["epochs"] for at in (o["epoch"] - 1, o["epoch"]))
    chance = 1 / (1 + math.exp(-((w0 + (w1 - w0) * before) * f0 + b0 + (b1 - b0) * before)))
    weight = math.exp(-0.5 * ((f0 - m0 - (m1 - m0) * now) / (s0 + (s1 - s0) * now)) ** 2)
    away = [-math.expm1(-q * cost) / q for q, cost in ((o["q_pos"], pos(x)), (o["q_neg"], neg(x)))]  # (1 - f^q) / q
    return weight * (chance * away[0] + (1 - chance) * away[1])


ENTRIES: dict[str, Callable[[float, float, float, float, Options, int], float]] = {  # the loss of one entry
    "an": lambda x, y, *_: pos(x) if y > 0 else neg(x),
    "bce_pos": lambda x, y, *_: pos(x) if y > 0 else 0.0,
    "iu": lambda x, y, *_: observed_or(x, y, 0.0),
    "wan": lambda x, y, s, x0, o, c: pos(x) if y > 0 else neg(x) / max(c - 1, 1),
    "dw": lambda x, y, s, x0, o, c: pos(x) if y > 0 else neg(x) * (o["alpha"] or 1 / max(c - 1, 1)),
    "an_ls": lambda x, y, s, x0, o, c: soft(x, 1 - o["epsilon"] if y > 0 else o["epsilon"]),
    "n_ls": lambda x, y, s, x0, o, c: observed_or(x, y, soft(x, o["epsilon"])),
    "ent_min": lambda x, y, s, x0, o, c: observed_or(x, y, o["alpha"] * entropy(x)),
    "em": lambda x, y, s, x0, o, c: observed_or(x, y, -o["alpha"] * entropy(x)),
    "em_apl": lambda x, y, s, x0, o, c: observed_or(
        x, y, -o["alpha"] * entropy(x) if math.isnan(s) else o["beta"] * soft(x, s)
    ),
    "focal": lambda x, y, s, x0, o, c: (
        sigmoid(-x) ** o["gamma_pos"] * pos(x) if y > 0 else sigmoid(x) ** o["gamma_neg"] * neg(x)
    ),
    "asl": lambda x, y, s, x0, o, c: asl(x, y, o, x0 if o["detach_weight"] else x),
    "symmetric_ce": lambda x, y, s, x0, o, c: (
        o["alpha"] * soft(x, float(y > 0)) + o["beta"] * 4 * sigmoid(-x if y > 0 else x)
    ),
    "gr": lambda x, y, s, x0, o, c: observed_or(x, y, generalised_robust(x, o, sigmoid(x0))),
    "vlpl": lambda x, y, s, x0, o, c: ENTRIES["em_apl"](x, y, s, x0, o, c),
}


def element_wise(name: str) -> Callable[..., list[float]]:
    return lambda x, y, s, index, o: [ENTRIES[name](*cell, o, len(x[0])) for cell in cells(x, y, s, o["x0"])]


def changed(name: str, x: Rows, y: Rows, delta: float, epoch: int) -> list[bool]:
    """Which entries, row by row, a large-loss method rejects or corrects."""
    unobserved = sorted((neg(a) for a, b in cells(x, y) if b == 0), reverse=True)
    rounds = 1 if name == "ll_cp" else epoch - 1
    count = min(math.ceil(Fraction(str(delta)) * len(flat(x)) * rounds / 100), len(unobserved))
    if epoch == 1 or count == 0:
        return [False] * len(flat(x))
    return [b == 0 and neg(a) >= unobserved[count - 1] for a, b in cells(x, y)]


def large_loss(name: str) -> Callable[..., list[float]]:
    def loss(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> list[float]:
        entries = zip(changed(name, x, y, o["delta_rel"], o["epoch"]), *map(flat, (x, y)), strict=True)
        corrected = lambda a: 0.0 if name == "ll_r" else pos(a)
        return [corrected(a) if change else soft(a, float(b > 0)) for change, a, b in entries]

    return loss


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def two_way_row(x: list[float], y: list[float], o: Options) -> float:
    hot, cold = o["temperature_pos"], o["temperature_neg"]
    positives = [-a / hot for a, b in zip(x, y, strict=True) if b > 0]
    negatives = [a / cold for a, b in zip(x, y, strict=True) if b < (0 if o["ignore_unknown"] else 1)]
    return neg(hot * log_sum_exp(positives) + cold * log_sum_exp(negatives)) if positives and negatives else 0.0


def softmax_row(x: list[float], y: list[float], o: Options) -> float:
    return mean([log_sum_exp(x) - a for a, b in zip(x, y, strict=True) if b > 0] or [0.0])


def ways(row_loss: Callable[..., float]) -> Callable[..., float | list[float]]:
    def loss(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> float | list[float]:
        if o["ways"] == "both":
            return sum(loss(x, y, s, index, {**o, "ways": way}) for way in ("sample", "class"))
        if o["ways"] == "class":
            x, y = ([list(column) for column in zip(*of, strict=True)] for of in (x, y))
        rows = [row_loss(*row, o) for row in zip(x, y, strict=True)]
        return sum(rows) / max(sum(max(row) > 0 for row in y), 1) if o["reduction"] == "mean" else rows

    return loss


def pairwise_rank(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> float | list[float]:
    samples = []
    for row in zip(x, y, strict=True):
        f = [(sigmoid(a), b) for a, b in zip(*row, strict=True)]
        samples.append(sum(max(0.0, 1 - p + n) for p, b in f if b > 0 for n, other in f if other <= 0))
    return sum(samples) / len(flat(x)) if o["reduction"] == "mean" else samples


known = lambda x, y: mean([observed_or(a, b, 0.0) for a, b in cells(x, y)])
surplus = lambda x, o: (mean([sum(map(sigmoid, row)) for row in x]) - o["expected_positives"]) ** 2 / len(x[0]) ** 2


def role(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> float:
    g, g0 = ([o[name][i] for i in index] for name in ("estimates", "estimates0"))
    crossed = mean([soft(a, sigmoid(b0)) + soft(b, sigmoid(a0)) for a, a0, b, b0 in cells(x, o["x0"], g, g0)])
    return 0.5 * (known(x, y) + known(g, y) + crossed + surplus(x, o) + surplus(g, o))


def curriculum(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> float:
    samples = []
    for cells_of in (list(zip(*rows, strict=True)) for rows in zip(x, y, s, strict=True)):
        target = [(a, float(b > 0) if b else soft_label) for a, b, soft_label in cells_of]
        known = [(a, t) for a, t in target if not math.isnan(t)]
        weight = o["alpha"] * (len(known) / len(target)) ** o["gamma"] + o["beta"]
        samples.append(weight * sum(soft(a, t) for a, t in known) / len(target))
    return mean(samples)


def hml(x: Rows, y: Rows, s: Rows, index: list[int], o: Options) -> float:
    z, z0 = ([o["scale"] * math.cos(math.acos(c) + o["margin"]) for c in flat(of)] for of in (x, o["x0"]))
    balance = sum(sigmoid(-a) if b > 0 else -sigmoid(a) for a, b in cells(z0, y))
    return mean([soft(a, float(b > 0)) for a, b in cells(z, y)]) + (abs(balance) if o["adaptive"] else 0.0)


REFERENCES: dict[str, Callable[..., Any]] = {
    **{name: element_wise(name) for name in ENTRIES},
    **{name: large_loss(name) for name in ("ll_r", "ll_ct", "ll_cp")},
    **{"softmax": ways(softmax_row), "two_way": ways(two_way_row), "pairwise_rank": pairwise_rank},
    **{"epr": lambda x, y, s, index, o: known(x, y) + surplus(x, o), "role": role, "hml": hml},
    **{"curriculum": curriculum, "crisp": element_wise("an")},  # crisp after its warm-up: test_noisy_labels.py
}


def table(text: str) -> list[tuple[str, Options]]:
    lines = (line.split(maxsplit=1) for line in text.strip().splitlines())
    pairs = [(name, [word.split("=") for word in case.split()]) for name, rest in lines for case in rest.split("|")]
    return [(name, {key: yaml.safe_load(value) for key, value in words}) for name, words in pairs]


# A loss's first options are its paper's: its defaults must be these.
OPTIONS = table("""
softmax      ways=sample | ways=class | ways=both | reduction=none | reduction=sum | ways=class reduction=none
dw           alpha=null | alpha=0.3
an_ls        epsilon=0.1 | epsilon=0.3
n_ls         epsilon=0.1 | epsilon=0.3
epr          expected_positives=1.5 | expected_positives=2.9
role         expected_positives=1.5 | expected_positives=2.9
ent_min      alpha=0.1 | alpha=0.4
em           alpha=0.1 | alpha=0.4
em_apl       alpha=0.1 beta=0.9 | alpha=0.4 beta=0.2
focal        gamma_pos=2.0 gamma_neg=2.0 | gamma_pos=0.5 gamma_neg=3.0 | gamma_pos=0.0 gamma_neg=0.3
asl          gamma_neg=4.0 gamma_pos=1.0 clip=0.05 detach_weight=true reduction=sum | clip=0.0
asl          detach_weight=false reduction=mean | gamma_pos=0.0 clip=0.2 detach_weight=false
asl          gamma_neg=0.5 clip=0.0 detach_weight=false | gamma_neg=0.5 detach_weight=false
ll_r         delta_rel=0.5 | epoch=2 | epoch=5 | epoch=200 | epoch=1000 | epoch=9 delta_rel=4.0 reduction=none
ll_ct        delta_rel=0.2 | epoch=2 | epoch=5 | epoch=200 | epoch=1000 | epoch=9 delta_rel=4.0 reduction=none
ll_cp        delta_rel=0.1 | epoch=2 | epoch=1000 | epoch=9 delta_rel=40.0 reduction=none | epoch=2 delta_rel=99.0
two_way      temperature_pos=4.0 temperature_neg=1.0 ways=both ignore_unknown=false gpu_batch=null | ways=sample
two_way      ways=class
two_way      ways=sample ignore_unknown=true | ways=class ignore_unknown=true
two_way      temperature_pos=1.0 temperature_neg=2.0 ignore_unknown=true
pairwise_rank reduction=mean | reduction=none | reduction=sum
hml          scale=20.0 margin=0.3 learn=true adaptive=true | adaptive=false
hml          scale=5.0 margin=0.7 learn=false | margin=0.0 learn=false adaptive=false
symmetric_ce alpha=0.1 beta=1.0 | alpha=0.7 beta=0.2
gr           q_pos=0.01 q_neg=1.0 beta=null alpha=null epochs=10 | epoch=4 | epoch=30
gr           q_pos=0.5 q_neg=0.3 epoch=2 epochs=3
gr           beta=[1.0,3.0,0.5,-1.0] alpha=[0.2,0.4,0.9,1.5] epoch=5
vlpl         alpha=0.1 beta=0.7 | alpha=0.4 beta=0.2
curriculum   theta=2.0 alpha=-4.45 beta=5.45 gamma=1.0 | alpha=0.0 beta=1.0 | gamma=2.0
""")
VARIANTS = [
    *((name, {}) for name in sorted(REFERENCES)),
    *((name, {"temperature": 0.2}) for name in sorted(REFERENCES) if name != "hml"),
    *((name, {"reduction": reduction}) for name in ENTRIES for reduction in ("sum", "none")),
    *OPTIONS,
]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in VARIANTS]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
OF_ONE_NETWORK = [name for name in losses.names() if losses.LOSSES[name].networks == 1]  # else: test_noisy_labels.py
every_loss = pytest.mark.parametrize("name", OF_ONE_NETWORK)


# ------------------------------------------------------------------------------------------------------- helpers


def random_batch(seed: int, batch: int = 6, classes: int = 5, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and soft labels for about half of the entries (NaN elsewhere)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(-1, 2, (batch, classes), generator=generator)
    pseudo = torch.rand(batch, classes, generator=generator, dtype=torch.float64)
    return logits, labels, pseudo.masked_fill(pseudo < 0.5, math.nan)


def made(name: str, labels: Tensor, dtype: torch.dtype = torch.float64, epoch: int = 1, **options: Any) -> losses.Loss:
    """The loss as a trainer makes it: it has seen all labels and knows its epoch."""
    loss = losses.build(name, **options)
    assert isinstance(loss, losses.Loss)
    loss.observe(labels)
    loss.set_epoch(epoch)
    return loss.to(dtype)


def taken(loss: losses.Loss, logits: Tensor) -> Tensor:
    """What the loss takes: logits, or cosines made of them."""
    return logits if loss.takes == "logits" else torch.tanh(logits / 4)


def plain(
    name: str, options: Options, loss: losses.Loss, labels: Tensor, pseudo: Tensor, index: Tensor, x0: Tensor
) -> Callable[..., list[float]]:
    """The reference as a function of logits or cosines and, by name, of what the loss has learnt. It gives the entries
    for reduction "none", else one value."""
    o = {"reduction": "mean", "temperature": 1.0, "epoch": 1, **dict(reversed(OPTIONS)).get(name, {}), **options}
    o |= {key: value.tolist() for key, value in loss.state_dict().items()}
    o |= {"x0": (x0 / o["temperature"]).tolist(), "estimates0": o.get("estimates")}

    def reference(x: Tensor, **learnt: Tensor) -> list[float]:
        now = o | {key: value.tolist() for key, value in learnt.items()}
        x = x / o["temperature"]
        value = REFERENCES[name](x.tolist(), labels.tolist(), pseudo.tolist(), index.tolist(), now)
        if o["reduction"] == "none" or not isinstance(value, list):
            return flat(value)
        return [mean(value) if o["reduction"] == "mean" else sum(value)]

    return reference


# --------------------------------------------------------------------------------------------- values and gradients


def test_every_loss_has_a_reference() -> None:
    assert sorted(REFERENCES) == OF_ONE_NETWORK


@every_variant
def test_loss_equals_its_plain_loop(name: str, options: Options) -> None:
    for seed, (batch, classes) in enumerate([(6, 5), (1, 7), (7, 1), (4, 9)]):
        _, all_labels, _ = random_batch(seed, 2 * batch, classes)
        logits, _, pseudo = random_batch(seed + 10, batch, classes)
        loss = made(name, all_labels, **options)
        index = torch.randperm(2 * batch, generator=torch.Generator().manual_seed(seed))[:batch]
        x, labels = taken(loss, logits), all_labels[index]
        expected = plain(name, options, loss, labels, pseudo, index, x)(x)
        value = loss(x, labels, pseudo, index)
        assert flat(value.tolist()) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@every_variant
def test_gradient_equals_finite_differences_of_the_plain_loop(name: str, options: Options) -> None:
    """Whatever a loss uses without gradient (weights, targets, cosines) stays as it is in the loop."""
    logits, labels, pseudo = random_batch(21, batch=4, classes=3)
    loss, index = made(name, labels, **options), torch.arange(4)
    x = taken(loss, logits)
    reference = plain(name, options, loss, labels, pseudo, index, x)
    _, gradient, *learnt = value_and_gradients(loss, x, labels, pseudo)
    torch.testing.assert_close(gradient, differences(reference, x), rtol=1e-5, atol=1e-7)
    moving = [(key, parameter.detach()) for key, parameter in loss.named_parameters() if parameter.requires_grad]
    for (key, parameter), gradient in zip(moving, learnt, strict=True):
        expected = differences(lambda value, key=key: reference(x, **{key: value}), parameter)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


STOPPED = {"asl": {"detach_weight": False}, "hml": {"adaptive": False}}  # parts carry no gradient, unless told so


@pytest.mark.parametrize("name", [name for name in OF_ONE_NETWORK if name not in ("role", "gr")])  # partly stopped
def test_loss_passes_gradcheck(name: str) -> None:
    logits, labels, pseudo = random_batch(7)
    loss = made(name, labels, epoch=3, **STOPPED.get(name, {}))
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, pseudo), taken(loss, logits).requires_grad_())


def value_and_gradients(loss: losses.Loss, x: Tensor, labels: Tensor, pseudo: Tensor | None) -> list[Tensor]:
    """With respect to logits or cosines, and to what the loss learns."""
    x = x.detach().requires_grad_()
    value = loss(x, labels, pseudo, torch.arange(len(x)))
    learnt = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    return [value.detach(), *torch.autograd.grad(value.sum(), [x, *learnt])]


def differences(function: Callable[[Tensor], list[float]], point: Tensor, step: float = 1e-6) -> Tensor:
    moves = (torch.eye(point.numel(), dtype=point.dtype) * step).view(-1, *point.shape)
    slopes = [(sum(function(point + move)) - sum(function(point - move))) / (2 * step) for move in moves]
    return torch.tensor(slopes, dtype=point.dtype).view_as(point)


LABELS = [
    [[1, 0, -1, 1], [0, -1, 1, 0], [1, 1, 1, 0]],
    [[1, 0, -1, 0], [0, 0, 0, -1], [1, 1, -1, 0]],  # a row and a column without positives
    [[1, 0, -1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],  # a row and a column without negatives
    *([[label] * 4] * 3 for label in (1, 0, -1)),
    *([[1, 0, -1, 0]], [[0, 0, 0, 0]], [[1], [0], [-1]], [[1]], [[0]], [[-1]]),
]
EXTREMES = [80.0, -80.0, 20.0, -20.0, 0.0, 80.0, -80.0, -80.0, 80.0, 0.0, 20.0, -80.0]


@every_variant
def test_values_and_gradients_are_finite_at_the_edges(name: str, options: Options) -> None:
    for labels in map(torch.tensor, LABELS):
        extreme = torch.tensor(EXTREMES[: labels.numel()]).view(labels.shape)
        pseudo = torch.where(extreme > 0, 0.3, math.nan)
        for logits, soft_labels in ((extreme * 0, pseudo), (extreme, pseudo), (extreme.bfloat16(), None)):
            loss = made(name, labels, torch.float32, **options)
            results = value_and_gradients(loss, taken(loss, logits), labels, soft_labels)
            assert all(torch.isfinite(result).all() for result in results), (labels, logits, soft_labels)


@every_variant
def test_single_precision_equals_double_precision_at_extreme_logits(name: str, options: Options) -> None:
    labels = torch.tensor(LABELS[0])
    logits = torch.tensor(EXTREMES).view(labels.shape)
    if name == "hml":
        logits = logits / 10  # at a cosine of exactly 1 the gradient is where its clamp puts it
    for order in (logits, -logits):
        loss = made(name, labels, torch.float32, **options)
        single = value_and_gradients(loss, taken(loss, order), labels, None)
        double = value_and_gradients(loss.double(), taken(loss, order).double(), labels, None)
        for one, two in zip(single, double, strict=True):
            torch.testing.assert_close(one, two.float(), rtol=1e-3, atol=1e-6)


@every_loss
def test_bf16_input_is_computed_in_single_precision(name: str) -> None:
    logits, labels, pseudo = random_batch(31, batch=16, classes=50)
    loss = made(name, labels, torch.float32)
    half = taken(loss, logits).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value, *_ = value_and_gradients(loss, half, labels, pseudo.float())
    expected, *_ = value_and_gradients(loss, half.float(), labels, pseudo.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)


# ------------------------------------------------------------------------------------- properties and equalities

some_batches = given(seed=st.integers(0, 2**31), batch=st.integers(1, 6), classes=st.integers(1, 7))


@every_loss
@settings(max_examples=8)
@some_batches
def test_order_of_classes_and_samples_does_not_matter(name: str, seed: int, batch: int, classes: int) -> None:
    logits, labels, pseudo = random_batch(seed, batch, classes)
    loss = made(name, labels, epoch=8)
    x, index = taken(loss, logits), torch.arange(batch)
    expected = loss(x, labels, pseudo, index).item()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    assert loss(x[order], labels[order], pseudo[order], index[order]).item() == pytest.approx(expected, rel=1e-10)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    if name == "role":
        loss.estimates.data = loss.estimates.data[:, order]
    moved = loss(x[:, order], labels[:, order], pseudo[:, order], index).item()
    assert moved == pytest.approx(expected, rel=1e-10)


# A class that nobody has, with a logit of -10,000, adds exp(-10,000) = 0 to a softmax or two-way row, 0 to a sum over
# entries, and its column has no positive. Where the formula counts classes (means, WAN's weight, LL's k, EPR) or where
# a silent negative still costs something (smoothing, ranking) the value does change.
COUNTLESS = "an bce_pos iu ent_min em em_apl focal asl symmetric_ce ll_r ll_ct ll_cp".split()
PADDABLE = [(name, {"reduction": "sum"}) for name in COUNTLESS] + table("""
dw      alpha=0.5 reduction=sum
softmax ways=sample | ways=class | ways=both
two_way ways=sample | ways=class | ways=both | ignore_unknown=true
""")


@pytest.mark.parametrize(("name", "options"), PADDABLE)
@settings(max_examples=8)
@some_batches
def test_a_silent_class_changes_nothing(name: str, options: Options, seed: int, batch: int, classes: int) -> None:
    logits, labels, _ = random_batch(seed, batch, classes)
    loss = made(name, labels, **options)
    padded = loss(F.pad(logits, (0, 2), value=-1e4), F.pad(labels, (0, 2), value=0))
    assert padded.item() == pytest.approx(loss(logits, labels).item(), rel=1e-10, abs=1e-12)


# Each is the `other` loss (an if not named); some only where every label is known.
SAME = table("""
em           known=true | alpha=0.4 known=true | alpha=0.0 other=iu
em_apl       known=true | other=em
ent_min      known=true
iu           known=true
n_ls         known=true | epsilon=0.0
an_ls        epsilon=0.0
ll_r         epoch=1 | epoch=50 known=true
ll_ct        epoch=1 | epoch=50 known=true
ll_cp        epoch=1 | epoch=50 known=true
focal        gamma_pos=0.0 gamma_neg=0.0
asl          gamma_pos=0.0 gamma_neg=0.0 clip=0.0 reduction=mean
asl          gamma_pos=2.0 gamma_neg=2.0 clip=0.0 reduction=mean other=focal
dw           alpha=1.0 | other=wan
symmetric_ce alpha=1.0 beta=0.0
""")


@pytest.mark.parametrize(("name", "options"), SAME)
@settings(max_examples=8)
@some_batches
def test_special_cases_are_the_same_loss(name: str, options: Options, seed: int, batch: int, classes: int) -> None:
    own = {key: value for key, value in options.items() if key not in ("known", "other")}
    logits, labels, _ = random_batch(seed, batch, classes)
    labels = labels.masked_fill(labels == 0, -1) if "known" in options else labels
    expected = losses.build(options.get("other", "an"))(logits, labels).item()
    assert made(name, labels, **own)(logits, labels).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 6), classes=st.integers(2, 7), hot=st.floats(0.5, 8))
def test_sample_way_with_one_positive_is_the_cross_entropy(seed: int, batch: int, classes: int, hot: float) -> None:
    logits, labels, _ = random_batch(seed, batch, classes)
    target = labels.argmax(dim=1)
    loss = losses.build("two_way", ways="sample", temperature_pos=hot)
    expected = F.cross_entropy(logits, target).item()
    assert loss(logits, F.one_hot(target, classes)).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["softmax", "two_way"])
def test_the_class_way_is_the_sample_way_of_the_transposed_batch_and_both_is_their_sum(name: str) -> None:
    logits, labels, _ = random_batch(2)
    sample, by_class, both = (losses.build(name, ways=way) for way in ("sample", "class", "both"))
    assert by_class(logits, labels).item() == pytest.approx(sample(logits.T, labels.T).item(), rel=1e-12)
    parts = sample(logits, labels) + by_class(logits, labels)
    assert both(logits, labels).item() == pytest.approx(parts.item(), rel=1e-12)
    with pytest.raises(ConfigError):
        losses.build(name, ways="both", reduction="none")
    with pytest.raises(ConfigError, match="'sample'"):
        losses.build(name, ways="samples")


def test_wan_and_an_are_the_same_for_two_classes() -> None:
    logits, labels, _ = random_batch(3, classes=2)
    expected = losses.build("an")(logits, labels).item()
    assert losses.build("wan")(logits, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "options"), [("two_way", {}), ("softmax", {}), ("softmax", {"ways": "both"})])
def test_rows_without_a_contrast_give_no_loss_and_no_gradient(name: str, options: Options) -> None:
    logits, _, _ = random_batch(4, batch=3, classes=1)
    label = -1 if name == "softmax" else 1  # all samples and all classes lack the other side
    loss = losses.build(name, **options)
    value, gradient = value_and_gradients(loss, logits, torch.full((3, 1), label), None)
    assert value.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(logits))


LARGE_LOSS = ["ll_r", "ll_ct", "ll_cp"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("delta", [0.1, 0.5, 99.0])
@pytest.mark.parametrize("classes", [20, 80])
@pytest.mark.parametrize("name", LARGE_LOSS)
def test_exactly_the_largest_unobserved_losses_change(name: str, classes: int, delta: float, tied: bool) -> None:
    logits, labels, _ = random_batch(41, batch=16, classes=classes)
    if tied:  # never at 0, where both targets cost the same; an odd size, whose last entries are computed one by one
        logits, labels = logits[:13, 1:].round() + 0.5, labels[:13, 1:]
    base = made(name, labels, reduction="none")(logits, labels)
    for epoch in (2, 6, 26, 101):
        loss = made(name, labels, epoch=epoch, delta_rel=delta, reduction="none")
        moved = loss(logits, labels) != base
        assert moved.flatten().tolist() == changed(name, logits.tolist(), labels.tolist(), delta, epoch)
        if delta == 99.0:  # more than there are unobserved labels: all of those and no other
            assert torch.equal(moved, labels == 0)


@pytest.mark.parametrize(("classes", "count"), [(20, 8), (80, 32)])
def test_the_number_of_large_losses_does_not_drift(classes: int, count: int) -> None:
    assert math.ceil(16 * classes * (1 - (1 - 5 * 0.5 / 100))) == count + 1  # what floating point makes of it
    logits, _, _ = random_batch(42, batch=16, classes=classes)
    loss = made("ll_r", logits, epoch=6, delta_rel=0.5, reduction="none")
    assert (loss(logits, torch.zeros_like(logits)) == 0).sum() == count


@pytest.mark.parametrize("name", LARGE_LOSS)
def test_one_call_leaves_nothing_for_the_next(name: str) -> None:
    first, labels, _ = random_batch(44)
    second, others, _ = random_batch(45, batch=3)
    loss = made(name, labels, epoch=4, delta_rel=10.0)
    alone = loss(first, labels).item()
    loss(second, others)
    assert loss(first, labels).item() == alone
    loss.set_epoch(1)
    assert loss(first, labels).item() != alone
    loss.set_epoch(4)
    assert loss(first, labels).item() == alone


def test_ll_cp_relabels_what_the_step_corrected_and_nothing_else() -> None:
    logits, labels, _ = random_batch(46, batch=8, classes=10)
    loss = made("ll_cp", labels, delta_rel=4.0)
    for epoch in (1, 2, 3, 1):
        loss.set_epoch(epoch)
        for x, y in ((logits, labels), (-logits[:3], labels[:3])):
            expected = changed("ll_cp", x.tolist(), y.tolist(), 4.0, epoch)
            after, _ = loss.relabel(y, None, x)
            assert after.dtype == y.dtype and (after != y).flatten().tolist() == expected
            assert (after[after != y] == 1).all()
            assert any(expected) == (epoch > 1)


def test_role_starts_from_sure_known_labels_and_undecided_unknown_ones() -> None:
    _, labels, _ = random_batch(51, batch=60, classes=20)
    first, second = (made("role", labels, torch.float32).estimates.detach() for _ in range(2))
    assert torch.equal(first, second)
    for label, chance in ((1, 0.995), (-1, 0.005)):
        torch.testing.assert_close(
            first[labels == label].sigmoid(), torch.tensor(chance).expand((labels == label).sum())
        )
    rest = first[labels == 0]
    assert rest.abs().max() < 0.4055 and rest.min() < -0.39 and rest.max() > 0.39 and abs(rest.mean()) < 0.05


def test_role_without_labels_or_row_numbers_says_what_is_missing() -> None:
    logits, labels, _ = random_batch(52)
    with pytest.raises(ConfigError, match="observe"):
        losses.build("role")(logits, labels, index=torch.arange(6))
    with pytest.raises(ConfigError, match="index"):
        made("role", labels)(logits, labels)


def test_role_goes_on_from_its_state_in_a_fresh_instance() -> None:
    logits, labels, _ = random_batch(53)
    loss, fresh = made("role", labels), losses.build("role")
    with torch.no_grad():
        loss.estimates += logits
    fresh.load_state_dict(loss.state_dict())
    assert [name for name, _ in fresh.named_parameters()] == ["estimates"]
    values = [one(logits, labels, index=torch.arange(6)).item() for one in (fresh, loss)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_role_learns_only_the_rows_of_its_batch_and_ten_times_faster() -> None:
    logits, labels, _ = random_batch(54)
    loss, index = made("role", labels), torch.tensor([4, 1])
    loss(logits[index], labels[index], index=index).backward()
    assert loss.estimates.grad.abs().amin(dim=1).gt(0).nonzero().flatten().tolist() == [1, 4]
    assert loss.estimates.grad.abs().amax(dim=1).gt(0).nonzero().flatten().tolist() == [1, 4]
    assert (loss.needs_index, loss.lr_multiplier) == (True, 10)


def test_hml_predicts_with_the_scaled_margin_it_has_learnt() -> None:
    cosines = torch.linspace(-0.99, 0.99, 21, dtype=torch.float64)[None]
    loss = made("hml", cosines, scale=7.0, margin=0.4)
    assert loss.scale.item() == pytest.approx(7.0) and loss.margin.item() == pytest.approx(0.4)
    expected = torch.sigmoid(loss.scale * torch.cos(torch.acos(cosines) + loss.margin))
    torch.testing.assert_close(loss.predict(cosines), expected)
    for learnt, used in ((2.0, math.pi / 2), (-0.1, 0.0)):  # beyond these a larger cosine could score lower
        loss.margin.data.fill_(learnt)
        expected = torch.sigmoid(loss.scale * torch.cos(torch.acos(cosines) + used))
        torch.testing.assert_close(loss.predict(cosines), expected)
    assert {name for name, parameter in loss.named_parameters() if parameter.requires_grad} == {"scale", "margin"}
    assert 0 < loss.lr_multiplier < 1  # the adaptive term is a sum over the batch beside a mean


def test_hml_with_fixed_margin_has_nothing_to_learn_and_refuses_a_temperature() -> None:
    logits, labels, _ = random_batch(55)
    loss = made("hml", labels, margin=0.0, learn=False, adaptive=False)
    assert not [parameter for parameter in loss.parameters() if parameter.requires_grad]
    cosines = torch.tanh(logits)
    expected = losses.build("an")(20 * cosines, labels).item()
    assert loss(cosines, labels).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError):
        losses.build("hml", temperature=0.2)


@every_loss
def test_a_wrong_option_or_type_is_answered_with_a_right_one(name: str) -> None:
    for option, parameter in inspect.signature(type(losses.build(name))).parameters.items():
        with pytest.raises(ConfigError, match=f"unknown option of loss {name} .*: did you mean '{option}'"):
            losses.build(name, **{option[:-1]: 1})
        if parameter.default is not None:
            with pytest.raises(ConfigError, match=f"option {option} of loss {name} cannot be .*: give a value such as"):
                losses.build(name, **{option: [1]})


@every_loss
def test_every_loss_names_its_paper_and_its_shapes(name: str) -> None:
    documentation = type(losses.build(name)).__doc__ or ""
    assert "http" in documentation
    assert "[batch, classes]" in documentation
    assert re.search(rf"^    {name} ", losses.__doc__ or "", re.MULTILINE)  # what it makes of 0 and -1
