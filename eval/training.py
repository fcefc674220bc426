"""The one supervised loop: a classifier, a loss, and labels that may change while it learns (LL-Cp writes positives,
asymmetric pseudo-labelling adds soft negatives). Which labels it gets is decided in regimes.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from mls import distributed
from mls.core import losses
from mls.core.losses import Loss
from mls.engine.session import Saving, Session
from mls.errors import ConfigError, DivergedError, Stopped
from mls.eval.classifier import Classifier, Several
from mls.eval.data import LabelledImages, presence
from mls.eval.images import Batches, mixing, shares
from mls.eval.optimizer import build, build_linear_init, frozen_parts, idle, set_lr, weight_penalty
from mls.eval.protocol import Supervised
from mls.models.finite import finite
from mls.models.momentum import HALF, precision_on
from mls.streams import derive, generator

SAVE_EVERY = 300.0  # seconds; the end of every epoch is saved as well


class Training:
    """Trains `learner` in place. With a folder its state is saved there, and the same arguments resume from it."""

    def __init__(
        self,
        protocol: Supervised,
        learner: Classifier | Several,
        train: LabelledImages,
        observed: Int8[Tensor, "images classes"] | Int64[Tensor, "images"],  # the second: each image's one class
        validate: Callable[[Training], dict[str, float]],
        seed: int,
        folder: Path | None = None,
    ) -> None:
        self.protocol, self.seed, self.validate = protocol, seed, validate
        self.device = distributed.start(protocol.training.device).device
        self.main = distributed.rank() == 0
        self.learner = learner.to(self.device)
        self.classifier = self.learner.networks[0]  # the one that is tested
        self.loss = build_loss(protocol).to(self.device)
        self.single_label, self.classes = observed.ndim == 1, len(train.class_names)
        refuse_impossible(protocol, self.loss, self.single_label)
        self.observed = observed.clone()  # LL-Cp changes it
        self.pseudo: Tensor | None = None
        if self.loss.relabels == "epoch":
            self.pseudo = torch.full(observed.shape, torch.nan)  # soft labels; NaN where there is none
        if not self.single_label:
            self.loss.observe(self.observed)
            self.loss.to(self.device)
        for network in self.learner.networks:
            network.freeze(frozen_parts(protocol.training, network))
        self.parallel = distributed.in_parallel(self.learner, learns_statistics=not self.classifier.frozen)
        self.optimizer = build(protocol.training, self.learner, self.loss)
        precision = protocol.training.precision
        self.reduced = HALF.get(precision_on(self.device, precision, "training.precision"))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.reduced is torch.float16)
        self.batches = Batches(train, protocol, seed, self.device)
        self.steps_per_epoch = -(-len(train) // protocol.training.batch_size)
        self.total = protocol.training.epochs * self.steps_per_epoch

        self.step = 0  # steps taken end to end
        self.summed = torch.zeros((), dtype=torch.float64)  # loss of this epoch's steps
        self.initialised = protocol.training.linear_epochs == 0
        self.history: list[dict[str, float]] = []  # one entry an epoch
        self.best: dict[str, Tensor] | None = None  # the classifier's weights at the best epoch, with the loss' own
        self.ended = ""  # why it stopped before its last epoch
        saving = Saving.in_folder(None if folder is None else folder / "state", SAVE_EVERY)
        self.session = Session(self, self.total, saving, self.device)
        state = self.session.restore()
        if state is not None:
            self.load_state_dict(state)

    # ------------------------------------------------------------------------------------------------ the loop

    def train(
        self, title: str = "", quiet: bool = False, after_epoch: Callable[[Training], None] | None = None
    ) -> None:
        self.title = title
        with self.session.running(title, quiet):
            if not self.initialised:
                self.linear_init()
            while len(self.history) < self.protocol.training.epochs and not self.ended:
                self.train_epoch(len(self.history) + 1)
                if after_epoch is not None:
                    after_epoch(self)
        if self.protocol.training.select != "last" and self.best is not None:
            self.load_weights(self.best)

    def train_epoch(self, epoch: int) -> None:
        """The rest of an epoch. Of one that was stopped after its last step that is only what follows the steps."""
        self.loss.set_epoch(epoch)
        watched = self.learnt_by_the_loss(epoch)
        for rows, views in self.batches.training(epoch, self.step - (epoch - 1) * self.steps_per_epoch):
            self.step += 1
            self.summed = self.summed.to(self.device) + self.train_step(rows, views)
            self.session.progress.update(self.step, epoch, {})
            self.session.end_step()
        mean = float(self.summed) / self.steps_per_epoch
        self.summed = torch.zeros((), dtype=torch.float64)
        if not math.isfinite(mean):
            raise DivergedError(f"the loss is {mean} in epoch {epoch}: lower training.lr")
        self.warn_of_idle(watched)
        self.add_pseudo_labels(epoch)
        found = self.validate(self)
        self.judge({"epoch": float(epoch), "loss": mean} | found)
        self.session.save()
        metric = self.protocol.metric
        validated = f"  {metric} {100 * found[metric]:.2f} on the validation part" if found else ""
        epochs = self.protocol.training.epochs
        self.session.say(f"{self.title}  epoch {epoch}/{epochs}  loss {mean:.4g}{validated}")

    def learnt_by_the_loss(self, epoch: int) -> dict[str, Tensor]:
        """What the loss learns, at the start of the first epoch of full learning rate; else nothing."""
        starts = self.step == (epoch - 1) * self.steps_per_epoch
        if not starts or epoch != math.ceil(self.protocol.training.warmup_epochs) + 1:
            return {}
        return {name: parameter.detach().clone() for name, parameter in self.loss.named_parameters()}

    def warn_of_idle(self, before: dict[str, Tensor]) -> None:
        """A margin that never moves is no adaptive margin, whatever the table calls it."""
        for name, share in idle(self.loss, before).items():
            self.session.say(
                f"{self.title}: warning: the {name} that {self.protocol.training.loss} learns moved by "
                f"{100 * share:.2g} % of itself in an epoch: raise training.loss_lr"
            )

    def train_step(self, rows: Tensor, views: Tensor) -> Tensor:
        training = self.protocol.training
        set_lr(self.optimizer, training, self.step, self.steps_per_epoch)
        share, partners = 1.0, rows
        if training.mixup:  # within each process' share
            share, order = mixing(training.mixup, len(views), derive(self.seed, "mixup", self.step))
            views, partners = (
                views[order.to(self.device)].lerp(views, share),
                shares(rows)[:, order].flatten()[: len(rows)],
            )
        torch.manual_seed(derive(self.seed, "dropout", self.step, *([] if self.main else [distributed.rank()])))
        self.learner.train()
        with torch.autocast(self.device.type, dtype=self.reduced, enabled=self.reduced is not None):
            outputs = self.parallel(views)
        if distributed.world() > 1:
            # Each process works out the loss of the whole batch: some losses compare its images with one another.
            outputs = distributed.gather_with_gradient([outputs.float()])[0][: len(rows)]
        loss = self.loss_of(outputs, rows)
        if training.mixup:
            loss = share * loss + (1 - share) * self.loss_of(outputs, partners)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss + weight_penalty(training, self.learner)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.loss.relabels == "step":
            relabelled, _ = self.loss.relabel(self.observed[rows].to(self.device), None, outputs.detach().float())
            self.observed[rows] = relabelled.cpu()
        return loss.detach()

    def loss_of(self, outputs: Float[Tensor, "batch classes"], rows: Tensor) -> Float[Tensor, ""]:
        pseudo = None if self.pseudo is None else self.pseudo[rows].to(self.device)
        loss = self.loss.annotated_only if self.protocol.training.ignore_unknown else self.loss
        return loss(outputs.float(), self.labels_of(rows), pseudo, rows.to(self.device))

    def labels_of(self, rows: Tensor) -> Int8[Tensor, "batch classes"]:
        """A class number becomes a row of labels only here: those of all ImageNet would take 1.3 GB."""
        observed = self.observed[rows].to(self.device)
        return presence(F.one_hot(observed, self.classes)) if self.single_label else observed

    def linear_init(self) -> None:
        """LinearInit: the last layer alone, on features of the images as they are. A schedule stays at its start."""
        training = self.protocol.training
        self.session.say(f"{self.title}: features of {len(self.observed)} images, then the last layer alone")
        features = self.features()
        optimizer = build_linear_init(training, self.learner, self.loss)
        best, best_value = None, -math.inf
        for epoch in range(1, training.linear_epochs + 1):
            order = torch.randperm(len(features), generator=generator(self.seed, "linear order", epoch))
            for rows in order.split(training.linear_batch_size):
                loss = self.loss_of(self.learner.head(features[rows].to(self.device)), rows)  # alike in all processes
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if training.linear_select == "best":
                value = self.validate(self)[self.protocol.metric]
                if value > best_value:
                    best_value = value
                    best = {name: tensor.detach().cpu().clone() for name, tensor in self.weights().items()}
            (code,) = distributed.largest([float(self.session.stop.exit_code)], self.device)
            if code:  # minutes at most: the next start repeats it
                raise Stopped("a signal came during LinearInit, which starts anew", int(code))
        if best is not None:
            self.load_weights(best)
        self.initialised = True
        self.session.save()

    # ---------------------------------------------------------------------------------------------- features and labels

    def features(self) -> Float[Tensor, "images *networks dim"]:
        """Of all training images, without augmentation."""
        return finite(self._of_each(self.batches, lambda images: self.learner.features(images).float()))

    def scores(self, images: LabelledImages | None = None) -> Float[Tensor, "images classes"]:
        """Probabilities of the training images, or of others, without augmentation. Where each image has one class,
        the outputs as they are: their probabilities round to 1, and would tie."""
        batches = self.batches if images is None else Batches(images, self.protocol, self.seed, self.device)

        def score(views: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=self.reduced, enabled=self.reduced is not None):
                outputs = self.classifier(views)
            return outputs.float() if self.single_label else self.loss.predict(outputs.float())

        return self._of_each(batches, score)

    @torch.no_grad()
    def _of_each(self, batches: Batches, compute: Callable[[Tensor], Tensor]) -> Float[Tensor, "images *values"]:
        """In the images' order; the processes share them."""
        self.learner.eval()
        rows = torch.arange(len(batches.pixels.images))
        mine = torch.cat([compute(views).cpu() for _, views in batches.plain(shares(rows)[distributed.rank()])])
        return torch.cat(distributed.objects(mine))[: len(rows)]

    def add_pseudo_labels(self, epoch: int) -> None:
        """Once an epoch the loss may complete the labels by the scores of all images. The last round would train
        nothing."""
        training = self.protocol.training
        rounds = training.epochs - training.pseudo_from
        if self.loss.relabels != "epoch" or not training.pseudo_from <= epoch < training.epochs:
            return
        scores = self.scores()
        self.observed, self.pseudo = self.loss.relabel(
            self.observed, self.pseudo, scores, training.pseudo_share, rounds
        )

    def judge(self, entry: dict[str, float]) -> None:
        """Copy the weights of the best epoch so far, and set `ended` where it is time to stop."""
        training, metric = self.protocol.training, self.protocol.metric
        self.history.append(entry)
        if metric not in entry:
            return
        values = [past[metric] for past in self.history]
        if entry[metric] > max(values[:-1], default=float("-inf")):
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.weights().items()}
        since = len(values) - 1 - values.index(max(values))
        if training.patience is not None and since > training.patience:
            self.ended = f"stopped after epoch {len(values)}: no new best {metric} for {since}"
        if training.drop is not None and values[-1] < max(values) - training.drop / 100:
            self.ended = f"stopped after epoch {len(values)}: {metric} fell by more than {training.drop:g} points"

    def best_value(self) -> float | None:
        """The best value of the protocol's metric on the validation part, if there is one."""
        return max((past[self.protocol.metric] for past in self.history if self.protocol.metric in past), default=None)

    def selection(self) -> str:
        """How the tested weights were chosen: stands beside every result."""
        epochs, metric = len(self.history), self.protocol.metric
        if self.protocol.training.select == "last" or self.best is None:
            return f"last of {epochs} epochs"
        best = 1 + max(range(epochs), key=lambda i: self.history[i][metric])
        ended = f", {self.ended}" if self.ended else ""
        part = "weakly labelled validation part" if self.protocol.training.select == "weak" else "validation part"
        return f"epoch {best} of {epochs}, best {metric} on the {part}{ended}"

    # ------------------------------------------------------------------------------------------------ state

    def weights(self) -> dict[str, Tensor]:
        """The classifier and what its loss learnt (a cosine classifier predicts with the loss' scale and margin)."""
        parts: Iterable[tuple[str, nn.Module]] = (("classifier", self.classifier), ("loss", self.loss))
        return {f"{part}.{name}": tensor for part, module in parts for name, tensor in module.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for part, module in (("classifier.", self.classifier), ("loss.", self.loss)):
            found = {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
            module.load_state_dict(found)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "summed": self.summed,
            "initialised": self.initialised,
            "weights": self.weights(),
            "peers": [network.state_dict() for network in self.learner.networks[1:]],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "observed": self.observed,
            "pseudo": self.pseudo,
            "history": self.history,
            "best": self.best,
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_weights(state["weights"])
        for network, weights in zip(self.learner.networks[1:], state.get("peers", ()), strict=True):
            network.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("step", "summed", "initialised", "observed", "pseudo", "history", "best", "ended"):
            setattr(self, name, state[name])


def refuse_impossible(protocol: Supervised, loss: Loss, single_label: bool) -> None:
    training = protocol.training
    if loss.takes_scores != bool(training.prior_scores):
        raise ConfigError(
            f"training.loss={training.loss} makes labels of class scores: give training.prior_scores=FILE"
            if loss.takes_scores
            else f"training.loss={training.loss} makes nothing of training.prior_scores: use training.loss=vlpl"
        )
    if loss.takes == "cosines" and training.boost != 1:
        raise ConfigError(f"training.boost is for logits, training.loss={training.loss} takes cosines: set it to 1")
    if loss.relabels == "step" and training.ignore_unknown:
        raise ConfigError(
            f"training.loss={training.loss} labels what is unknown, and training.ignore_unknown=true leaves it out: "
            "set it to false, or choose another loss"
        )
    if not loss.needs_index and loss.relabels == "never":
        return
    if loss.relabels == "epoch" and not 1 <= training.pseudo_from < training.epochs:
        raise ConfigError(
            f"training.pseudo_from is {training.pseudo_from} of {training.epochs} epochs: pseudo-labels need an epoch "
            "before them and one after, so choose a number from 1 to training.epochs - 1"
        )
    if single_label:
        raise ConfigError(
            f"training.loss={training.loss} completes labels that are partly unknown, but each image of "
            f"{protocol.data.name} has just one class, which is known: use training.loss=softmax"
        )
    if training.mixup:
        raise ConfigError(
            f"training.loss={training.loss} learns labels of each single image, which a mixture of two does not have: "
            "set training.mixup=0"
        )


def build_loss(protocol: Supervised) -> Loss:
    loss = losses.build(protocol.training.loss, **protocol.loss_options())
    if loss.reduction == "none":
        raise ConfigError("training.options.reduction=none gives no number to train with: use mean or sum")
    if protocol.training.ignore_unknown and not loss.can_leave_out_unknown():
        raise ConfigError(
            f"training.loss={protocol.training.loss} cannot leave unknown labels out: set "
            "training.ignore_unknown=false, or choose another loss, such as an or two_way"
        )
    if loss.reduction == "sum" and protocol.training.optimizer == "sgd":
        raise ConfigError(
            f"training.loss={protocol.training.loss} sums over batch and classes, thousands of times the mean, which "
            "SGD's steps grow with: set training.options.reduction=mean, or training.optimizer=adam"
        )
    return loss
