"""Settings that were left `auto`, sized to the images and the device when a run starts: one rule for each, with its
reason. Values given explicitly win, and later rules follow them. What is chosen is written to the run as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mls.chunks import power_of_two, spaced
from mls.config import SIZED, Config, MLSOptions, MoCoOptions, WordsOptions, check
from mls.core import methods
from mls.data import Source, Views
from mls.data.decode import Encoded, UnreadableImage
from mls.data.loader import whole_batches
from mls.data.sources import build_source
from mls.distributed import Process, on_main
from mls.engine import optim
from mls.engine.findings import FEW_FOR_STATISTICS
from mls.engine.trainer import watched_labels
from mls.errors import ConfigError, DataError, command
from mls.models import card_of, card_of_name
from mls.models.momentum import precision_on
from mls.recipes import override

FEWEST, FEW = 16, 1000  # images that can be trained on; below which published weights are a better start
LOOKED_AT = 64  # images whose size is read
PAPER = Config()  # its values are the largest that a rule chooses
ON_GPU = 4_000_000  # images that a GPU's run sees: 200 epochs of 20,000
ON_CPU = 250_000  # images of 32 × 32: `mls_scenes_tiny` trains on 780 a second with two free cores (its recipe)
SHORT = 10_000  # steps below which a run needs a quicker key encoder and later pseudo-labels
# Of 224 × 224 in a ResNet-50 in bf16: twice what the backward pass keeps of an image (findings.kept_of_image: 42 MiB),
# the other half for views, keys and workspaces. Not tried on a GPU.
IMAGES_PER_GIB = 12


@dataclass(frozen=True)
class Facts:
    images: int
    side: int  # pixels: median of the images' shorter sides
    memory: float | None  # GiB of the GPU; None: a CPU
    processes: int = 1


@dataclass(frozen=True)
class Choice:
    key: str
    value: Any
    reason: str


Rule = Callable[[Config, Facts], tuple[Any, str]]


def sized(config: Config, process: Process, tell: Callable[[Config, Facts, list[Choice]], None]) -> Config:
    """The configuration with a number for every key of `run.auto`. Rank 0 chooses for all processes."""
    if not config.run.auto:
        return config

    def decide() -> Config:
        source = build_source(config.data)
        facts = facts_of(source, process)
        made, choices = choose(config, facts)
        check(made)
        # Processes exchange keys in a step, and this one is alone here: with several the estimate stands.
        if process.world == 1 and process.device.type == "cuda" and "data.batch_size" in config.run.auto:
            labels = watched_labels(source)
            made, choices = tried(config, facts, made, choices, lambda one: holds(one, process.device, labels))
        tell(made, facts, choices)
        return made

    return on_main(decide)


def tried(
    config: Config, facts: Facts, made: Config, choices: list[Choice], holds: Callable[[Config], bool]
) -> tuple[Config, list[Choice]]:
    """With the batch halved until a step fits into the GPU's memory; what follows from the batch is chosen anew."""
    parts = facts.processes * config.engine.accumulate
    rest = replace(config, run=replace(config.run, auto=[key for key in config.run.auto if key != "data.batch_size"]))
    while not holds(made):
        before = made.data.batch_size
        if before <= 2 * parts:
            raise ConfigError(f"a step of {before} images does not fit into the GPU's memory: lower augment.size")
        smaller = replace(rest, data=replace(rest.data, batch_size=before // (2 * parts) * parts))
        made, others = choose(smaller, facts)
        check(made)
        words = f"a step with {before} did not fit into the GPU's memory, one with {made.data.batch_size} does"
        choices = [Choice("data.batch_size", made.data.batch_size, words), *others]
    return made, choices


def holds(config: Config, device: torch.device, labels: Tensor | None) -> bool:
    """Whether a step fits into the GPU's memory: tried, on noise."""
    try:
        _try_step(config, device, labels)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:  # what was tried is let go by now; the log's gpu_memory_gib is the run's alone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _try_step(config: Config, device: torch.device, labels: Tensor | None) -> None:
    images = config.data.batch_size // config.engine.accumulate
    labels = None if labels is None else labels.to(device)
    method = methods.build(config, precision_on(device, config.engine.precision), labels).to(device)
    optimizer = optim.build(config, method, method.own_rates(), method.backbone)
    views = [torch.randn(images, 3, view.size, view.size, device=device) for view in method.views().views]
    boxes = [torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).repeat(images, 1) for _ in views]
    flips = [torch.zeros(images, dtype=torch.bool, device=device) for _ in views]
    method(Views(views, boxes, torch.arange(images, device=device), flips)).loss.backward()
    optimizer.step()


def show(config: Config, facts: Facts, choices: list[Choice]) -> None:
    """As a table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    device = "a CPU" if facts.memory is None else f"GPUs of {facts.memory:.0f} GiB"
    title = f"sized to {facts.images:,} images of {facts.side} pixels and {facts.processes} × {device}"
    table = Table("setting", "value", "why", title=title, title_justify="left")
    for choice in choices:
        value = f"{choice.value:g}" if isinstance(choice.value, float) else str(choice.value)
        table.add_row(choice.key, value, escape(choice.reason))
    console = Console(stderr=True, highlight=False)
    console.print(table)
    if words := advice(config, facts):
        console.print(words, markup=False, soft_wrap=True)


def facts_of(source: Source, process: Process) -> Facts:
    memory = torch.cuda.mem_get_info(process.device)[1] / 2**30 if process.device.type == "cuda" else None
    return Facts(len(source), _short_side(source), memory, process.world)


def choose(config: Config, facts: Facts) -> tuple[Config, list[Choice]]:
    if facts.images < FEWEST:
        raise DataError(f"{facts.images} images are too few to pretrain on: point data.root to {FEWEST} or more")
    choices: list[Choice] = []
    for key in SIZED:
        if key in config.run.auto:
            value, reason = RULES[key](config, facts)
            config = _with(config, key.split("."), value)
            choices.append(Choice(key, value, reason))
    return replace(config, run=replace(config.run, auto=[])), choices


def _with(options: Any, keys: Sequence[str], value: Any) -> Any:
    first, *rest = keys
    return replace(options, **{first: _with(getattr(options, first), rest, value) if rest else value})


def advice(config: Config, facts: Facts) -> str | None:
    """What cannot work well, whatever the sizes, and what would."""
    if facts.images >= FEW or config.model.weights is not None:
        return None
    network = "resnet18" if facts.memory is None else "resnet50"
    root = [override("data.root", config.data.root)] if config.data.root else [f"data.source={config.data.source}"]
    changes = (*root, f"model.weights=torchvision:{network}")
    again = command("mls pretrain mls_continue", *changes)
    return f"{facts.images:,} images are few to learn from nothing: published weights are a better start, {again}"


def _short_side(source: Source) -> int:
    sides = []
    for index in spaced(len(source), LOOKED_AT):
        try:
            image = Encoded(source.read(index))
            sides.append(min(image.height, image.width))
        except (UnreadableImage, OSError):
            continue  # training replaces it and says so
    return int(median(sides)) if sides else PAPER.augment.size


def _steps(config: Config, facts: Facts) -> int:
    return config.optim.epochs * max(1, whole_batches(facts.images, config))


def _size(config: Config, facts: Facts) -> tuple[int, str]:
    low, high = (32, 64) if facts.memory is None else (96, PAPER.augment.size)
    size = min(high, max(low, facts.side // 16 * 16))
    where = f"the images' short side is {facts.side} pixels"
    return size, f"{where}; a CPU takes at most {high}" if facts.memory is None and facts.side > high else where


def _blur(config: Config, facts: Facts) -> tuple[float, str]:
    if config.augment.size <= 64:
        return 0.0, "none for small images, as SimCLR on CIFAR-10"
    return PAPER.augment.blur, "as MoCo-v2"


def _backbone(config: Config, facts: Facts) -> tuple[str, str]:
    if config.model.weights is not None:
        facts_of_start = card_of(config.model.weights) or card_of_name(config.model.weights)
        return facts_of_start["architecture"], "what model.weights are weights of"
    if facts.memory is None:
        return "resnet_tiny", "minutes on a CPU, where resnet50 takes weeks: a trial, use a GPU for more"
    return "resnet50", "as the paper"


def _batch(config: Config, facts: Facts) -> tuple[int, str]:
    """Small enough for 16 steps an epoch, and a multiple of the processes."""
    parts, limit, why = facts.processes * config.engine.accumulate, facts.images / 16, "16 steps an epoch or more"
    if limit < (few := min(FEW_FOR_STATISTICS * parts, facts.images / 2)):
        limit, why = few, f"{FEW_FOR_STATISTICS} images or more for batch normalisation"
    most = PAPER.data.batch_size // (2 if facts.memory is None else 1)
    if limit >= most:
        limit, why = most, "half the paper's 256, for more steps on a CPU" if facts.memory is None else "as the paper"
    if facts.memory is not None:
        fits = IMAGES_PER_GIB * facts.memory * parts * (PAPER.augment.size / config.augment.size) ** 2
        if fits < limit:
            limit, why = fits, f"what {facts.memory:.0f} GiB hold"
    if isinstance(config.objective, MoCoOptions) and "dictionary.size" not in config.run.auto:
        limit = min(limit, config.dictionary.size)
    return max(power_of_two(max(limit, 2)) // parts, 1) * parts, why


def _key_group(config: Config, facts: Facts) -> tuple[int, str]:
    part = config.data.batch_size // (facts.processes * config.engine.accumulate)
    group = max(2, min(PAPER.model.key_group, part // 2))
    return group, f"two groups or more of the {part} images of a process"


def _dictionary(config: Config, facts: Facts) -> tuple[int, str]:
    """A quarter of the images at most: then a query meets an older row of its own in 3 of 100 steps."""
    rows, batch = power_of_two(facts.images / 4), config.data.batch_size
    if rows >= PAPER.dictionary.size:
        return max(PAPER.dictionary.size, batch), "as the paper"
    if batch > rows:
        return batch, f"a batch, more than a quarter of {facts.images:,} images: many rows are the query's own"
    return rows, f"at most a quarter of {facts.images:,} images, so that few rows are the query's own"


def _k(config: Config, facts: Facts) -> tuple[int, str]:
    rows = config.dictionary.size
    k = max(1, min(20, round(rows * 20 / PAPER.dictionary.size)))
    return k, f"{k / rows:.1%} of the dictionary (the paper's: 0.5 %)"


def _epochs(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.memory is None:
        seen = ON_CPU * (32 / config.augment.size) ** 2
        epochs = min(400, max(20, round(seen / facts.images)))
        why = "about ten minutes on two cores with the tiny network"
    else:
        epochs = min(800, max(200, round(ON_GPU / facts.images)))
        why = "fewer images, more epochs: 200 to 800"
    if config.model.weights is not None:
        return max(5, epochs // 4), f"a quarter of the {epochs} from nothing: model.weights are a start"
    return epochs, why


def _warmup(config: Config, facts: Facts) -> tuple[float, str]:
    epochs = min(5.0, config.optim.epochs / 20)
    return epochs, "of the learning rate: a twentieth of the run, at most 5 epochs"


def _later_labels(config: Config, facts: Facts) -> tuple[float, str]:
    options = config.objective
    of_rows = isinstance(options, MLSOptions)
    if isinstance(options, WordsOptions) or (of_rows and options.labels_from == "regions"):
        return config.optim.epochs / 4, "what regions show wants a network that has learnt"
    if of_rows and (not options.info_nce_weight or _steps(config, facts) >= SHORT):
        return 0.0, "pseudo-labels from the start, as the paper"
    return config.optim.epochs / 10, "the first neighbours of an untrained network are noise"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    steps = _steps(config, facts)
    if steps >= SHORT:
        return PAPER.model.momentum, "as the paper"
    return 0.99, f"{steps:,} steps: the paper's {PAPER.model.momentum} is for longer runs"


def _checkpoint_every(config: Config, facts: Facts) -> tuple[int, str]:
    steps = _steps(config, facts)
    return min(PAPER.engine.checkpoint_every, max(1, steps // 20)), f"steps; {steps:,} in all"


def _health_every(config: Config, facts: Facts) -> tuple[int, str]:
    return min(PAPER.monitor.health_every, max(1, _steps(config, facts) // 20)), "steps; 20 times a run or more"


def _window(config: Config, facts: Facts) -> tuple[int, str]:
    return max(16, config.augment.size // 2), "half of the crops' size, as 112 of 224"


def _words(config: Config, facts: Facts) -> tuple[int, str]:
    words = min(1024, max(16, power_of_two(facts.images / 40)))
    return words, "one of 40 images, 16 to 1,024; 128 were good for 6,000 scenes"


_IN_ORDER = (_size, _blur, _backbone, _batch, _key_group, _dictionary, _k, _epochs, _warmup, _later_labels, _momentum)
_LATER = (_checkpoint_every, _health_every, _window, _window, _words)
RULES: dict[str, Rule] = dict(zip(SIZED, (*_IN_ORDER, *_LATER), strict=True))
