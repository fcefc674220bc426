"""Cells: one measurement with one seed, of which tables are made. A cell has an identity (its key), a folder and rows
in the store of results. A finished one is found there; an unfinished one goes on from its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import mls
from mls import card, distributed, engine
from mls.config import Config, to_dict
from mls.config import DataConfig as PretrainingData
from mls.core.losses import LOSSES
from mls.data.scenes import ScenesSource
from mls.data.sources import build_source, hash_of_images
from mls.engine import sizing
from mls.engine.run import Run, run_folder
from mls.errors import ConfigError
from mls.eval import frozen, splits, supervised
from mls.eval.data import LAYOUTS, folder_of
from mls.eval.dense import frozen as frozen_dense
from mls.eval.dense import run as dense
from mls.eval.dense.prepare import content as dense_content
from mls.eval.dense.prepare import load_images
from mls.eval.dense.schema import Dense, FrozenDense
from mls.eval.outcome import Outcome
from mls.eval.protocol import (
    AnyProtocol,
    Frozen,
    Supervised,
    fingerprint,
    load_protocol,
    scenes_identity,
    to_yaml,
)
from mls.eval.training import Training
from mls.eval.weights import Weights, read
from mls.files import file_name, remove_unfinished, runs_folder, write_atomically
from mls.frameworks import installed as frameworks
from mls.locks import Lock, locked
from mls.models import card_of_name, untrained
from mls.recipes import load_config
from mls.results import Results

# Keys that change no number, and that stored results do not know.
FREE_AND_YOUNGER = [("engine", "timeout_minutes"), ("engine", "deterministic"), ("monitor", "moments")]
FREE_AND_YOUNGER += [("engine", "checkpointing")]
FREE_AND_YOUNGER += [("monitor", key) for key in ("mlflow", "dense_every_epochs", "dense_images")] + [
    ("monitor", f"guard{key}") for key in ("", "_images", "_fall", "_every_epochs")
]
# Left out of a run's identity at these values.
YOUNGER_AT = {("model", "final_momentum"): None, ("optim", "final_weight_decay"): None, ("optim", "clip_norm"): None}
YOUNGER_AT |= {("optim", "layer_decay"): 1.0, ("model", "drop_path"): 0.0, ("model", "freeze_patches"): False}
YOUNGER = {
    "info_nce_weight",
    "windows",
    "label_windows",
    "regions",
    "oracle_share",
}  # keys of objective.* that stored results do not know

RUNNERS: dict[str, Callable[..., Outcome]] = {
    "multilabel": supervised.run,
    "finetune": supervised.run,
    "linear": frozen.run,
    "knn": frozen.run,
    "svm": frozen.run,
    "detection": dense.run,
    "segmentation": dense.run,
    "dense_linear": frozen_dense.run,
    "dense_knn": frozen_dense.run,
    "dense_cluster": frozen_dense.run,
    "objects": frozen_dense.run,
    "saliency": frozen_dense.run,
}
WITHOUT_WEIGHTS = ("knn", "dense_knn", "dense_cluster", "objects", "saliency")  # tasks that train none


@dataclass(frozen=True)
class Measured:
    """A finished cell."""

    values: dict[str, float]  # by metric, without the data set's name
    row: Mapping[str, Any]  # what its rows in the store have in common
    stored_before: bool = False

    @property
    def date(self) -> str:
        return str(self.row.get("time", ""))[:10]


class Cell(ABC):
    """What a kind of measurement says of itself; `finish` does the rest."""

    seed: int

    @property
    @abstractmethod
    def key(self) -> str:
        """The same for the same measurement, another one for everything that changes its numbers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its folder."""

    @property
    @abstractmethod
    def dataset(self) -> str: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The fields of its rows that are its own."""

    @abstractmethod
    def measure(self, folder: Path, quiet: bool) -> Outcome:
        """Go on from what the folder holds."""

    def ready(self, root: Path, quiet: bool) -> Cell:
        """The same cell once what it measures is there."""
        return self

    def with_weights(self) -> Cell:
        """The same cell, or that of newer weights, once what is to be measured is in memory: a run may go on training
        while this process waits or measures."""
        return self

    def stored(self, root: Path) -> Measured | None:
        return self.found_as(self.key, root)

    @staticmethod
    def found_as(key: str, root: Path) -> Measured | None:
        found = Results(root / "results.jsonl").cell(key)
        if found is None:
            return None
        values = {metric.partition("/")[2]: value for metric, value in found.values.items()}
        return Measured(values, found.row, stored_before=True)

    def folder(self, root: Path) -> Path:
        return root / "eval" / file_name(self.name, "the name of the evaluation")

    def keeps(self, folder: Path) -> bool:
        """Whether the folder holds what was trained, for those who want more than numbers."""
        return True

    def save(self, folder: Path, outcome: Outcome) -> None:  # noqa: B027 (there may be nothing to do)
        """Write what is to be kept beside the numbers, before these are stored and the cell counts as measured."""

    def tidy(self, folder: Path, keep: bool) -> None:  # noqa: B027 (there may be nothing to do)
        """Once the numbers are stored: delete what is not to be kept."""

    def finish(self, root: Path, keep: bool = False, quiet: bool = False, again: bool = False) -> Measured:
        """Its numbers, from the store where they are there already, unless they shall be measured `again`."""
        cell = self.ready(root, quiet)
        known = None if again else cell.known(root, keep)
        if known is not None:
            return known
        cell = cell.with_weights()
        with _alone(root, cell.name) as lock:
            known = None if again else cell.known(root, keep)  # another process may have measured it meanwhile
            return known or cell.measured(root, keep, quiet, lock)

    def known(self, root: Path, keep: bool) -> Measured | None:
        """The stored numbers, where they are all that is wanted. Of several processes one reads them."""

        def look() -> Measured | None:
            found = self.stored(root)
            return found if found and (not keep or self.keeps(self.folder(root))) else None

        return distributed.on_main(look)

    def measured(self, root: Path, keep: bool, quiet: bool, lock: Lock | None) -> Measured:
        """The numbers, measured and stored."""
        folder = self.folder(root)
        outcome = self.measure(folder, quiet)
        row = {
            "seed": self.seed,
            **self.facts(),
            "cell": self.key,
            "run": self.name,
            "selection": outcome.selection,
            "validation": outcome.validation,
            "duration": round(outcome.seconds, 1),
            "versions": {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "metrics": len(outcome.values),
        }
        if distributed.rank() == 0:  # all processes have the same numbers
            if lock is not None:
                lock.check()
            if keep:
                self.save(folder, outcome)
            Results(root / "results.jsonl").add_all(
                [{"metric": f"{self.dataset}/{name}", "value": value, **row} for name, value in outcome.values.items()]
            )
            self.tidy(folder, keep)
        distributed.barrier()
        return Measured(outcome.values, row)


@contextlib.contextmanager
def _alone(root: Path, name: str) -> Iterator[Lock | None]:
    """Another process that wants the same cell waits for its numbers. One of several processes cannot: the others
    would take it for lost. So a second such job is refused."""
    if distributed.world() < int(os.environ.get("WORLD_SIZE", 1)):  # engine.run starts them, and has a lock of its own
        yield None
        return
    held: list[Lock] = []
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        waiting = locked(root / f".{name}.lock", f"{name} is being measured", wait=distributed.world() == 1)
        distributed.on_main(lambda: held.append(stack.enter_context(waiting)))
        yield held[0] if held else None


def over_seeds(rows: Mapping[str, Sequence[Cell]], root: Path, again: bool = False) -> dict[str, list[Measured]]:
    """Each row of a table, which has a cell for each seed; all rows before the next seed, so that a table that was
    stopped still compares. What is finished is not measured again."""
    found: dict[str, list[Measured]] = {name: [] for name in rows}
    for cells in zip_longest(*rows.values()):
        for name, cell in zip(rows, cells, strict=True):
            if cell is not None:
                found[name].append(cell.finish(root, again=again))
    return found


def values_over_seeds(measured: Sequence[Measured]) -> dict[str, list[float]]:
    """Of each metric the numbers of the seeds that have it."""
    metrics = dict.fromkeys(metric for one in measured for metric in one.values)
    return {metric: [one.values[metric] for one in measured if metric in one.values] for metric in metrics}


# ------------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Evaluation(Cell):
    """A protocol on some weights."""

    protocol: AnyProtocol
    weights: str  # a run, a file or a name
    seed: int = 0
    recipe: str = ""  # pretrain:RECIPE KEY=VALUE ..., where the weights are the run of a recipe
    loaded: Weights | None = None  # what was read of them to be measured, or by the first of several processes
    architecture: str | None = None  # of weights in a file that does not show it
    prefix: str | None = None  # of the network in a file that holds several

    @cached_property
    def source(self) -> Weights:
        return self.loaded or self._read(tensors=False)

    def _read(self, tensors: bool) -> Weights:
        return read(self.weights, self.protocol.model.backbone, self.architecture, self.prefix, tensors)

    @cached_property
    def content(self) -> str:
        """Of the data, which are there: another folder of the same name is another cell."""
        protocol = self.protocol
        return dense_content(protocol) if isinstance(protocol, Dense | FrozenDense) else splits.content(protocol.data)

    @property
    def key(self) -> str:
        return self._key(self.content, self.source.hash)

    def _key(self, *identity: str) -> str:
        text = "/".join([fingerprint(self.protocol), *identity, str(self.seed)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        parts = [self.protocol.recipe, self.loss, f"seed{self.seed}", self.key]
        return "-".join(part for part in parts if part)

    @property
    def dataset(self) -> str:
        return self.protocol.data.name

    @property
    def loss(self) -> str:
        """What a protocol of the weak-label family compares."""
        if isinstance(self.protocol, Supervised) and self.protocol.task == "multilabel":
            return self.protocol.training.loss
        return ""

    @property
    def title(self) -> str:
        backend = self.protocol.backend if isinstance(self.protocol, Dense) else "torchvision"
        on = f" on {backend}" if backend != "torchvision" else ""
        return f"{self.protocol.recipe}{on}, {self.loss or self.recipe or self.source.name}, seed {self.seed}"

    def ready(self, root: Path, quiet: bool) -> Evaluation:
        """The run behind `pretrain:RECIPE ...` is trained first; of several processes one reads the weights."""
        if isinstance(self.protocol, Dense):
            frameworks.require(self.protocol.backend)  # before a backbone is trained for it
        cell = self
        if self.weights.startswith("pretrain:"):
            cell = replace(self, weights=pretrained(self.weights, self.seed, root, quiet), recipe=self.weights)
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or isinstance(self.protocol, Frozen | FrozenDense):
            _ = cell.source  # an error of the weights comes before the data are read
            return cell
        distributed.start(self.protocol.training.device)
        return replace(cell, loaded=distributed.on_main(lambda: cell.source))

    def with_weights(self) -> Evaluation:
        found: list[Weights] = []

        def of_main() -> Weights:
            found.append(self._read(tensors=True))
            return replace(found[0], tensors=b"")

        shared = distributed.on_main(of_main)
        return replace(self, loaded=found[0] if found else shared)

    def stored(self, root: Path) -> Measured | None:
        if self.weights.startswith("pretrain:"):
            run = Run(run_folder(pretraining_config(self.weights, self.seed, root, quiet=True)))
            return replace(self, weights=str(run.path)).stored(root) if run.done else None
        found = super().stored(root)
        data = self.protocol.data
        if found is not None or LAYOUTS[data.name].own or not data.check_sizes:
            return found
        # Version 0.1 did not look at the content of the data; of a published size it can be trusted. Nor did it say
        # of which network "random" was, and it called random networks of timm by their published name. What a loss
        # learns had another rate there.
        source = self.source
        if source.file is None and not source.load_name.startswith(("random", "torchvision:")):
            return None
        if isinstance(self.protocol, Supervised) and LOSSES[self.protocol.training.loss].lr_multiplier != 1:
            return None
        old = source.hash if source.file else hashlib.sha256(source.load_name.encode()).hexdigest()[:16]
        found = self.found_as(self._key(old), root)
        values = {} if found is None else found.values
        values.pop("map_11pt", None)  # it took other thresholds
        return found

    def facts(self) -> dict[str, Any]:
        protocol = self.protocol
        return {
            "protocol": protocol.recipe,
            "task": protocol.task,
            "dataset": protocol.data.name,
            **({"loss": protocol.training.loss} if isinstance(protocol, Supervised) else {}),
            **({"backend": protocol.backend} if isinstance(protocol, Dense) else {}),
            "root": str(folder_of(protocol.data.name, protocol.data.root)) if LAYOUTS[protocol.data.name].own else None,
            "content": self.content,
            "settings": fingerprint(protocol),
            "weights": self.recipe or self.source.name,
            "weights_hash": self.source.hash,
            "step": self.source.facts.get("step"),
        }

    def keeps(self, folder: Path) -> bool:
        return self.protocol.task in WITHOUT_WEIGHTS or (folder / "classifier.safetensors").is_file()

    def save(self, folder: Path, outcome: Outcome) -> None:
        if outcome.weights:
            save_classifier(outcome.weights, folder, self.about_classifier())

    def about_classifier(self) -> dict[str, Any]:
        """What `mls predict` has to know beside the tensors. Images are standardised as they were here."""
        protocol, of_file = self.protocol, self.source.file is not None
        images = load_images(protocol) if isinstance(protocol, Dense | FrozenDense) else splits.load(protocol.data)
        name = untrained(protocol.model.backbone) if self.weights == "random" else self.weights
        known = dict(self.source.facts) if of_file else card_of_name(name)
        if isinstance(protocol, Supervised | Frozen) and not of_file and not name.startswith("timm:"):
            known |= {"mean": protocol.augment.mean, "std": protocol.augment.std}
        return {
            "task": protocol.task,
            "classes": list(images.train.class_names),
            "single_label": getattr(images.train, "single_label", None),
            "weights": str(Path(self.weights).expanduser().absolute()) if of_file else name,
            "weights_hash": self.source.hash,
            "weights_options": {"architecture": self.architecture, "prefix": self.prefix},
            **{key: known[key] for key in ("architecture", "mean", "std", "input_size")},
        }

    def tidy(self, folder: Path, keep: bool) -> None:
        for rest in (folder / "state", folder / "weights") if keep else (folder,):
            shutil.rmtree(rest, ignore_errors=True)

    def measure(self, folder: Path, quiet: bool) -> Outcome:
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0:
            remove_unfinished(folder, "*")
            write_atomically(folder / "protocol.yaml", to_yaml(self.protocol).encode())
        run = RUNNERS[self.protocol.task]
        weights = self.source.placed(folder)
        distributed.barrier()
        try:
            return run(self.protocol, weights, self.seed, folder, title=self.title, quiet=quiet)
        except ConfigError:  # settings that cannot work, told before anything is trained
            if fresh and distributed.rank() == 0 and not any(folder.rglob("step-*.pt")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def run(
    protocol: AnyProtocol | str | Path,
    weights: str | Path | None = None,
    seed: int = 0,
    root: Path | None = None,
    keep: bool = True,
    quiet: bool = False,
) -> dict[str, float]:
    """The metrics of one protocol, weights and seed, as shares; from the store where they are there already.

    `weights`: a run, a file, a name such as torchvision:resnet50, "random", or "pretrain:RECIPE KEY=VALUE ...", which
    is the run of that recipe with this seed, trained first where it is not there; default: the protocol's own. `root`
    (default $MLS_RUNS, else ./runs) holds results.jsonl, and under eval/ a folder for each cell; `keep=False` deletes
    the folder when its numbers are stored.
    """
    return evaluation(protocol, weights, seed).finish(root or runs_folder(), keep, quiet).values


def evaluation(
    protocol: AnyProtocol | str | Path,
    weights: str | Path | None = None,
    seed: int = 0,
    architecture: str | None = None,
    prefix: str | None = None,
) -> Evaluation:
    loaded: AnyProtocol = load_protocol(protocol) if isinstance(protocol, str | Path) else protocol
    named = loaded.model.weights if weights is None else str(weights)
    return Evaluation(loaded, named, seed, architecture=architecture, prefix=prefix)


def validated(cell: Evaluation, root: Path) -> float:
    """The best value of the protocol's metric on the validation part."""
    value = cell.finish(root).row["validation"]
    if value is None:
        raise ConfigError(f"{cell.protocol.recipe} has no validation part to choose on: raise data.validation above 0")
    return float(value)


def trained(protocol: Supervised, weights: str | None, seed: int, root: Path) -> Training:
    """The classifier of a cell with its data and what it knows: run now, or read from the cell's folder."""
    from safetensors.torch import load_file

    cell = evaluation(protocol, weights, seed).ready(root, quiet=False)
    file = cell.folder(root) / "classifier.safetensors"
    if not file.is_file():
        cell.finish(root, keep=True)
    training = supervised.prepare_training(protocol, cell.weights, seed, None)
    training.load_weights(load_file(file))
    return training


def save_classifier(weights: dict[str, Tensor], folder: Path, facts: dict[str, Any]) -> None:
    """What was tested: all of a classifier, or the linear layer alone where the features were frozen."""
    from safetensors.torch import save

    card.write(folder / "classifier.safetensors", save(weights), facts)


def pretraining_config(weights: str, seed: int, root: Path, quiet: bool = False) -> Config:
    """Of the run behind `pretrain:RECIPE KEY=VALUE ...`, with its name."""
    recipe, *overrides = weights.removeprefix("pretrain:").split()
    overrides.append(f"run.seed={seed}")
    config = load_config(recipe, overrides)
    if config.run.auto:  # a row is of numbers, here as on any other machine
        process = distributed.start(config.engine.device, config.engine.timeout_minutes)
        config = sizing.sized(config, process, (lambda *_: None) if quiet else sizing.show)
    name = f"{Path(recipe).stem}-seed{seed}-{config_hash(config)}"
    return replace(config, run=replace(config.run, name=name, root=str(root)))


def pretrained(weights: str, seed: int, root: Path, quiet: bool = False) -> str:
    """The finished run behind `pretrain:RECIPE KEY=VALUE ...`."""
    config = pretraining_config(weights, seed, root, quiet)
    folder = run_folder(config)
    root.mkdir(parents=True, exist_ok=True)
    # Jobs of one array may want the same run; the first of one job's processes asks for all of them.
    first = os.environ.get("RANK", "0") == "0"
    waiting = locked(folder.with_name(f".{folder.name}.lock"), f"{folder} is being trained", wait=True)
    with waiting if first else contextlib.nullcontext():
        return str(engine.finish(config, quiet).path)


def config_hash(config: Config) -> str:
    """Of a run's configuration and the content of its images, which is other content another time. Where a plug-in's
    file lies does not count: what is chosen from it has its name in other keys. Nor does a key that is younger than
    stored results, at its default."""
    if config.run.auto:
        raise ConfigError(f"a row of a table needs numbers, not auto: give {', '.join(config.run.auto)}")
    values = to_dict(replace(config, run=replace(config.run, plugins=[])))
    for section, key in FREE_AND_YOUNGER:
        del values[section][key]
    for (section, key), usual in YOUNGER_AT.items():
        if values[section][key] == usual:
            del values[section][key]
    if values["engine"]["augment"] == "device":  # as all were that do not know the key
        del values["engine"]["augment"]
    del values["run"]["auto"]
    values["data"]["scenes"] = scenes_identity(values["data"]["scenes"])
    usual = to_dict(replace(config, objective=type(config.objective)()))["objective"]
    for key in YOUNGER & values["objective"].keys():
        if values["objective"][key] == usual[key]:
            del values["objective"][key]
    if "lists" in (regions := values["objective"].get("regions", {})):
        regions = {"lists": regions.pop("lists"), **regions}  # the order that stored results know
        if regions["novelty"] == 0.0:  # younger than the rest of them
            del regions["novelty"]
        values["objective"]["regions"] = regions
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    made = config.data.source == "scenes" and config.data.scenes.objects is None  # not read
    images = "" if made else _images_of(config.data)
    return hashlib.sha256((text + images).encode()).hexdigest()[:8]


@lru_cache(maxsize=8)  # the cells of a table share it
def _images_of(data: PretrainingData) -> str:
    composed = data.source == "scenes" and data.scenes.objects is not None  # a run's cell is probed on its test scenes
    tested = hash_of_images(ScenesSource(data.scenes, "test")) if composed else ""
    return hash_of_images(build_source(data)) + tested
