"""The one training loop of the dense tasks, counted in steps: a network that gives losses, an optimizer, a schedule,
exact resume, one process or several. What is trained is in detector.py and segmenter.py, what it sees in views.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mls import distributed
from mls.engine.schedule import stepwise
from mls.engine.session import Saving, Session
from mls.errors import ConfigError, DivergedError
from mls.eval.data.objects import ObjectImages
from mls.eval.data.regions import RegionImages
from mls.eval.dense.schema import Dense, Schedule
from mls.eval.dense.trunk import Intermediates, Trunk
from mls.eval.dense.views import training_batches
from mls.models.momentum import HALF, precision_on
from mls.models.stages import stages, tokens
from mls.progress import counting
from mls.streams import derive

SAVE_EVERY = 300.0  # seconds
LOG_EVERY = 20  # steps between two readings of the loss: each waits for the GPU


def check_batch_size(training: Schedule) -> None:
    if training.batch_size % distributed.world():
        raise ConfigError(
            f"training.batch_size {training.batch_size} does not divide into {distributed.world()} processes: choose a "
            "multiple"
        )


def check_precision(training: Schedule, device: torch.device, framework: str) -> None:
    if device.type == "cpu" and precision_on(device, training.precision, "training.precision") != "fp32":
        raise ConfigError(f"{framework} has training.precision={training.precision} on a GPU alone: use fp32 on a CPU")


class DenseTraining:
    """Trains `network` in place. With a folder its state is saved there, and the same arguments resume from it."""

    def __init__(
        self,
        protocol: Dense,
        network: nn.Module,
        images: ObjectImages | RegionImages,
        seed: int,
        folder: Path | None = None,
        save_every: float = SAVE_EVERY,
    ) -> None:
        self.schedule, self.data, self.images, self.seed = protocol.training, protocol.data, images, seed
        check_batch_size(self.schedule)
        self.device = distributed.start(self.schedule.device).device
        self.network = network.to(self.device)
        self.parallel = distributed.in_parallel(self.network)
        self.optimizer = build_optimizer(self.schedule, network)
        self.reduced = HALF.get(precision_on(self.device, self.schedule.precision, "training.precision"))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.reduced is torch.float16)
        self.step = 0
        saving = Saving.in_folder(None if folder is None else folder / "state", save_every)
        self.session = Session(self, self.schedule.steps, saving, self.device)
        state = self.session.restore()
        if state is not None:
            self.load_state_dict(state)

    def train(self, title: str = "", quiet: bool = False) -> None:
        total = self.schedule.steps
        with self.session.running(title, quiet):
            for batch in self.batches(self.step + 1, total):
                self.step += 1
                losses = self.train_step(batch)
                if self.step % LOG_EVERY == 0 or self.step == total:
                    epoch = 1 + (self.step * self.schedule.batch_size - 1) // len(self.images)
                    self.session.progress.update(self.step, epoch, format_losses(losses, self.step))
                self.session.end_step()
        self.measure_statistics(show=not quiet and distributed.rank() == 0)

    def batches(self, first: int, last: int) -> Any:
        if first > last:
            return ()
        return training_batches(self.images, self.data, self.schedule.batch_size, self.seed, first, last)

    def train_step(self, batch: Sequence[tuple[Tensor, Any]]) -> dict[str, Tensor]:
        lr = self.schedule.lr * lr_share(self.schedule, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)  # a state of before has none
        self.network.train()
        losses = self.losses(batch, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, batch: Sequence[tuple[Tensor, Any]], step: int) -> dict[str, Tensor]:
        images, targets = zip(*batch, strict=True)
        # Which proposals and sizes are drawn, and what dropout drops, is decided by torch's own stream.
        torch.manual_seed(derive(self.seed, "dense step", step, distributed.rank()))
        with torch.autocast(self.device.type, dtype=self.reduced, enabled=self.reduced is not None):
            return self.parallel(images, targets)

    @torch.no_grad()
    def measure_statistics(self, show: bool) -> None:
        """Precise-BN: the last weights' own statistics in the place of a mean over many steps' weights. After a stop
        it starts anew."""
        norms = [part for part in self.network.modules() if isinstance(part, _BatchNorm)]
        count, total = self.schedule.precise_bn, self.schedule.steps
        if not count or not norms:
            return
        self.network.train()
        for part in norms:
            part.reset_running_stats()
            part.momentum = None  # a plain mean over all batches
        with counting("statistics of batch normalisation", count, show) as progress:
            for step, batch in enumerate(self.batches(total + 1, total + count), start=total + 1):
                self.losses(batch, step)
                progress(step - total)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def format_losses(losses: dict[str, Tensor], step: int) -> dict[str, str]:
    values = {name.removeprefix("loss_"): float(loss) for name, loss in losses.items()}
    total = sum(values.values())
    if not math.isfinite(total):
        raise DivergedError(f"the loss is {total} at step {step}: lower training.lr, or raise training.warmup_steps")
    return {"loss": f"{total:.3f}"} | {name: f"{value:.3f}" for name, value in values.items()}


def build_optimizer(schedule: Schedule, network: nn.Module, backbone: nn.Module | None = None) -> torch.optim.Optimizer:
    """SGD, where normalisation layers have their own weight decay; or AdamW, where biases, positions and tokens have it
    as well. `backbone`: the part below the heads, where rates fall; by default the network's trunk."""
    norms = {id(p) for part in network.modules() if isinstance(part, _BatchNorm) for p in part.parameters()}
    if schedule.optimizer == "adamw":
        norms = tokens(network) | {id(p) for p in network.parameters() if p.ndim < 2}
    learning = [p for p in network.parameters() if p.requires_grad]
    if backbone is None:
        backbone = next(part for part in network.modules() if isinstance(part, Trunk | Intermediates))
    below = stages(backbone)[::-1] if schedule.layer_decay < 1 else []
    distance = {id(p): far for far, stage in enumerate(below, start=1) for p in stage}
    groups: list[dict[str, Any]] = []
    for far in range(len(below) + 1):
        here, share = [p for p in learning if distance.get(id(p), 0) == far], schedule.layer_decay**far
        for chosen, decay in ((False, schedule.weight_decay), (True, schedule.norm_decay)):
            own = [p for p in here if (id(p) in norms) == chosen]
            groups.append({"params": own, "lr": schedule.lr * share, "weight_decay": decay, "share": share})
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, schedule.lr)
    return torch.optim.SGD(groups, schedule.lr, momentum=schedule.momentum)


def lr_share(schedule: Schedule, step: int) -> float:
    """The share of the learning rate at a step, which counts from 1.

    >>> falling = Schedule(steps=4, falls=[2], warmup_steps=0)
    >>> [lr_share(falling, step) for step in (1, 2, 3)]
    [1.0, 1.0, 0.1]
    >>> [round(lr_share(Schedule(steps=4, schedule="poly", warmup_steps=0), step), 3) for step in (1, 2, 4)]
    [1.0, 0.772, 0.287]
    """
    if step <= schedule.warmup_steps:
        done = (step - 1) / schedule.warmup_steps
        return schedule.warmup_from * (1 - done) + done
    if schedule.schedule == "steps":
        return stepwise(step, schedule.falls)
    lowest = schedule.min_lr / schedule.lr
    return lowest + (1 - lowest) * (1 - (step - 1) / schedule.steps) ** schedule.power
