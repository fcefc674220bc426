"""Lets mmsegmentation resume its own checkpoints with torch's safe loading. Importing this file changes how mmengine
reads local files: torch.load with weights_only=True, which beside tensors accepts only what mmengine writes itself,
numpy numbers and histories of logged values. Files with other objects are refused."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mls.errors import CheckpointError, refusal
from mls.models.foreign import load_plain

# The same functions have different module names in numpy 1 and numpy 2.
MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
STATISTICS = ("min", "max", "current", "mean")  # methods of a history


def install() -> None:
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.runner.checkpoint import CheckpointLoader

        CheckpointLoader.register_scheme(prefixes="", loader=read, force=True)


def read(filename: str, map_location: Any = None) -> Any:
    """Replaces mmengine's `load_from_local`."""
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return load_plain(path, map_location)
    except Exception as error:  # zip, pickle and OS errors all mean an unreadable file
        raise CheckpointError(refusal(path, error)) from None


def _safe_globals() -> list[Any]:
    """numpy's arrays, scalars and number types, and mmengine's history of logged values. Its pickle refers to the
    history's methods by getattr, which is allowed for STATISTICS alone."""
    from mmengine.logging import HistoryBuffer

    def get_statistic(owner: Any, name: str) -> Any:
        if owner is not HistoryBuffer or name not in STATISTICS:
            raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {name}")
        return getattr(owner, name)

    builders = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    named = [(function, f"{module}.{name}") for module in MODULES for name, function in builders.items()]
    numbers = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [HistoryBuffer, np.ndarray, np.dtype, *numbers, *named, (get_statistic, "builtins.getattr")]


install()
