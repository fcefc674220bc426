"""The order of the images and the way they come: which ids make up which step is a pure function of (seed, step), so
processes, workers and a resume change nothing. Also accounts for the time the training waited."""

from __future__ import annotations

import multiprocessing.util
import os
import time
from collections.abc import Iterator
from threading import Event, Timer
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mls.config import Config
from mls.data import Batch, Source, ViewPlan
from mls.data.augment import in_worker
from mls.data.crops import CropDataset
from mls.data.listing import FileSource
from mls.distributed import Process
from mls.errors import ConfigError, DataError, UserError, command, lost_worker
from mls.signals import end_data_workers, end_with_data_workers, leave_signals_to_the_parent

Result = TypeVar("Result")

PREFETCH = 4  # batches that a worker makes ahead
SILENCE = 30.0  # minutes after which a worker that makes nothing is given up; of pretraining: engine.timeout_minutes


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Hands out this process' (epoch, id) lists, one a micro-batch, from a step on to the end of training."""

    def __init__(self, source: Source, config: Config, process: Process, first: int, last: int) -> None:
        self.source, self.seed = source, config.run.seed
        self.first, self.last = first, last
        self.batch = config.data.batch_size
        self.steps_per_epoch = steps_per_epoch(source, config)
        parts = process.world * config.engine.accumulate
        if self.batch % parts:
            raise ConfigError(
                f"data.batch_size {self.batch} does not divide into {process.world} processes × "
                f"engine.accumulate {config.engine.accumulate}: change one of them"
            )
        self.part = self.batch // parts
        self.slots = [process.rank + world_step * process.world for world_step in range(config.engine.accumulate)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = 0, None
        for step in range(self.first, self.last + 1):
            now, place = divmod(step - 1, self.steps_per_epoch)
            if now + 1 != epoch or order is None:
                epoch, order = now + 1, self.source.order(self.seed, now + 1)
            ids = order[place * self.batch : (place + 1) * self.batch]
            for slot in self.slots:
                yield [(epoch, int(i)) for i in ids[slot * self.part : (slot + 1) * self.part]]

    def __len__(self) -> int:
        return (self.last - self.first + 1) * len(self.slots)


def whole_batches(images: int, config: Config) -> int:
    """Of an epoch: its last, incomplete batch is left out."""
    return images // config.data.batch_size


def steps_per_epoch(source: Source, config: Config) -> int:
    count = whole_batches(len(source), config)
    if count == 0:
        raise DataError(
            f"{source.name} has {len(source)} images, fewer than one batch: "
            f"lower data.batch_size ({config.data.batch_size}) to {len(source)} or less"
        )
    return count


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(wanted: int | None) -> int:
    """As many as wanted; without a wish the cores this process may use, at most 8."""
    return min(8, cores()) if wanted is None else wanted


def remedy(source: Source, config: Config) -> str:
    """What costs least against waiting for data: more workers while there are cores, then smaller files."""
    workers = worker_count(config.data.workers)
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if workers < share:
        return f"set data.workers={share} (now {workers}; this process has {share} cores)"
    if isinstance(source, FileSource):
        pack = command("mls data pack --short-side 320", config.data.root, "NEW_FOLDER")
        return f"pack the images, {pack}, and train on that"
    return "give each process more cores; `mls bench input` says how many images a core can prepare"


# The frames of an error that nobody catches keep the workers alive, and a process that ends would wait for them for
# ever: they heed no SIGTERM.
multiprocessing.util.Finalize(None, end_with_data_workers, exitpriority=0)


class Loader:
    """Iterates over micro-batches; `waited` is the time since it was last read that the training stood waiting.

    A batch from a worker holds its crops until the micro-batches of one more step were asked for; then they are
    overwritten. A worker is at most PREFETCH batches ahead of the one that was handed over last.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        process: Process,
        first: int,
        last: int,
        plan: ViewPlan | None = None,
    ) -> None:
        workers = worker_count(config.data.workers)
        self.waited, self.minutes = 0.0, config.engine.timeout_minutes
        buffers, finish = PREFETCH + config.engine.accumulate, in_worker(config.engine, process.device)
        self.batches = DataLoader(
            ErrorsAsItems(CropDataset(source, config.augment, config.run.seed, buffers, plan, finish)),
            batch_sampler=StepSampler(source, config, process, first, last),
            num_workers=workers,
            collate_fn=already_collated,  # type: ignore[arg-type] (CropDataset makes whole batches)
            pin_memory=process.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=leave_signals_to_the_parent if workers else None,
            generator=torch.Generator(),  # its own, so that the global stream stays untouched
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = made(self.batches, self.minutes)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch


def in_workers(dataset: Dataset[Result | UserError], workers: int) -> Iterator[Result]:
    """The items of a data set, in order, made by worker processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=already_collated,
        worker_init_fn=leave_signals_to_the_parent if workers else None,
        generator=torch.Generator(),
    )
    return made(loader)


def made(loader: DataLoader[Any], minutes: float = SILENCE) -> Iterator[Any]:
    """What a loader makes. An error of the user is an item that is raised here: raised in a worker, its one sentence
    would arrive wrapped in the worker's traceback. A worker that is gone, or silent for so long, is a sentence. (The
    time-out of DataLoader does not cover the hand-over of tensors, which waits for ever for a worker that hangs.)"""
    items, silent = iter(loader), Event()

    def give_up() -> None:
        silent.set()
        end_data_workers()

    while True:
        timer = Timer(60 * minutes, give_up)
        timer.daemon = True
        if loader.num_workers:
            timer.start()
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:
            if silent.is_set():
                words = f"a data worker has made nothing for {minutes:g} minutes: see that the disk or network that"
                raise UserError(f"{words} holds the images answers, or raise engine.timeout_minutes") from None
            if isinstance(error, (EOFError, ConnectionError)):  # it went while it handed a batch over
                raise lost_worker(error) from None
            raise
        finally:
            timer.cancel()
        if isinstance(item, UserError):
            raise item
        yield item


class WholeBatches(Protocol):
    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch: ...


class ErrorsAsItems(Dataset[Batch | UserError]):
    """Hands over a user's error in the place of the batch: raised in a worker, its one sentence would arrive wrapped in
    the worker's traceback."""

    def __init__(self, images: WholeBatches) -> None:
        self.images = images

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch | UserError:
        try:
            return self.images.__getitems__(indices)
        except UserError as error:
            return error


def already_collated(item: Result) -> Result:
    """A collate function for items that are whole batches already."""
    return item
