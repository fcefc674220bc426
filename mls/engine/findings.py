"""What can be told of a run before its first step: settings that will fail or that take the sense out of a run, each
with what was measured and the override that helps. All of it follows from the configuration, the number of images and
processes and the size of the state: nothing is decoded or trained. What takes time to measure is in tools/doctor/."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mls.chunks import power_of_two
from mls.config import Config, MLSOptions, MoCoOptions, WordsOptions, runs_root
from mls.core import methods
from mls.core.method import Method
from mls.core.products import ENTRIES
from mls.data.loader import whole_batches
from mls.engine.optim import scaled_lr
from mls.models import backbones
from mls.models.momentum import precision_on
from mls.models.norm import has_batch_norm
from mls.models.stages import blocks
from mls.streams import initialisation

Level = Literal["fine", "warning", "fails"]
MANY_OWN, MANY_POSITIVES = 0.1, 0.05  # shares of the positives and of the dictionary's rows; the paper's k is 0.5 %
FEW_FOR_STATISTICS = 8  # images that batch normalisation takes its mean over
LEFT_OUT, NEARLY_FULL = 0.1, 0.8  # shares: of an epoch's images, of a memory or disk
FILLING = 0.1  # share of a run after which its dictionary should be full
USUAL_RATES = {"sgd": (1e-3, 3.0), "adamw": (1e-5, 5e-3), "lars": (0.1, 20.0)}  # peaks that the papers use
LOGIT_TENSORS = 4  # of so many entries at once: cosines, labels, losses and their gradient
KEPT_TIMES = 2  # views, keys, gradients of maps and workspaces, beside what the backward pass keeps: as much again
MOMENTS = {"sgd": 1, "adamw": 2, "lars": 1}  # that an optimizer keeps of each parameter
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    name: str  # what was looked at
    level: Level
    measured: str
    override: str = ""  # KEY=VALUE that helps

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.measured}{f'; try {self.override}' if self.override else ''}"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a run's state, in each process."""

    encoders: int
    gradients: int
    optimizer: int
    dictionary: int  # all memories of a method
    labels: int  # of the images, held for monitors

    @classmethod
    def of(cls, method: Method, config: Config, labels: int = 0) -> Sizes:
        learnt = sum(parameter.nbytes for parameter in method.parameters() if parameter.requires_grad)
        encoders = sum(tensor.nbytes for tensor in [*method.parameters(), *method.buffers()])
        memories = sum(getattr(memory, "nbytes", 0) for memory in method.memories().values())
        return cls(encoders, learnt, learnt * MOMENTS[config.optim.name], memories, labels)

    @classmethod
    def planned(cls, config: Config, world: int, labels: Tensor | None = None) -> Sizes:
        """Without making anything."""
        sizes = cls.of(methods.planned(config, labels), config, 0 if labels is None else labels.nbytes)
        return replace(sizes, dictionary=sizes.dictionary // world) if config.dictionary.sharded else sizes

    @property
    def held(self) -> int:
        return self.encoders + self.gradients + self.optimizer + self.dictionary + self.labels

    def checkpoint(self, config: Config, world: int) -> int:
        """Bytes of one file: gradients are not saved, a sharded dictionary is saved whole."""
        shares = world if config.dictionary.sharded else 1
        return self.encoders + self.optimizer + self.dictionary * shares


@dataclass(frozen=True)
class Plan:
    """What a run will be."""

    config: Config
    images: int
    world: int = 1

    @property
    def part(self) -> int:
        """Images that one process takes at a time."""
        return self.config.data.batch_size // (self.world * self.config.engine.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        return whole_batches(self.images, self.config)

    @property
    def total(self) -> int:
        return self.config.optim.epochs * self.steps_per_epoch


def findings(plan: Plan) -> list[Finding]:
    """All that follows from the plan alone."""
    of_batch = _batch(plan)
    if any(finding.level == "fails" for finding in of_batch):
        return of_batch  # what follows divides by the steps of an epoch
    options = plan.config.objective
    of_dictionary = _dictionary(plan, options) if isinstance(options, MoCoOptions) else ()
    return [*of_batch, *of_dictionary, _rate(plan), *_warmup(plan)]


def at_start(plan: Plan, sizes: Sizes) -> list[str]:
    """What a run says of itself when it starts: a sentence for each finding that is not fine. Its memory is taken by
    then."""
    found = [*findings(plan), disk(plan, sizes)]
    return [finding.sentence for finding in found if finding.level != "fine"]


# ---------------------------------------------------------------------------------------------------------- the batch


def _batch(plan: Plan) -> list[Finding]:
    config, batch = plan.config, plan.config.data.batch_size
    parts = plan.world * config.engine.accumulate
    if batch % parts:
        words = (
            f"{batch} images do not divide among {plan.world} processes × engine.accumulate {config.engine.accumulate}"
        )
        larger = max(FEW_FOR_STATISTICS, round(batch / parts)) * parts
        if larger > plan.images:
            return [Finding("batch", "fails", f"{words}: start fewer processes")]
        return [Finding("batch", "fails", words, f"data.batch_size={larger}")]
    if plan.images < batch:
        smaller = parts * power_of_two(plan.images / 8 / parts)
        words = f"{plan.images:,} images are fewer than one batch of {batch:,}"
        override = f"data.batch_size={smaller}" if smaller <= plan.images else ""
        return [Finding("steps an epoch", "fails", words, override)]
    left = plan.images % batch
    words = f"{plan.steps_per_epoch:,} of {batch:,} images, {plan.total:,} in all"
    found = [Finding("steps an epoch", "fine", words)]
    if left > LEFT_OUT * plan.images:
        fewer = plan.images // ceil(plan.images / batch) // parts * parts
        words += f"; {left:,} of {plan.images:,} images are left out of each epoch"
        found = [Finding("steps an epoch", "warning", words, f"data.batch_size={fewer}" if fewer else "")]
    return [*found, *_normalisation(plan)]


def _normalisation(plan: Plan) -> Iterator[Finding]:
    """Over how many images batch normalisation takes its statistics."""
    model, part = plan.config.model, plan.part
    if not _normalises(plan.config):
        return
    words = f"statistics over {part:,} images" + (f" in each of {plan.world} processes" if plan.world > 1 else "")
    if part < 2:
        yield Finding("batch normalisation", "fails", f"{words}: a single image has none", _larger_batch(plan))
        return
    few = part < FEW_FOR_STATISTICS
    yield Finding("batch normalisation", "warning" if few else "fine", words, _larger_batch(plan) if few else "")
    if model.key_norm == "split" or (model.key_norm == "shuffle" and plan.world == 1):
        groups, words = part // model.key_group, f"{part} images of a process in groups of {model.key_group}"
        if groups < 2 <= part // 2 and isinstance(plan.config.objective, MoCoOptions):
            words += ": one group, so that a query and its key share their statistics"
            yield Finding("key normalisation", "warning", words, f"model.key_group={part // 2}")


def _normalises(config: Config) -> bool:
    """Has the network batch normalisation? MoCo's heads have none, those of two crops have."""
    if not isinstance(config.objective, MoCoOptions):
        return True
    try:
        with torch.device("meta"), initialisation(0):
            return has_batch_norm(backbones.build(config.model.backbone))
    except Exception:  # a network from elsewhere, which does not exist without values
        return True


def _larger_batch(plan: Plan) -> str:
    accumulate = plan.config.engine.accumulate
    if accumulate > 1 and plan.part * accumulate >= FEW_FOR_STATISTICS:
        return "engine.accumulate=1"
    return f"data.batch_size={FEW_FOR_STATISTICS * plan.world * accumulate}"


# ----------------------------------------------------------------------------------------------------- the dictionary


def own_rows(rows: float, images: int) -> float:
    """How many rows of a full dictionary come from an image when it is the query: it came once in each epoch before,
    each time at a random place in the order. The distance from one epoch to the next has a triangular density.

    >>> own_rows(500, 1000), own_rows(1000, 1000), own_rows(4000, 1000)
    (0.125, 0.5, 3.5)
    """
    epochs = rows / images
    return epochs - 0.5 if epochs >= 1 else epochs**2 / 2


def _dictionary(plan: Plan, options: MoCoOptions) -> Iterator[Finding]:
    config, rows = plan.config, plan.config.dictionary.size
    epochs = rows / plan.images
    words = f"{rows:,} rows, {plan.images:,} images: D/N {epochs:,.{0 if epochs > 99 else 2}f}"
    if epochs > 1:
        words += ", so every image has rows in it"
        yield Finding("dictionary", "warning", words, _of_size(plan, plan.images / 2))
    else:
        yield Finding("dictionary", "fine", words)
    filled, batch = ceil(rows / config.data.batch_size), config.data.batch_size
    if filled > FILLING * plan.total and rows > batch:
        words = f"full after step {filled:,} of {plan.total:,}, with few rows until then"
        yield Finding("filling", "warning", words, _of_size(plan, min(plan.images / 2, FILLING * plan.total * batch)))
    if isinstance(options, MLSOptions) and options.weight:
        yield from _positives(plan, options)


def _positives(plan: Plan, options: MLSOptions) -> Iterator[Finding]:
    rows, k = plan.config.dictionary.size, options.k
    share = k / rows
    if share > MANY_POSITIVES:
        words = f"{k} of {rows:,} rows are positives, {share:.0%} of the dictionary (the paper's: 0.5 %)"
        yield Finding("positives", "warning", words, f"objective.k={max(1, rows // 200)}")
    else:
        yield Finding("positives", "fine", f"{k} of {rows:,} rows, {share:.2%} of the dictionary")
    by_matching = options.labels_from != "regions" and options.pseudo_labels == "matched"
    if by_matching and plan.config.dictionary.own_rows == "keep":
        own = own_rows(rows, plan.images)
        words = f"{own:.2g} rows of the query's own image are to be expected, {own / k:.1%} of its {k} positives"
        if own < MANY_OWN * k:
            yield Finding("own-image positives", "fine", words)
        else:
            level: Level = "fails" if own >= k else "warning"
            words += ": other crops of one image are all that is pulled together" if own >= k else ""
            yield Finding("own-image positives", level, words, "dictionary.own_rows=exclude")


def _of_size(plan: Plan, rows: float) -> str:
    """A smaller dictionary: at most so many rows, but a batch, in equal parts for the processes."""
    size = max(plan.world * power_of_two(rows / plan.world), plan.config.data.batch_size)
    return f"dictionary.size={size}"


# ------------------------------------------------------------------------------------------------------- the schedule


def _rate(plan: Plan) -> Finding:
    optim, rate = plan.config.optim, scaled_lr(plan.config)
    words = f"{rate:.3g} at the peak ({optim.lr:g} per 256 images, batch {plan.config.data.batch_size:,}, {optim.name})"
    if not optim.scale_lr:
        words = f"{rate:.3g} at the peak, whatever the batch ({optim.name})"
    low, high = USUAL_RATES[optim.name]
    if low <= rate <= high:
        return Finding("learning rate", "fine", words)
    usual = float(f"{(low * high) ** 0.5 * optim.lr / rate:.1g}")
    return Finding("learning rate", "warning", f"{words}: papers use {low:g} to {high:g}", f"optim.lr={usual:g}")


def _warmup(plan: Plan) -> Iterator[Finding]:
    optim, options = plan.config.optim, plan.config.objective
    if optim.warmup_epochs >= optim.epochs:
        words = f"{optim.warmup_epochs:g} epochs of {optim.epochs}: the learning rate never reaches its peak"
        yield Finding("warm-up", "fails", words, f"optim.warmup_epochs={optim.epochs // 10}")
    elif optim.warmup_epochs:
        yield Finding("warm-up", "fine", f"{optim.warmup_epochs:g} of {optim.epochs} epochs")
    if not isinstance(options, (MLSOptions, WordsOptions)) or not options.weight:
        return
    filled = ceil(options.k / plan.config.data.batch_size) if isinstance(options, MLSOptions) else 0
    first = 1 + max(filled, int(options.warmup_epochs * plan.steps_per_epoch))
    words = f"joins InfoNCE at step {first:,} of {plan.total:,}"
    if first > plan.total:
        late = options.warmup_epochs * plan.steps_per_epoch >= plan.total
        override = f"objective.warmup_epochs={optim.epochs // 10}" if late else f"objective.k={max(1, plan.total // 2)}"
        words = f"{words}, which never comes"
        yield Finding("multi-label term", "fails", words, override)
    else:
        yield Finding("multi-label term", "fine", words)


# -------------------------------------------------------------------------------------------------------- the machine


class _Kept:
    """What autograd saves of a network's passes, by storage: `None` stands for all that is outside of these blocks, and
    for what they take in."""

    def __init__(self, network: nn.Module, blocks: list[nn.Module]) -> None:
        self.weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self.found: dict[tuple[int, nn.Module] | None, dict[int, Tensor]] = {None: {}}
        self.block: tuple[int, nn.Module] | None = None
        self.passes = 0  # the backward pass computes a block of one pass at a time
        for block in blocks:
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(lambda *_: setattr(self, "block", None))

    def enter(self, block: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.keep(given[0])
        self.block = (self.passes, block)

    def keep(self, saved: Tensor) -> Tensor:
        key = saved.untyped_storage()._cdata
        if key not in self.weights:  # held, so that no storage gets the name of another
            self.found.setdefault(self.block, {})[key] = saved
        return saved

    @property
    def most(self) -> int:
        """Bytes outside of the blocks, and inside of the largest."""
        outside = self.found.pop(None)
        size = lambda tensors: sum(one.untyped_storage().nbytes() for one in tensors)
        inside = [size(one for key, one in block.items() if key not in outside) for block in self.found.values()]
        return size(outside.values()) + max(inside, default=0)


def kept_of_image(config: Config, half: bool) -> int:
    """Bytes that the backward pass through the backbone keeps of one image: the tensors that autograd saves, counted on
    torch's meta device, where a tensor has a size and no values. With engine.checkpointing it is what blocks take in,
    and what the largest of them keeps while it is computed again. 0: the network cannot be counted so.

    >>> round(kept_of_image(Config(), half=True) / 2**20)  # ResNet-50, 224 pixels
    42
    >>> from mls.config import EngineConfig
    >>> round(kept_of_image(Config(engine=EngineConfig(checkpointing=True)), half=True) / 2**20)
    20
    """
    dtype = torch.bfloat16 if half else torch.float32
    sizes = [config.augment.size, *[config.augment.small_size] * config.augment.small_crops]
    if isinstance(config.objective, MoCoOptions):
        sizes += [config.objective.windows.size] * config.objective.windows.count
    try:
        with torch.device("meta"), initialisation(0):
            network = backbones.build(config.model.backbone).to(dtype).train()
        kept = _Kept(network, blocks(network) if config.engine.checkpointing else [])
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda saved: saved):
            for kept.passes, size in enumerate(sizes):
                network(torch.empty(2, 3, size, size, dtype=dtype, device="meta"))
    except Exception:  # an operation that has no answer there, of a network from elsewhere
        return 0
    return kept.most // 2


def memory(plan: Plan, sizes: Sizes, device: torch.device) -> Finding:
    """What a run needs, worked out before its first step, against the memory of its device. A step measures it."""
    most = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_memory()
    parts = {
        "encoders": sizes.encoders,
        "gradients": sizes.gradients,
        "optimizer": sizes.optimizer,
        "dictionary": sizes.dictionary,
    }
    parts["labels"] = sizes.labels
    if isinstance(plan.config.objective, MoCoOptions):
        parts["logits"] = 4 * LOGIT_TENSORS * min(plan.part * plan.config.dictionary.size, ENTRIES)
    half = precision_on(device, plan.config.engine.precision) != "fp32"
    parts[f"{plan.part} images"] = KEPT_TIMES * plan.part * kept_of_image(plan.config, half)
    words = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items() if size)
    words += f"; the {'GPU' if device.type == 'cuda' else 'machine'} has {in_units(most)}"
    needed = sum(parts.values())
    if needed <= NEARLY_FULL * most:
        return Finding("memory", "fine", words)
    level: Level = "fails" if needed > most else "warning"
    return Finding("memory", level, f"{in_units(needed)} are needed: {words}", _less_memory(plan, sizes, needed))


def _less_memory(plan: Plan, sizes: Sizes, needed: int) -> str:
    dictionary = plan.config.dictionary
    if sizes.held < needed / 2:
        return half_at_a_time(plan)
    if sizes.dictionary < sizes.held / 2:
        return ""
    if plan.world > 1 and not dictionary.sharded:
        return "dictionary.sharded=true"
    if dictionary.storage == "fp32":
        return "dictionary.storage=bf16"
    return _of_size(plan, dictionary.size / 4)


def half_at_a_time(plan: Plan) -> str:
    """Of the images of a process, where they can be halved."""
    return f"engine.accumulate={2 * plan.config.engine.accumulate}" if plan.part % 2 == 0 else ""


def disk(plan: Plan, sizes: Sizes) -> Finding:
    """All checkpoints that will lie there at once, with the one that is being written."""
    engine, optim = plan.config.engine, plan.config.optim
    one = sizes.checkpoint(plan.config, plan.world)
    milestones = optim.epochs // engine.milestone_epochs if engine.milestone_epochs else 0
    count, place = engine.keep_last + 1 + milestones, nearest_folder(runs_root(plan.config))
    free = shutil.disk_usage(place).free
    words = f"{count} checkpoints of {in_units(one)} take {in_units(count * one)}, {place} has {in_units(free)} free"
    if count * one <= NEARLY_FULL * free:
        return Finding("disk", "fine", words)
    override = "engine.milestone_epochs=0" if milestones else "engine.keep_last=1" if engine.keep_last > 1 else ""
    return Finding("disk", "fails" if count * one > free else "warning", words, override)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def available_memory() -> int:
    """Of this machine, or what a container or a job leaves of it."""
    about = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", about.read_text()) if about.is_file() else None
    limits = [1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def in_units(size: float) -> str:
    """
    >>> in_units(3_000_000), in_units(5.5 * GIB), in_units(12 * 1024)
    ('2.9 MiB', '5.5 GiB', '12.0 KiB')
    """
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024 or unit == "GiB":
            return f"{size:,.1f} {unit}"
    raise AssertionError
