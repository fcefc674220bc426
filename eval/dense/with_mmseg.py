"""`backend: mmseg`: mmsegmentation's networks, transforms, losses, schedule and metric, run by mmengine's Runner. Ours
is what happens between its steps: the session of every loop. Its configuration is in mmseg_config.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mls import distributed
from mls.engine.session import Saving, Session
from mls.errors import UserError
from mls.eval.data.regions import RegionImages
from mls.eval.dense import mmseg_config
from mls.eval.dense.loop import LOG_EVERY, SAVE_EVERY, format_losses
from mls.eval.dense.mmseg_config import Config, OurTrunk, Start
from mls.eval.dense.mmseg_parts import MmsegViews, test_loader
from mls.eval.dense.prepare import backbone_source, load_images
from mls.eval.dense.schema import Segmentation
from mls.eval.dense.trunk import build_trunk
from mls.eval.dense.views import training_loader
from mls.eval.outcome import Outcome, for_file
from mls.exporting import to_mmseg, to_torchvision
from mls.exporting.source import save_tensors
from mls.frameworks import installed as frameworks
from mls.frameworks.resnet_plan import NoCounterpart
from mls.models.spatial import patches_of
from mls.progress import counting
from mls.streams import derive

# mmengine's own log and checkpoints: ours are in their place.
WITHOUT: dict[str, Any] = dict.fromkeys(("runtime_info", "timer", "logger", "checkpoint", "sampler_seed"))
NAMES = {"IoU": "miou", "Acc": "macc", "aAcc": "aacc"}


def run(
    protocol: Segmentation, weights: str, seed: int, folder: Path | None, title: str = "", quiet: bool = False
) -> Outcome:
    """Train and test once. With a folder the same call goes on where it was stopped."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run(protocol, weights, seed, Path(temporary), title, quiet)
    began = time.monotonic()
    device = distributed.start(protocol.training.device).device
    mmseg_config.check(protocol, device)
    data = load_images(protocol)
    state = folder / "state"
    start = distributed.on_main(lambda: write_backbone(protocol, weights, seed, state))
    config = mmseg_config.configuration(protocol, start, len(data.train.class_names), device)
    with frameworks.quiet():
        training = Training(protocol, config, data.train, data.test, device, seed, state)
        training.train(title or protocol.recipe, quiet)
        values = training.test(quiet)
    tested_weights, selection = for_file(training.network.state_dict()), f"after {protocol.training.steps} steps"
    return Outcome(values, selection, None, time.monotonic() - began, tested_weights)


def write_backbone(protocol: Segmentation, weights: str, seed: int, state: Path) -> Start:
    """Called in the first process."""
    state.mkdir(parents=True, exist_ok=True)
    source = backbone_source(protocol, weights, seed)
    file = state / to_torchvision.FILE
    try:
        to_mmseg.write(source, state, state)
        network = source.plan_for("mmseg")
    except NoCounterpart:
        patch, trunk = patches_of(source.backbone), build_trunk(source.backbone, protocol.model.output_stride)
        save_tensors({f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}, file)
        patch = patch if trunk.plain else (1, 1)
        network = OurTrunk(source.architecture, list(trunk.channels.values()), patch)
    return Start(network, source.mean, source.std, str(file))


class Training(Hook):
    """A Runner, and the hook that is called between its steps."""

    priority = "VERY_LOW"  # a step is over when the learning rate has moved as well

    def __init__(
        self,
        protocol: Segmentation,
        config: Config,
        train: RegionImages,
        test: RegionImages,
        device: torch.device,
        seed: int,
        state: Path,
        save_every: float = SAVE_EVERY,
    ) -> None:
        self.protocol, self.seed = protocol, seed
        self.session = Session(self, protocol.training.steps, Saving.in_folder(state, save_every), device)
        self.restored = self.session.restore()
        self.step = self.restored["step"] if self.restored else 0
        config = ConfigDict(config)
        seen, tested = (config.pop(f"{name}_pipeline") for name in ("train", "test"))
        config["test_evaluator"] = {**config["test_evaluator"], "collect_dir": str(state / "counted")}
        steps, batch = protocol.training.steps, protocol.training.batch_size
        self.views = MmsegViews(train, protocol.data, seed, seen)
        self.test_images = test_loader(MmsegViews(test, protocol.data, seed, tested))
        self.runner: Any = Runner(
            **config,
            work_dir=str(state),
            train_dataloader=training_loader(self.views, batch, self.step + 1, steps),
            test_dataloader=self.test_images,
            default_hooks=WITHOUT,
            custom_hooks=[self],
            launcher="pytorch" if distributed.world() > 1 else "none",  # the processes have met already
            randomness={"seed": derive(seed, "mmseg") % 2**32},
            experiment_name=f"{protocol.recipe} {time.monotonic_ns()}",  # mmengine keeps what it made under a name
            cfg={"model_wrapper_cfg": parallel(device)},
        )

    @property
    def network(self) -> nn.Module:
        found = self.runner.model
        return found.module if is_model_wrapper(found) else found

    def train(self, title: str, quiet: bool) -> None:
        with self.session.running(title, quiet):
            try:
                self.runner.train()
            finally:  # the Runner keeps the iterator, and with it workers, which would wait for more to do for ever
                self.runner.train_loop.dataloader_iterator = None

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        # mmengine draws the batches of earlier steps again to leave them out: there is nothing to draw.
        loop._iter = self.step
        loop.dataloader_iterator = chain(repeat(None, self.step), loop.dataloader_iterator)
        if self.restored is not None:  # only here has the Runner an optimizer
            self.load_state_dict(self.restored)
            self.restored = None

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _raise(data_batch)
        torch.manual_seed(derive(self.seed, "dense step", batch_idx + 1, distributed.rank()))  # for dropout

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self.step, total = batch_idx + 1, self.protocol.training.steps
        if self.step % LOG_EVERY == 0 or self.step == total:
            assert outputs is not None
            losses = {"head": outputs["decode.loss_ce"], "auxiliary": outputs["aux.loss_ce"]}
            epoch = 1 + (self.step * self.protocol.training.batch_size - 1) // len(self.views)
            self.session.progress.update(self.step, epoch, format_losses(losses, self.step))
        self.session.end_step()

    def state_dict(self) -> dict[str, Any]:
        """mmengine's own checkpoints also hold objects, which cannot be read without running what a file says."""
        return {
            "step": self.step,
            "weights": self.network.state_dict(),
            "optimizer": self.runner.optim_wrapper.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.runner.param_schedulers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        self.runner.optim_wrapper.load_state_dict(state["optimizer"])
        for scheduler, restored in zip(self.runner.param_schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(restored)

    def test(self, quiet: bool) -> dict[str, float]:
        for buffer in self.network.buffers():  # the statistics of the first process, as they were saved
            broadcast(buffer)
        count = len(self.test_images)
        with counting("test images", count, not quiet and distributed.rank() == 0) as self.tested:
            found = self.runner.test()
        return {ours: found[theirs] for theirs, ours in NAMES.items()}

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _raise(data_batch)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        self.tested(batch_idx + 1)


def _raise(batch: Any) -> None:
    """An image that cannot be read: raised in a worker, its sentence would arrive wrapped in a traceback."""
    if isinstance(batch, UserError):
        raise batch


def parallel(device: torch.device) -> Config:
    """Of several processes. SyncBN keeps statistics equal on GPUs; on CPUs all have those of the first process."""
    on_gpu = device.type == "cuda"
    return {
        "type": "MMDistributedDataParallel",
        "device_ids": [device.index] if on_gpu else None,
        **distributed.exchanging_buffers(not on_gpu),
    }
