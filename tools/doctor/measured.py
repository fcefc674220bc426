"""What `mls doctor` measures before a run: images are decoded, the loader is timed against three real steps, a file is
written where checkpoints will lie. What follows without measuring is in mls/engine/findings.py."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from mls.chunks import spaced
from mls.config import AugmentConfig, Config, MLSOptions, runs_root
from mls.core import methods
from mls.core.dictionary import Dictionary
from mls.core.method import Method
from mls.data import Batch, Source
from mls.data.augment import Augment
from mls.data.decode import UnreadableImage, decode
from mls.data.loader import Loader, remedy, worker_count
from mls.distributed import Process
from mls.engine import optim
from mls.engine.findings import Finding, Plan, Sizes, half_at_a_time, in_units, nearest_folder
from mls.errors import reason
from mls.frozen.features import embed
from mls.frozen.neighbours import RECALL, InMemorySource, Thumbnail, brightened, compressed, cropped
from mls.models.momentum import HALF, precision_on
from mls.monitor.verdict import WAITING
from mls.progress import duration
from mls.slurm.profile import Profile

IMAGES, TOGETHER = 200, 10  # images that are decoded, so many of them one after the other: frames of a film are alike
DUPLICATES = 0.1  # share of images with a near-duplicate that is worth telling
STEPS, FIRST_TRY, SECONDS = 3, 4, 15.0  # on a CPU a step of few images is tried, and a whole one if it fits in the time
LOADER_SECONDS, LOADER_BATCH = 4.0, 32
WRITTEN = 64 << 20  # bytes
ROWS = 1024  # of a dictionary that are filled together
SMALL = AugmentConfig(size=64)  # from which thumbnails are made


# --------------------------------------------------------------------------------------------------------- the images


def images(source: Source, config: Config) -> Iterator[Finding]:
    """Are they readable, as large as the crops, and different from each other?"""
    starts = spaced(max(1, len(source) - TOGETHER + 1), IMAGES // TOGETHER)
    ids = sorted({start + place for start in starts for place in range(TOGETHER) if start + place < len(source)})
    pixels, broken, began = [], [], time.perf_counter()
    for image in ids:
        try:
            pixels.append(decode(source.read(image)))
        except (UnreadableImage, OSError) as error:
            broken.append(f"{source.describe(image)} ({reason(error)})")
    each = (time.perf_counter() - began) / len(ids)
    words = f"{len(pixels)} of {len(ids)} are read, {1000 * each:.1f} ms each"
    if len(broken) <= config.data.max_unreadable * len(ids):
        yield Finding("decoding", "warning" if broken else "fine", f"{words}{f'; not {broken[0]}' if broken else ''}")
    else:
        share = ceil(200 * len(broken) / len(ids)) / 100  # twice what was seen
        words += f"; not {broken[0]}; the run stops above a share of {config.data.max_unreadable:g}"
        yield Finding("decoding", "fails", words, f"data.max_unreadable={min(1.0, share):g}")
    if pixels:
        yield _sides(pixels, config.augment.size)
    if len(pixels) > 1:
        yield near_duplicates(pixels)


def _sides(pixels: list[Tensor], size: int) -> Finding:
    sides = [min(image.shape[1:]) for image in pixels]
    middle = statistics.median_low(sides)
    words = f"shorter sides of {min(sides)} to {max(sides)} pixels, half of them up to {middle}; crops have {size}"
    if middle * 2 > size:
        return Finding("size of images", "fine", words)
    return Finding("size of images", "warning", f"{words}: most of a crop is interpolated", f"augment.size={middle}")


def near_duplicates(pixels: list[Tensor]) -> Finding:
    """Of images that follow each other in the data set and others, by thumbnails: altered copies say from which cosine
    on two images count as the same."""

    def features(some: list[Tensor]) -> Tensor:
        return embed(Thumbnail(), InMemorySource("images", [""] * len(some), some), range(len(some)), SMALL)

    own, some = features(pixels), pixels[:: max(1, len(pixels) // 50)]
    copies = [
        F.cosine_similarity(features([alter(image) for image in some]), features(some))
        for alter in (compressed, cropped, brightened)
    ]
    threshold = float(torch.cat(copies).quantile(1 - RECALL))
    unit = F.normalize(own, dim=1)
    alike = (unit @ unit.T).fill_diagonal_(-1) >= threshold
    share = float(alike.any(1).float().mean())
    words = f"{share:.0%} of {len(pixels)} images have another one as near as an altered copy (cosine {threshold:.2f})"
    if share <= DUPLICATES:
        return Finding("near-duplicates", "fine", words)
    return Finding("near-duplicates", "warning", f"{words}: thin out copies and frames of films")


# ---------------------------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True)
class Speed:
    """Images a second, of one process."""

    loaded: float
    trained: float
    of: int  # images of the steps that were timed
    step: float  # seconds of a step of the whole part


def speed(plan: Plan, source: Source, device: torch.device) -> tuple[Speed | None, list[Finding]]:
    """None where a step does not fit into the memory of the GPU."""
    config = _timed(plan.config, min(plan.part, LOADER_BATCH))
    method = _method(plan, source, config, device)
    loaded, batches = _loaded(config, source, method, device)
    of = plan.part if device.type == "cuda" else min(plan.part, FIRST_TRY)
    work = _Steps(plan, method, device)
    try:
        seconds = work.timed(_of_size(batches, of))
    except torch.OutOfMemoryError:
        return None, [_too_large(plan, device)]
    if of < plan.part and seconds * plan.part / of * (STEPS + 1) < SECONDS:
        of = plan.part
        seconds = work.timed(_of_size(batches, of))
    found = Speed(loaded, of / seconds, of, seconds * plan.part / of)
    findings = [_waiting(found, source, plan)]
    if device.type == "cuda":
        findings.append(_peak(device))
    return found, findings


def _timed(config: Config, batch: int) -> Config:
    """For the loader and the network alone: small batches, random weights, labels that need nothing of all images."""
    objective = config.objective
    if isinstance(objective, MLSOptions):
        labels = "backbone" if objective.labels_from == "regions" else objective.labels_from
        objective = replace(objective, labels_from=labels, pseudo_labels="matched")
    data, engine = replace(config.data, batch_size=batch), replace(config.engine, accumulate=1)
    return replace(config, data=data, engine=engine, objective=objective, model=replace(config.model, weights=None))


def _method(plan: Plan, source: Source, config: Config, device: torch.device) -> Method:
    labels = source.labels if config.objective.method == "supervised" else None
    method = methods.build(config, precision_on(device, config.engine.precision), labels).to(device)
    if config.engine.channels_last:
        method.to(memory_format=torch.channels_last)
    method.decide({}, device)
    method.set_progress(plan.total, config.optim.epochs, plan.steps_per_epoch)  # all terms have joined
    for memory in method.memories().values():
        if isinstance(memory, Dictionary):  # full, as it is for most of a run
            shapes = {name: getattr(memory.rows(), name).shape[1:] for name in memory.names}
            for _ in range(ceil(memory.capacity / ROWS)):
                rows = {name: F.normalize(torch.randn(ROWS, *s, device=device), dim=-1) for name, s in shapes.items()}
                memory.enqueue(**rows, ids=torch.randint(len(source), (ROWS,), device=device))
    return method.train()


def _loaded(config: Config, source: Source, method: Method, device: torch.device) -> tuple[float, list[Batch]]:
    """Images a second that the loader makes while nobody else works, after its first batch; and some batches."""
    loader = iter(Loader(source, config, Process(0, 1, device), 1, 1 << 20, method.views()))
    kept, count = [_copied(next(loader))], 0
    began, least = time.perf_counter(), 2 * max(1, worker_count(config.data.workers))
    for batch in loader:
        count += 1
        kept = [*kept, _copied(batch)][-8:]
        spent = time.perf_counter() - began
        if spent > LOADER_SECONDS or (count >= 4 * least and spent > LOADER_SECONDS / 4):
            break
    del loader  # ends the workers: the steps are timed alone
    return count * config.data.batch_size / spent, kept


def _copied(batch: Batch) -> Batch:
    return Batch([crops.clone() for crops in batch.crops], batch.boxes, batch.ids, batch.epoch)


def _of_size(batches: list[Batch], size: int) -> Batch:
    """A batch of so many images, repeated where there are fewer."""
    place = torch.arange(size) % sum(len(batch.ids) for batch in batches)
    views = range(len(batches[0].crops))
    crops = [torch.cat([batch.crops[view] for batch in batches])[place] for view in views]
    boxes = [torch.cat([batch.boxes[view] for batch in batches])[place] for view in views]
    return Batch(crops, boxes, torch.cat([batch.ids for batch in batches])[place], 1)


class _Steps:
    """Steps as the trainer takes them, without other processes."""

    def __init__(self, plan: Plan, method: Method, device: torch.device) -> None:
        self.method, self.device, config = method, device, plan.config
        self.optimizer = optim.build(config, method, method.own_rates())
        optim.set_lr(self.optimizer, 1e-8)
        half = HALF.get(precision_on(device, config.engine.precision), torch.float32)
        positions = method.views().positions
        self.augment = Augment(config.augment, config.run.seed, device, config.engine.channels_last, half, positions)

    def timed(self, batch: Batch) -> float:
        """Seconds of a step: the median of STEPS after one that warms up."""
        return statistics.median([self._step(batch) for _ in range(1 + STEPS)][1:])

    def _step(self, batch: Batch) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        out = self.method(self.augment(batch))
        out.loss.backward()
        self.optimizer.step()
        self.method.after_step([out])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def _waiting(found: Speed, source: Source, plan: Plan) -> Finding:
    slowest = min(found.loaded, found.trained) * plan.world
    words = f"the loader makes {rounded(found.loaded)} images/s, steps take {rounded(found.trained)}"
    words += f" ({found.of:,} at a time)"
    views = plan.total * plan.config.data.batch_size
    words += f": all {views:,} of the run in {duration(views / slowest)}"
    waiting = max(0.0, 1 - found.loaded / found.trained)
    if waiting <= WAITING:
        return Finding("loader against step", "fine", words)
    advice = remedy(source, plan.config)
    override = advice.split()[1] if advice.startswith("set data.workers=") else ""
    words += f", {waiting:.0%} of it waiting for data{'' if override else f'; {advice}'}"
    return Finding("loader against step", "warning", words, override)


def rounded(rate: float) -> str:
    """
    >>> rounded(12345.6), rounded(0.6789)
    ('12,346', '0.68')
    """
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _too_large(plan: Plan, device: torch.device) -> Finding:
    words = (
        f"{plan.part:,} images of {plan.config.augment.size} pixels do not fit into the {device.type.upper()}'s memory"
    )
    return Finding("memory of a step", "fails", words, half_at_a_time(plan))


def _peak(device: torch.device) -> Finding:
    peak, most = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    words = f"{in_units(peak)} at the peak of a step, the GPU has {in_units(most)}"
    return Finding("memory of a step", "warning" if peak > 0.9 * most else "fine", words)


# --------------------------------------------------------------------------------------------------------- the saving


def saving(plan: Plan, sizes: Sizes, step: float | None, job: Profile | None) -> Iterator[Finding]:
    """A checkpoint's time against the time that a job has after its signal, and the time between two of them. Of a run
    that is no `job` the default's time is told, as a hint."""
    signal_seconds = (job or Profile()).signal_seconds
    folder, size = nearest_folder(runs_root(plan.config)), sizes.checkpoint(plan.config, plan.world)
    try:
        rate = WRITTEN / _written(folder, WRITTEN)
    except OSError as error:
        yield Finding("saving", "fails", f"{folder} cannot be written ({reason(error)})", "run.root=FOLDER")
        return
    seconds = size / rate
    words = f"{in_units(size)} at {in_units(rate)}/s take {seconds:.1f} s"
    words += f", the last step {step:.1f} s" if step is not None else ""
    words += f", a SLURM job has {signal_seconds} s for both"
    needed = seconds + (step or 0.0)
    if 2 * needed <= signal_seconds:
        yield Finding("saving", "fine", words)
    else:
        level = "fails" if job is not None and needed > signal_seconds else "warning"
        yield Finding("saving", level, words, f"--slurm=signal_seconds={ceil(2 * needed)}")
    every = plan.config.engine.checkpoint_every
    if step is not None and seconds > every * step:
        words = f"{every:,} steps take {every * step:.1f} s, a checkpoint {seconds:.1f} s: training waits for the disk"
        yield Finding(
            "time between checkpoints", "warning", words, f"engine.checkpoint_every={ceil(4 * seconds / step)}"
        )


def _written(folder: os.PathLike[str], size: int) -> float:
    """Seconds until so many bytes are on the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        data = os.urandom(1 << 20)
        began = time.perf_counter()
        for _ in range(size >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began
