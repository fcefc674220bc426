"""One cell of a table: a protocol, weights and a seed. Finished cells are found in the store of results; an unfinished
one goes on from its folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import mls
from mls.errors import ConfigError
from mls.eval import supervised
from mls.eval.protocol import Supervised, fingerprint, load_protocol, to_yaml
from mls.eval.training import Training
from mls.files import sha256, write_atomically
from mls.models import weights_file
from mls.results import Results


def run(
    protocol: Supervised | str | Path,
    weights: str | Path | None = None,
    seed: int = 0,
    root: Path | None = None,
    keep: bool = True,
    quiet: bool = False,
) -> dict[str, float]:
    """The metrics of one protocol, weights and seed, as shares; from the store where they are there already.

    `weights`: a run, a file, a name such as torchvision:resnet50, or "random"; default: the protocol's own. `root`
    (default $MLS_RUNS, else ./runs) holds results.jsonl, and under eval/ a folder for each cell; `keep=False` deletes
    the folder when its numbers are stored.
    """
    asked: Supervised = load_protocol(protocol) if isinstance(protocol, str | Path) else protocol
    wanted = str(weights) if weights is not None else asked.model.weights
    root = root or runs_root()
    store, key = Results(root / "results.jsonl"), cell_key(asked, wanted, seed)
    name = cell_name(asked, wanted, seed)
    folder = root / "eval" / name
    known = finished(store, key)
    if known and (not keep or (folder / "classifier.safetensors").is_file()):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "protocol.yaml", to_yaml(asked).encode())
    title = f"{asked.recipe}, {asked.training.loss}, seed {seed}"
    outcome = supervised.run(asked, wanted, seed, folder, title=title, quiet=quiet)
    row: dict[str, Any] = {
        "protocol": asked.recipe,
        "task": asked.task,
        "dataset": asked.data.name,
        "loss": asked.training.loss,
        "seed": seed,
        "weights": wanted,
        "weights_hash": weights_hash(wanted),
        "cell": key,
        "run": name,
        "selection": outcome.selection,
        "validation": outcome.training.best_value(),
        "duration": round(outcome.seconds, 1),
        "versions": {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    row["metrics"] = len(outcome.values)
    if keep:
        save_classifier(outcome.training, folder)
    store.add_all(
        [{"metric": f"{asked.data.name}/{name}", "value": value, **row} for name, value in outcome.values.items()]
    )
    shutil.rmtree(folder / "state" if keep else folder, ignore_errors=True)
    return outcome.values


def validated(protocol: Supervised, weights: str, seed: int, root: Path) -> float:
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


def save_classifier(training: Training, folder: Path) -> None:
    """The weights that were tested."""
    from safetensors.torch import save

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in training.weights().items()}
    write_atomically(folder / "classifier.safetensors", save(weights))


def cell_name(protocol: Supervised, weights: str, seed: int) -> str:
    return f"{protocol.recipe}-{protocol.training.loss}-seed{seed}-{cell_key(protocol, weights, seed)}"


def finished(store: Results, key: str) -> dict[str, float]:
    """What the store knows of a cell: metric (without its data set) to value; empty when it is not finished."""
    rows = store.rows(cell=key)
    found = {row["metric"].partition("/")[2]: float(row["value"]) for row in rows}
    # Fewer rows than were to be written: the writer was killed on the way, and the cell is measured again.
    return found if rows and len(found) == rows[-1]["metrics"] else {}


def cell_key(protocol: Supervised, weights: str, seed: int) -> str:
    text = f"{fingerprint(protocol)}/{weights_hash(weights)}/{seed}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_hash(weights: str) -> str:
    """Of the file behind the weights; of the name where there is none."""
    path = weights_file(weights) if ":" not in weights else None
    return (hashlib.sha256(weights.encode()).hexdigest() if path is None else sha256(path))[:16]


def runs_root() -> Path:
    return Path(os.environ.get("MLS_RUNS") or "runs").expanduser()
