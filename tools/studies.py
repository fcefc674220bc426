"""What the demo and the studies under `mls bench` share: finish a run, probe it on the scenes, tell mean ± std."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from mls.config import Config
    from mls.engine import Run
    from mls.results import Results


def probe_on_scenes(backbone: nn.Module, config: Config) -> dict[str, float]:
    """Multi-label mAP of a linear probe and of kNN, in per cent, trained on the train split, told on the test split."""
    from mls.data.scenes import ScenesSource
    from mls.frozen.features import embed
    from mls.frozen.metrics import mean_average_precision
    from mls.frozen.probe import knn_scores, linear_probe

    train, test = ScenesSource(config.data.scenes, "train"), ScenesSource(config.data.scenes, "test")
    features = embed(backbone, train, range(len(train)), config.augment)
    asked = embed(backbone, test, range(len(test)), config.augment)
    probe = linear_probe(features, train.labels, asked)
    votes = knn_scores(features, train.labels, asked)
    return {
        "linear": 100 * float(mean_average_precision(probe.scores, test.labels)),
        "knn": 100 * float(mean_average_precision(votes, test.labels)),
    }


def scene_type_alone(config: Config) -> dict[str, float]:
    """The mAP, in per cent, of who sees nothing but a scene's type: how often each class occurs in that type."""
    import torch

    from mls.data.scenes import make_scenes
    from mls.frozen.metrics import mean_average_precision

    scenes = config.data.scenes
    train = make_scenes(scenes.count, "train", scenes.size, scenes.seed)
    test = make_scenes(scenes.test_count, "test", scenes.size, scenes.seed)
    kinds = int(train.types.max()) + 1
    often = torch.stack([train.labels[train.types == kind].mean(0) for kind in range(kinds)])
    return {"linear": 100 * float(mean_average_precision(often[test.types], test.labels))}


def label_overlap(run: Run) -> dict[str, float]:
    """Pseudo-label overlap, its chance level, and precision, mean over the last tenth of the log."""
    rows: list[dict[str, Any]] = [row for row in run.metrics() if row.get("labels/overlap") is not None]
    rows = rows[-max(1, len(rows) // 10) :]
    if not rows:
        return {}
    mean = lambda key: sum(row[key] for row in rows) / len(rows)
    return {
        "overlap": mean("labels/overlap"),
        "chance": mean("labels/overlap_chance"),
        "precision": mean("labels/precision"),
    }


def finish_cell(store: Results, name: str, recipe: str, overrides: Sequence[str], train: bool = True) -> dict[str, Any]:
    """The numbers of one cell of a study: from the store if finished, else trained (or gone on with) and probed."""
    from mls import engine
    from mls.config import to_yaml
    from mls.recipes import load_config

    config = load_config(recipe, overrides)
    key = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:8]
    seed = config.run.seed
    known = store.find(cell=name, config=key)
    if known is not None:
        return dict(known)
    typer.echo(f"— {name}, seed {seed}", err=True)
    if train:
        run = engine.finish(load_config(recipe, [*overrides, f"run.name={slug(name)}-seed{seed}-{key}"]))
        values: dict[str, Any] = {"run": run.name} | _measure(run)
    else:
        values = _measure_untrained(config)
    store.add(cell=name, config=key, seed=seed, **values)
    return values


def _measure(run: Run) -> dict[str, float]:
    from mls.models import load_backbone

    if run.config.data.source != "scenes":
        knn = run.last("knn/map") or run.last("knn/top1")
        return ({} if knn is None else {"knn": 100 * knn}) | label_overlap(run)
    typer.echo("  probing (linear and kNN)", err=True)
    return probe_on_scenes(load_backbone(run.path), run.config) | label_overlap(run)


def _measure_untrained(config: Config) -> dict[str, float]:
    from mls.data.scenes import ScenesSource
    from mls.frozen.untrained import untrained

    return probe_on_scenes(untrained(config, ScenesSource(config.data.scenes)), config)


def slug(name: str) -> str:
    """
    >>> slug("MLS, oracle pseudo-labels")
    'MLS-oracle-pseudo-labels'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """
    >>> spread([51.0, 53.0]), spread([51.0]), spread([])
    ('52.0 ± 1.4', '51.0', '')
    """
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text and as markdown."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
