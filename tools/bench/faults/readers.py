"""Everything that makes, loads or is given features, called with a tensor that was spoilt on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Any], object]  # writes NaN or infinity into a tensor
Reader = Callable[[Path, Spoil], object]  # in an empty folder


def readers_of_features() -> dict[str, Reader]:
    import torch

    from mls.frozen import index, probe

    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 8, generator=draw), torch.arange(60) % 3

    def spoilt(spoil: Spoil) -> Any:
        spoil(copied := features.clone())
        return copied

    return {
        "kNN": lambda folder, spoil: probe.knn(spoilt(spoil), labels),
        "kNN's queries": lambda folder, spoil: probe.knn(features, labels, spoilt(spoil), labels),
        "kNN's scores": lambda folder, spoil: probe.knn_scores(spoilt(spoil), labels, features),
        "linear": lambda folder, spoil: probe.linear_probe(spoilt(spoil), labels, features),
        "linear's test": lambda folder, spoil: probe.linear_probe(features, labels, spoilt(spoil)),
        "SGD": lambda folder, spoil: probe.sgd_probe(spoilt(spoil), labels, features),
        "SVM": lambda folder, spoil: probe.svm_probe(spoilt(spoil), labels, features, folds=2),
        "SVM's test": lambda folder, spoil: probe.svm_probe(features, labels, spoilt(spoil), folds=2),
        "the index": lambda folder, spoil: index.build(spoilt(spoil)).search(features, 2),
        "a cache": lambda folder, spoil: cached({"of": "spoilt"}, spoilt(spoil)),
        "an old cache": _old_cache,
        "images": _images,
        "regions": _regions,
        "a file of weights": _file_of_weights,
    }


def cached(facts: dict[str, Any], rows: Any) -> Any:
    from mls.frozen.features import cached_features

    return cached_features(facts, len(rows), lambda first: (part for part in rows[first:].split(100)), quiet=True)


def _old_cache(folder: Path, spoil: Spoil) -> object:
    """As version 0.1 stored features of any kind."""
    import numpy as np
    import torch

    rows = torch.arange(700 * 8, dtype=torch.float32).view(700, 8)
    found = cached({"of": "an old cache"}, rows)
    stored = np.load(found.folder / "features.npy", mmap_mode="r+")
    spoil(torch.from_numpy(stored))
    stored.flush()
    parts = [np.ascontiguousarray(stored[start : start + 256]) for start in range(0, 700, 256)]
    index = json.loads((found.folder / "features.json").read_text())
    index["blocks"] = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
    (found.folder / "features.json").write_text(json.dumps(index))
    return cached({"of": "an old cache"}, rows)


def _images(folder: Path, spoil: Spoil) -> object:
    import torch

    from mls.config import AugmentConfig
    from mls.frozen.features import embed

    network = _network(lambda statistics: statistics.fill_(torch.nan))  # an infinity may leave features finite
    return embed(network, _scenes(), range(8), AugmentConfig(size=32))


def _regions(folder: Path, spoil: Spoil) -> object:
    import torch

    from mls.config import AugmentConfig, RegionsConfig
    from mls.core.regions import RegionEncoder

    def network(windows: Any) -> tuple[Any, None]:
        spoil(made := windows.mean((2, 3)).repeat(1, 2)[:, :4].contiguous())
        return made, None

    spoilt: Any = network
    options, cpu = RegionsConfig(grid=2, size=16), torch.device("cpu")
    return RegionEncoder(spoilt, spoilt, AugmentConfig(size=32), options, cpu, 0, torch.zeros(4))(_scenes(), range(8))


def _file_of_weights(folder: Path, spoil: Spoil) -> object:
    from mls.config import AugmentConfig
    from mls.models import load_backbone, save_backbone

    save_backbone(folder, _network(spoil), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    return load_backbone(folder)


def _network(spoil: Spoil) -> Any:
    from mls.models import load_backbone

    backbone = load_backbone("resnet_tiny")
    spoil(next(module for name, module in backbone.named_modules() if name.endswith("bn1")).running_var)
    return backbone


def _scenes() -> Any:
    from mls.config import ScenesConfig
    from mls.data.scenes import ScenesSource

    return ScenesSource(ScenesConfig(count=8, test_count=8))
