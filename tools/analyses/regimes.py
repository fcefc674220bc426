"""Two analyses of the paper on entropy maximisation (https://arxiv.org/abs/2203.16219): the losses' gradients over
the logit, and mAP over the share of labels. The losses themselves are in mls/core/losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.tools.analyses import Finding, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# A loss has the same one in all pictures.
COLOURS = {
    "an": "#000000",
    "n_ls": "#999999",
    "focal": "#56B4E9",
    "asl": "#CC79A7",
    "ent_min": "#E69F00",
    "em": "#D55E00",
    "em_apl": "#0072B2",
    "ll_r": "#009E73",
    "hml": "#882255",
}

# ---------------------------------------------------------------------------------------------------------- gradients

SHOWN = ("an", "n_ls", "focal", "asl", "ll_r", "ent_min", "em")
EDGE, POINTS = 6.0, 12001  # logits 0.001 apart
READ_AT = (-4.0, 0.0, 4.0)


def gradients(study: Study) -> Finding:
    """dL/dx of an unannotated and of a positive label. Options are the protocol's, LL-R is in its last epoch."""
    logits = torch.linspace(-EDGE, EDGE, POINTS, dtype=torch.float64)
    epochs = study.load("ll_r").training.epochs
    found = {}
    for name in SHOWN:
        loss = _summed(study, name, epochs)
        found[name] = gradient(loss, logits, 0), gradient(loss, logits, 1)
    header = ["loss", *(f"unannotated, at {at:g}" for at in READ_AT), "largest", "where"]
    header += [f"positive, at {at:g}" for at in READ_AT]
    rows, numbers = [], {}
    for name, (unannotated, positive) in found.items():
        size, where = largest(logits, unannotated)
        numbers |= {f"{name}/largest": size, f"{name}/where": where[-1]}
        rows.append([name, *_read(logits, unannotated), f"{size:.4f}", _places(where), *_read(logits, positive)])
    summary = (
        "The gradient of an unannotated label under AN grows with its logit, so a positive that nobody annotated is "
        "pushed down hardest where it is recognised. EM's (https://arxiv.org/abs/2203.16219) is small, returns to "
        "zero on both sides and pushes towards the undecided. LL-R drops the highest losses of its batch, here of "
        f"logits spread evenly, in epoch {epochs}."
    )
    return Finding(_gradient_figure(logits, found), header, rows, summary, numbers)


def _gradient_figure(logits: Tensor, found: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    unannotated, positive = ({name: pair[which] for name, pair in found.items()} for which in (0, 1))
    figure = Figure(figsize=(15, 5), layout=ConstrainedLayoutEngine(w_pad=0.12))
    whole, close, right = figure.subplots(1, 3)
    _draw(whole, "Unannotated label", logits, unannotated)
    _draw(close, "Unannotated label, close to zero", logits, unannotated)
    _draw(right, "Positive label", logits, positive)
    whole.legend(frameon=False)
    right.legend(frameon=False)
    reach = 1.6 * float(unannotated["em"].abs().max())
    close.set_ylim(-reach, reach)
    figure.suptitle("Gradient of each loss over the logit: above zero the label is pushed to absent, below to present")
    return figure


def gradient(loss: nn.Module, logits: Float[Tensor, "points"], label: int) -> Float[Tensor, "points"]:
    """dL/dx at each logit. All are one batch, which counts where a loss compares its entries.

    >>> from mls import losses
    >>> gradient(losses.build("an", reduction="sum"), torch.tensor([0.0]), 1)
    tensor([-0.5000])
    """
    inputs = logits[:, None].clone().requires_grad_()
    loss(inputs, torch.full_like(inputs, label)).backward()
    assert inputs.grad is not None
    return inputs.grad[:, 0]


def largest(logits: Float[Tensor, "points"], gradient: Float[Tensor, "points"]) -> tuple[float, list[float]]:
    """The largest size of the gradient, and the logits where it has it.

    >>> largest(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, 0.5, 2.0]))
    (2.0, [-1.0, 1.0])
    """
    size = gradient.abs()
    return float(size.max()), logits[size >= size.max() * (1 - 1e-9)].tolist()


def _summed(study: Study, name: str, epoch: int) -> nn.Module:
    """The loss as the protocol trains with it in that epoch, but a sum, so that each entry has its own gradient."""
    from mls.core import losses

    loss = losses.build(name, **{**study.load(name).loss_options(), "reduction": "sum"})
    assert isinstance(loss, losses.Loss)
    loss.set_epoch(epoch)
    return loss


def _draw(axes: Axes, title: str, logits: Tensor, curves: Mapping[str, Tensor]) -> None:
    """Losses that give the same curve share one line and one entry of the legend."""
    lines: list[tuple[list[str], Tensor]] = []
    for name, values in curves.items():
        same = next((names for names, drawn in lines if torch.allclose(drawn, values, atol=1e-9)), None)
        if same is None:
            lines.append(([name], values))
        else:
            same.append(name)
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    for names, values in lines:
        width = 3.0 if names[0] == "em" else 1.8
        style = "--" if names[0] == "ll_r" else "-"  # on top of AN's until it drops
        label = ", ".join(names)
        axes.plot(logits, values, style, color=COLOURS[names[0]], linewidth=width, label=label)
    axes.set(title=title, xlabel="logit x", ylabel="gradient dL/dx", xlim=(-EDGE, EDGE))


def _read(logits: Tensor, values: Tensor) -> list[str]:
    found = [round(float(values[(logits - at).abs().argmin()]), 4) for at in READ_AT]
    return [f"{value or 0:.4f}" for value in found]  # `or`: no -0.0000


def _places(logits: Sequence[float]) -> str:
    if len(logits) == 2 and abs(sum(logits)) < 1e-6:
        return f"±{logits[1]:.3f}"
    return ", ".join("at the edge" if abs(logit) == EDGE else f"{logit:.3f}" for logit in logits)


# --------------------------------------------------------------------------------------------------------- proportion

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
RIVALS = ("an", "ll_r", "em", "em_apl")


def proportion(study: Study) -> Finding:
    """Test mAP over the share of labels that is annotated: one training for each loss and share."""
    from mls.eval.supervised import test

    # Overrides count more than what is set here, so one of data.proportion leaves a single share.
    protocols = [study.load("an", *_regime(share)) for share in SHARES]
    shares = sorted({protocol.data.proportion for protocol in protocols})
    first = protocols[0]
    found: dict[str, list[float]] = {loss: [] for loss in RIVALS}
    for share in shares:
        for loss in RIVALS:
            training = study.trained(loss, *_regime(share), *apl_in_time(study, loss))
            found[loss].append(100 * test(training)[first.metric])
    header = ["loss", *(f"{100 * share:g} %" for share in shares)]
    rows = [[loss, *(f"{value:.2f}" for value in values)] for loss, values in found.items()]
    numbers = {f"{loss}/{share:g}": found[loss][place] for loss in RIVALS for place, share in enumerate(shares)}
    regime = first.data.labels.replace("_", " ")
    summary = (
        f"Test {first.metric} in %, one seed, over the annotated share ({regime}). The fewer labels are annotated, the "
        "more of those taken for negative are not, and the more a loss that allows for it should be ahead of AN."
    )
    figure = _proportion_figure(found, shares, f"{regime}, {first.recipe}", f"test {first.metric}, %")
    return Finding(figure, header, rows, summary, numbers)


def _proportion_figure(found: Mapping[str, list[float]], shares: list[float], title: str, unit: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    percent = [100 * share for share in shares]
    for (loss, values), marker in zip(found.items(), "osD^", strict=True):
        axes.plot(percent, values, f"{marker}-", color=COLOURS[loss], linewidth=2, markersize=7, label=loss)
    axes.set(title=f"How many labels a loss needs: {title}", xlabel="annotated share of the labels, %", ylabel=unit)
    axes.set_xticks(percent)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def apl_in_time(study: Study, loss: str) -> list[str]:
    """em_apl needs an epoch after its first pseudo-labels: a short training has them earlier than the protocol says."""
    training = study.load("an").training
    return [f"training.pseudo_from={min(training.pseudo_from, training.epochs - 1)}"] if loss == "em_apl" else []


def _regime(share: float) -> tuple[str, str]:
    return "data.labels=partial_positives", f"data.proportion={share}"


ANALYSES = {"gradients": gradients, "proportion": proportion}
