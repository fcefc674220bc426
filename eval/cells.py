"""One cell of a table: a protocol, weights and a seed. Finished cells are found in the store of results; an unfinished
one goes on from its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mls
from mls import distributed, engine
from mls.config import to_yaml as config_to_yaml
from mls.errors import ConfigError
from mls.eval import frozen, supervised
from mls.eval.dense import run as dense
from mls.eval.dense.schema import Dense
from mls.eval.outcome import Outcome
from mls.eval.protocol import AnyProtocol, Supervised, fingerprint, load_protocol, to_yaml
from mls.eval.training import Training
from mls.files import alone, runs_folder, sha256, write_atomically
from mls.frameworks import installed as frameworks
from mls.models import weights_file
from mls.recipes import load_config
from mls.results import Results

RUNNERS: dict[str, Callable[..., Outcome]] = {
    "multilabel": supervised.run,
    "finetune": supervised.run,
    "linear": frozen.run,
    "knn": frozen.run,
    "svm": frozen.run,
    "detection": dense.run,
    "segmentation": dense.run,
}


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
    asked: AnyProtocol = load_protocol(protocol) if isinstance(protocol, str | Path) else protocol
    if isinstance(asked, Dense):
        frameworks.require(asked.backend)  # before a backbone is trained for it
    root = root or runs_folder()
    wanted = str(weights) if weights is not None else asked.model.weights
    used = pretrained(wanted, seed, root, quiet)
    store, key = Results(root / "results.jsonl"), cell_key(asked, used, seed)
    name = cell_name(asked, used, seed)
    folder = root / "eval" / name
    known = finished(store, key)
    if known and (not keep or (folder / "classifier.safetensors").is_file() or asked.task == "knn"):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "protocol.yaml", to_yaml(asked).encode())
    outcome = RUNNERS[asked.task](asked, used, seed, folder, title=title(asked, wanted, seed), quiet=quiet)
    row: dict[str, Any] = {
        "protocol": asked.recipe,
        "task": asked.task,
        "dataset": asked.data.name,
        **({"loss": asked.training.loss} if isinstance(asked, Supervised) else {}),
        **({"backend": asked.backend} if isinstance(asked, Dense) else {}),
        "seed": seed,
        "settings": fingerprint(asked),
        "weights": wanted,
        "weights_hash": weights_hash(used),
        "cell": key,
        "run": name,
        "selection": outcome.selection,
        "validation": outcome.validation,
        "duration": round(outcome.seconds, 1),
        "versions": {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "metrics": len(outcome.values),
    }
    if distributed.rank() == 0:  # all processes have the same numbers
        if keep and outcome.weights:
            save_classifier(outcome.weights, folder)
        store.add_all(
            [{"metric": f"{asked.data.name}/{name}", "value": value, **row} for name, value in outcome.values.items()]
        )
        shutil.rmtree(folder / "state" if keep else folder, ignore_errors=True)
    distributed.barrier()
    return outcome.values


def pretrained(weights: str, seed: int, root: Path, quiet: bool = False) -> str:
    """The finished run behind `pretrain:RECIPE KEY=VALUE ...`; other weights as they are."""
    if not weights.startswith("pretrain:"):
        return weights
    recipe, *overrides = weights.removeprefix("pretrain:").split()
    overrides.append(f"run.seed={seed}")
    key = hashlib.sha256(config_to_yaml(load_config(recipe, overrides)).encode()).hexdigest()[:8]
    name = f"{Path(recipe).stem}-seed{seed}-{key}"
    config = load_config(recipe, [*overrides, f"run.name={name}", f"run.root={root}"])
    root.mkdir(parents=True, exist_ok=True)
    # Jobs of one array may want the same run; of one job's processes the first asks for all.
    first = os.environ.get("RANK", "0") == "0"
    with alone(root / f".{name}.lock") if first else contextlib.nullcontext():
        return str(engine.finish(config, quiet).path)


def title(protocol: AnyProtocol, weights: str, seed: int) -> str:
    by = f" on {protocol.backend}" if isinstance(protocol, Dense) and protocol.backend != "torchvision" else ""
    return f"{protocol.recipe}{by}, {method(protocol) or weights}, seed {seed}"


def method(protocol: AnyProtocol) -> str:
    """What a protocol of the weak-label family compares."""
    return protocol.training.loss if isinstance(protocol, Supervised) and protocol.task == "multilabel" else ""


def validated(protocol: AnyProtocol, weights: str, seed: int, root: Path) -> float:
    """The best value of the protocol's metric on the validation part, of a finished cell."""
    row = Results(root / "results.jsonl").find(cell=cell_key(protocol, weights, seed))
    if row is None or row["validation"] is None:
        raise ConfigError(f"{protocol.recipe} has no validation part to choose on: raise data.validation above 0")
    return float(row["validation"])


def trained(protocol: Supervised, weights: str | None, seed: int, root: Path) -> Training:
    """The classifier of a cell with its data and what it knows: run now, or read from the cell's folder."""
    wanted = weights if weights is not None else protocol.model.weights
    file = root / "eval" / cell_name(protocol, wanted, seed) / "classifier.safetensors"
    if not file.is_file():
        run(protocol, wanted, seed, root)
    from safetensors.torch import load_file

    training = supervised.prepare_training(protocol, wanted, seed, None)
    training.load_weights(load_file(file))
    return training


def save_classifier(weights: dict[str, Tensor], folder: Path) -> None:
    """What was tested: all of a classifier, or the linear layer alone where the features were frozen."""
    from safetensors.torch import save

    write_atomically(folder / "classifier.safetensors", save(weights))


def cell_name(protocol: AnyProtocol, weights: str, seed: int) -> str:
    parts = [protocol.recipe, method(protocol), f"seed{seed}", cell_key(protocol, weights, seed)]
    return "-".join(part for part in parts if part)


def finished(store: Results, key: str) -> dict[str, float]:
    """What the store knows of a cell: metric (without its data set) to value; empty when it is not finished."""
    rows = store.rows(cell=key)
    found = {row["metric"].partition("/")[2]: float(row["value"]) for row in rows}
    # Fewer rows than were to be written: the writer was killed on the way, and the cell is measured again.
    return found if rows and len(found) == rows[-1]["metrics"] else {}


def cell_key(protocol: AnyProtocol, weights: str, seed: int) -> str:
    text = f"{fingerprint(protocol)}/{weights_hash(weights)}/{seed}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_hash(weights: str) -> str:
    """Of the file behind the weights; of the name where there is none."""
    path = weights_file(weights) if ":" not in weights else None
    return (hashlib.sha256(weights.encode()).hexdigest() if path is None else sha256(path))[:16]
