"""A pretraining run as a cell: a recipe with a seed, and what its backbone is worth to a linear probe and to kNN. The
tables of `mls demo` and of the studies under `mls bench` are made of these."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mls import engine
from mls.config import Config
from mls.data.scenes import ScenesSource, scenes_of
from mls.engine import Run
from mls.engine.branch import create_branch
from mls.engine.checkpoint import Checkpoints
from mls.errors import Stopped
from mls.eval.cells import Cell, Measured, config_hash, over_seeds, values_over_seeds
from mls.eval.outcome import Outcome
from mls.files import slug
from mls.frozen.features import embed
from mls.frozen.metrics import mean_average_precision
from mls.frozen.probe import knn_scores, linear_probe
from mls.frozen.untrained import untrained
from mls.locks import locked
from mls.models import load_backbone
from mls.monitor.dense import DenseProbe
from mls.recipes import applicable, load_config
from mls.results import Results
from mls.tables import Column, Row, Table

PROBES = (Column("linear mAP", "linear"), Column("kNN mAP", "knn"))
DENSE, DENSE_IMAGES = Column("dense mIoU", "dense"), 500
OVERLAP = (Column("pseudo-label overlap", "overlap", 3, scale=1), Column("by chance", "chance", 3, scale=1))
PRECISION = Column("pseudo-label precision", "precision", 3, scale=1)
MEASURED = (*PROBES, *OVERLAP, PRECISION)


@dataclass(frozen=True)
class Pretraining(Cell):
    row: str  # of the table
    recipe: str
    overrides: Sequence[str]
    seed: int = 0
    trained: bool = True  # False: the network as it was initialised
    own_scenes: bool = False  # other scenes with every seed
    trunk: Pretraining | None = (
        None  # it goes on from this one's step `trunk_steps`: rows of a table may share the start
    )
    trunk_steps: int = 0

    @cached_property
    def config(self) -> Config:
        """Without the place of the run, which changes no number."""
        config = _loaded(self.recipe, tuple(self.overrides))
        scenes = replace(config.data.scenes, seed=self.seed) if self.own_scenes else config.data.scenes
        run, data = replace(config.run, seed=self.seed, root=None), replace(config.data, scenes=scenes)
        return replace(config, run=run, data=data)

    def with_seed(self, seed: int) -> Pretraining:
        return replace(self, seed=seed, trunk=self.trunk and replace(self.trunk, seed=seed))

    def placed(self, root: Path, name: str | None) -> Config:
        return replace(self.config, run=replace(self.config.run, root=str(root), name=name))

    @property
    def key(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        start = f"-{self.trunk_steps}-of-{config_hash(self.trunk.config)}" if self.trunk else ""
        return f"{slug(self.row)}-seed{self.seed}-{config_hash(self.config)}{start}"

    @property
    def dataset(self) -> str:
        return self.config.data.source

    def folder(self, root: Path) -> Path:
        return root / self.name

    def facts(self) -> dict[str, Any]:
        alike = replace(self.config, run=replace(self.config.run, seed=0))
        if self.own_scenes:
            alike = replace(alike, data=replace(alike.data, scenes=replace(alike.data.scenes, seed=0)))
        settings = config_hash(alike)
        common = {"protocol": self.recipe, "task": "pretraining", "dataset": self.dataset, "weights": self.row}
        return {**common, "settings": settings}

    def stored(self, root: Path) -> Measured | None:
        found = super().stored(root)
        if found is not None:
            return found
        # Version 0.1 stored one row for all numbers of a run, the probes' in per cent.
        old = Results(root / "results.jsonl").find(cell=self.row, config=config_hash(self.placed(root, name=None)))
        if old is None:
            return None
        values = {column.name: old[column.name] / column.scale for column in MEASURED if column.name in old}
        return Measured(values, old, stored_before=True)

    def measure(self, folder: Path, quiet: bool) -> Outcome:
        print(f"— {self.row}, seed {self.seed}", file=sys.stderr)
        began = time.monotonic()
        if not self.trained:
            backbone = untrained(self.config, ScenesSource(self.config.data.scenes))
            return Outcome(probe_on_scenes(backbone, self.config), "untrained", None, time.monotonic() - began)
        run = self.run(folder.parent, quiet)
        values = online_knn(run)
        if run.config.data.source == "scenes":
            print("  probing (linear and kNN)", file=sys.stderr)
            values = probe_on_scenes(load_backbone(run.path), run.config)
        return Outcome(values | label_overlap(run), "after the last step", None, time.monotonic() - began)

    def run(self, root: Path, quiet: bool) -> Run:
        """The finished run, trained now or found."""
        config = self.placed(root, self.name)
        alone = os.environ.get("WORLD_SIZE", "1") == "1"  # several processes train it whole, which gives the same run
        if self.trunk is not None and alone and not (root / self.name / "config.yaml").is_file():
            parent = self.trunk.up_to(self.trunk_steps, root, quiet)
            create_branch(parent, self.trunk_steps, [f"run.name={self.name}", f"run.root={root}"], config)
        return engine.finish(config, quiet)

    def up_to(self, steps: int, root: Path, quiet: bool) -> Run:
        """The run with a checkpoint of this step, where it stops."""
        run, config = Run(root / self.name), self.placed(root, self.name)
        reached = lambda: steps in Checkpoints(run.checkpoints, 1).steps()
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{self.name}.lock", f"{run.path} is being trained", wait=True):  # other arms share it
            try:
                if not reached():
                    engine.finish(replace(config, engine=replace(config.engine, max_steps=steps)), quiet)
            except Stopped:
                if not reached():
                    raise
        return run


@lru_cache(maxsize=64)  # the seeds of a row share it
def _loaded(recipe: str, overrides: tuple[str, ...]) -> Config:
    return load_config(recipe, applicable(recipe, overrides))  # rows of a table share some that not every method has


def compare(rows: Mapping[str, Pretraining], seeds: int, root: Path, helped: bool = False) -> dict[str, list[Measured]]:
    """`helped`: by a second process."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S")
    cells = {name: [cell.with_seed(seed) for seed in range(seeds)] for name, cell in rows.items()}
    with _second_process(rows, seeds, root) if helped else contextlib.nullcontext():
        found = over_seeds(cells, root)
    before = lambda one: one.stored_before and str(one.row.get("time", "")) < began
    return {name: [replace(one, stored_before=before(one)) for one in seeds] for name, seeds in found.items()}


@contextlib.contextmanager
def _second_process(rows: Mapping[str, Pretraining], seeds: int, root: Path) -> Iterator[None]:
    """Measures the same cells from the last to the first meanwhile, where there is no GPU to share: networks as small
    as those of the scenes gain little by a second thread. What it fails in is left to this process."""
    threads = torch.get_num_threads()
    cells = [cell.with_seed(seed) for seed in reversed(range(seeds)) for cell in [*rows.values()][::-1]]
    if threads == 1 or torch.cuda.is_available() or all(cell.stored(root) for cell in cells):
        yield
        return
    second = multiprocessing.get_context("spawn").Process(target=_finish_all, args=(cells, root, threads // 2))
    second.start()
    torch.set_num_threads(threads - threads // 2)
    try:
        yield
    finally:
        second.terminate()  # nothing is left to measure, or this process was stopped: it saves and ends
        second.join()
        torch.set_num_threads(threads)


def _finish_all(cells: Sequence[Pretraining], root: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    with (
        open(root / "second_process.log", "a", buffering=1) as log,  # whole lines, whenever it is ended
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            for cell in cells:
                cell.finish(root, quiet=True)
        except (Stopped, KeyboardInterrupt) as error:
            print(error, file=log)


def table_of(found: Mapping[str, Sequence[Measured]], heading: str, columns: Sequence[Column], note: str) -> Table:
    """A row for each set of seeds. A number that is shown again says so."""
    measured = [one for seeds in found.values() for one in seeds]
    dates = sorted(one.date for one in measured if one.stored_before)
    if dates:
        days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        note += f"; {len(dates)} of {len(measured)} runs: measured on {days}, not run again (another --out runs all)"
    return Table([heading], columns, [Row([name], values_over_seeds(seeds)) for name, seeds in found.items()], note)


def probe_on_scenes(backbone: nn.Module, config: Config) -> dict[str, float]:
    """Multi-label mAP of a linear probe and of kNN, trained on the train split, measured on the test split; and the
    mIoU of the online dense probe, on some scenes of both."""
    train, test = ScenesSource(config.data.scenes, "train"), ScenesSource(config.data.scenes, "test")
    features = embed(backbone, train, range(len(train)), config.augment)
    queries = embed(backbone, test, range(len(test)), config.augment)
    probe = linear_probe(features, train.labels, queries)
    votes = knn_scores(features, train.labels, queries)
    dense = DenseProbe(replace(config, monitor=replace(config.monitor, dense_images=DENSE_IMAGES)), train)
    return {
        "dense": dense.miou(backbone, torch.device("cpu")),
        "linear": float(mean_average_precision(probe.scores, test.labels)),
        "knn": float(mean_average_precision(votes, test.labels)),
    }


def scene_type_map(config: Config) -> float:
    """The mAP of predicting each class by its frequency in the scene's type, which the background alone shows."""
    train, test = (scenes_of(config.data.scenes, split)[0] for split in ("train", "test"))
    types = int(train.types.max()) + 1
    frequencies = torch.stack([train.labels[train.types == one].mean(0) for one in range(types)])
    return float(mean_average_precision(frequencies[test.types], test.labels))


def online_knn(run: Run) -> dict[str, float]:
    """The last value that the monitor measured, where the data have labels."""
    found = run.last("knn/map") or run.last("knn/top1")
    return {} if found is None else {"knn": found}


def label_overlap(run: Run) -> dict[str, float]:
    """Pseudo-label overlap, its chance level, and precision, mean over the last tenth of the log."""
    rows: list[dict[str, Any]] = [row for row in run.metrics() if row.get("labels/overlap") is not None]
    rows = rows[-max(1, len(rows) // 10) :]
    logged = {"overlap": "labels/overlap", "chance": "labels/overlap_chance", "precision": "labels/precision"}
    return {name: sum(row[key] for row in rows) / len(rows) for name, key in logged.items()} if rows else {}
