"""`backend: detectron2` of `task: detection`: its network, data, step, schedule and evaluators on the protocol's
configuration (detectron2_config.py, detectron2_data.py). The loop is ours: a session, as around every loop."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mls import distributed
from mls.engine.session import Saving, Session
from mls.errors import DataError, DivergedError
from mls.eval.dense import detectron2_data
from mls.eval.dense import loop as our_loop
from mls.eval.dense.detectron2_config import RECIPES, OurTrunk, configuration, refuse_unknown_to_detectron2
from mls.eval.dense.loop import LOG_EVERY, SAVE_EVERY, check_batch_size, check_precision
from mls.eval.dense.prepare import backbone_source, load_images
from mls.eval.dense.schema import Detection, Schedule
from mls.eval.dense.trunk import build_trunk
from mls.eval.outcome import Outcome, for_file
from mls.exporting import to_detectron2, to_torchvision
from mls.exporting.source import save_tensors
from mls.frameworks import installed as frameworks
from mls.models.momentum import HALF, precision_on
from mls.progress import counting
from mls.streams import derive


def run(protocol: Detection, weights: str, seed: int, folder: Path, title: str = "", quiet: bool = False) -> Outcome:
    """Train and test once. The same call goes on where it was stopped."""
    began = time.monotonic()
    with frameworks.quiet(), without_the_workers_traceback():
        cfg, images = prepare(protocol, weights, seed, folder / "state")
        training = Detectron2Training(protocol, cfg, images, seed, folder / "state")
        training.train(title, quiet)
        values = tested(cfg, training.network, quiet)
    tested_weights, selection = for_file(training.network.state_dict()), f"after {protocol.training.steps} steps"
    return Outcome(values, selection, None, time.monotonic() - began, tested_weights)


def prepare(protocol: Detection, weights: str, seed: int, state: Path) -> tuple[Any, int]:
    """detectron2's configuration with its data registered, and the number of images to learn from."""
    device, world = distributed.start(protocol.training.device).device, distributed.world()
    check_batch_size(protocol.training)
    check_precision(protocol.training, device, "detectron2")
    data = load_images(protocol)  # refuses what is missing or not whole before detectron2 sees it
    learnt = len(data.train.with_objects())
    if not learnt:
        raise DataError(f"none of the {len(data.train)} training images has an object: give others with data.root")
    source = backbone_source(protocol, weights, seed)
    refuse_unknown_to_detectron2(protocol, source)
    trunk = build_trunk(source.backbone) if source.plan is None else None
    ours = None if trunk is None else OurTrunk.of(source.architecture, trunk, protocol.model)

    def write() -> None:
        state.mkdir(parents=True, exist_ok=True)
        if trunk is None:
            to_detectron2.write(source, state, state)
        else:
            place, file = "net" if trunk.plain else "bottom_up", state / to_torchvision.FILE
            tensors = {f"backbone.{place}.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
            save_tensors({"model": tensors}, file)
            (state / to_detectron2.FPN).write_text(to_detectron2.recipe_text(to_detectron2.FPN, source, file))
        if detectron2_data.written(protocol.data):
            detectron2_data.write(data, state / "data")

    distributed.on_main(write)
    train, test = detectron2_data.register(protocol.data, state / "data")
    recipe, classes = state / RECIPES[protocol.model.neck], len(data.train.class_names)
    cfg = configuration(protocol, recipe, train, test, classes, device.type, world, ours)
    return cfg, learnt


class Detectron2Training:
    """Trains detectron2's network. Its state is saved in the folder, and the same arguments resume from it: with
    the same weights, momentum, rate and step, and images and proposals that are drawn anew."""

    def __init__(
        self, protocol: Detection, cfg: Any, images: int, seed: int, state: Path, save_every: float = SAVE_EVERY
    ) -> None:
        from detectron2.checkpoint import DetectionCheckpointer  # pyright: ignore
        from detectron2.engine import create_ddp_model  # pyright: ignore
        from detectron2.modeling import build_model  # pyright: ignore
        from detectron2.solver import build_lr_scheduler  # pyright: ignore

        self.cfg, self.images, self.seed = cfg, images, seed
        self.draw("init")  # heads are the same whatever the backbone has drawn
        self.network: nn.Module = build_model(cfg)
        self.device = next(self.network.parameters()).device
        self.reduced = HALF.get(precision_on(self.device, protocol.training.precision, "training.precision"))
        self.session = Session(self, cfg.SOLVER.MAX_ITER, Saving.in_folder(state, save_every), self.device)
        restored = self.session.restore()
        if restored is None:
            DetectionCheckpointer(self.network).load(cfg.MODEL.WEIGHTS)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.parallel = create_ddp_model(self.network, device_ids=ids, **distributed.exchanging_buffers(False))
        self.optimizer = build_optimizer(protocol.training, cfg, self.network)
        self.schedule = build_lr_scheduler(cfg, self.optimizer)
        self.step = 0
        self.trainer = self.build_trainer()
        if restored is not None:
            self.load_state_dict(restored)

    def build_trainer(self) -> Any:
        from detectron2.engine import AMPTrainer, SimpleTrainer  # pyright: ignore

        if self.reduced is None:
            return SimpleTrainer(self.parallel, self.batches("order"), self.optimizer)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.reduced is torch.float16)
        return AMPTrainer(
            self.parallel, self.batches("order"), self.optimizer, grad_scaler=scaler, precision=self.reduced
        )

    def draw(self, *purpose: str | int) -> None:
        """Seeds what detectron2 draws from: torch's, numpy's and Python's own streams."""
        from detectron2.utils.env import seed_all_rng  # pyright: ignore

        seed_all_rng(derive(self.seed, "detectron2", *purpose) % 2**32)

    def batches(self, purpose: str) -> Iterable[Any]:
        """detectron2's endless stream of training batches; another one for each step that it is begun at."""
        from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts  # pyright: ignore
        from detectron2.data.samplers import TrainingSampler  # pyright: ignore

        def stream() -> Iterator[Any]:
            dataset = get_detection_dataset_dicts(self.cfg.DATASETS.TRAIN)
            sampler = TrainingSampler(len(dataset), seed=derive(self.seed, "detectron2", purpose, self.step))
            self.draw(purpose, self.step, distributed.rank())
            mapper = Whole(DatasetMapper(self.cfg, True))
            yield from build_detection_train_loader(self.cfg, dataset=dataset, mapper=mapper, sampler=sampler)

        return stream()

    def train(self, title: str = "", quiet: bool = False) -> None:
        from detectron2.utils.events import EventStorage  # pyright: ignore

        total = self.cfg.SOLVER.MAX_ITER
        with self.session.running(title, quiet), EventStorage(self.step) as self.trainer.storage:
            while self.step < total:
                self.train_step()
                if self.step % LOG_EVERY == 0 or self.step == total:
                    epoch = 1 + (self.step * self.cfg.SOLVER.IMS_PER_BATCH - 1) // self.images
                    self.session.progress.update(self.step, epoch, format_losses(self.trainer.storage.latest()))
                self.session.end_step()
        if self.cfg.TEST.PRECISE_BN.ENABLED:
            self.measure_statistics(show=not quiet and distributed.rank() == 0)
        # Without SyncBN every process has its own statistics; the first one's are tested, by all.
        buffers = distributed.from_main({name: one.cpu() for name, one in self.network.named_buffers()})
        self.network.load_state_dict(buffers, strict=False)

    def train_step(self) -> None:
        self.trainer.iter = self.trainer.storage.iter = self.step
        try:
            self.trainer.run_step()
        except FloatingPointError:
            raise DivergedError(
                f"the loss or a proposal is no number at step {self.step + 1}: lower training.lr, or raise "
                "training.warmup_steps"
            ) from None
        self.schedule.step()
        self.step += 1

    def measure_statistics(self, show: bool) -> None:
        from detectron2.engine.hooks import PreciseBN  # pyright: ignore

        count = self.cfg.TEST.PRECISE_BN.NUM_ITER
        self.network.train()
        with counting("statistics of batch normalisation", count, show) as progress:
            PreciseBN(0, self.parallel, shown(self.batches("statistics"), progress), count).update_stats()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": self.network.state_dict(),
            "trainer": self.trainer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["weights"])
        self.trainer.load_state_dict(state["trainer"])
        self.schedule.load_state_dict(state["schedule"])


def build_optimizer(schedule: Schedule, cfg: Any, network: Any) -> torch.optim.Optimizer:
    """detectron2's SGD for its own networks, else the optimizer of our own loop: AdamW, rates that fall."""
    from detectron2.solver import build_optimizer  # pyright: ignore

    if "TRUNK" not in cfg.MODEL and (schedule.optimizer, schedule.layer_decay) == ("sgd", 1.0):
        return build_optimizer(cfg, network)
    below = network.backbone
    for name in ("bottom_up", "net"):  # of FPN, of ViTDet's pyramid
        below = getattr(below, name, below)
    return our_loop.build_optimizer(schedule, network, below)


@dataclass
class Whole:
    """detectron2's reading of an image, with a sentence where it cannot be read."""

    mapper: Callable[[dict[str, Any]], Any]

    def __call__(self, image: dict[str, Any]) -> Any:
        from detectron2.data.detection_utils import SizeMismatchError  # pyright: ignore

        try:
            return self.mapper(image)
        except (OSError, SizeMismatchError) as error:
            raise DataError(
                f"{image['file_name']} cannot be read ({' '.join(str(error).split())}): a benchmark needs all of its "
                "images, so download this one again"
            ) from None


def format_losses(numbers: dict[str, tuple[float, int]]) -> dict[str, str]:
    """detectron2's losses for people.

    >>> format_losses({"total_loss": (2.0, 7), "loss_cls": (1.5, 7), "data_time": (0.1, 7), "loss_rpn_cls": (0.5, 7)})
    {'loss': '2.000', 'cls': '1.500', 'rpn_cls': '0.500'}
    """
    losses = {name: f"{value:.3f}" for name, (value, _) in numbers.items() if "loss" in name}
    return {"loss": losses.pop("total_loss", "")} | {name.removeprefix("loss_"): text for name, text in losses.items()}


@contextlib.contextmanager
def without_the_workers_traceback() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None


def shown(batches: Iterable[Any], progress: Callable[[int], None]) -> Iterator[Any]:
    for number, batch in enumerate(batches, start=1):
        yield batch
        progress(number)


def tested(cfg: Any, network: nn.Module, quiet: bool) -> dict[str, float]:
    """What detectron2's own evaluator says, the same in all processes."""
    from detectron2.data import DatasetMapper, build_detection_test_loader  # pyright: ignore
    from detectron2.evaluation import DatasetEvaluators, inference_on_dataset  # pyright: ignore

    (name,) = cfg.DATASETS.TEST
    evaluator = detectron2_data.build_evaluator(name, cfg.MODEL.MASK_ON)
    loader = build_detection_test_loader(cfg, name, mapper=Whole(DatasetMapper(cfg, False)))
    show = not quiet and distributed.rank() == 0
    with counting("test images", len(loader), show) as progress, contextlib.redirect_stdout(io.StringIO()):
        results = inference_on_dataset(network, loader, DatasetEvaluators([evaluator, Counted(progress)]))
    return distributed.from_main(detectron2_data.renamed(results))


@dataclass
class Counted:
    """An evaluator of detectron2 that only counts images."""

    progress: Callable[[int], None]
    done: int = 0

    def reset(self) -> None:
        self.done = 0

    def process(self, inputs: list[Any], outputs: list[Any]) -> None:
        self.done += len(inputs)
        self.progress(self.done)

    def evaluate(self) -> None:
        return None
