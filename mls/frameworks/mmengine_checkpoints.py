"""Lets mmsegmentation resume its own checkpoints with torch's safe reading on. Importing this file changes how mmengine
reads local files: torch.load with weights_only=True, and beside tensors only what mmengine writes there itself, plain
numbers of numpy and histories of logged values. A file that asks for anything else is refused."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mls.errors import CheckpointError
from mls.models.foreign import refusal

# numpy 1 and numpy 2 write the same functions under different names; both are read.
MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
STATISTICS = ("min", "max", "current", "mean")  # what a history can be asked for


def install() -> None:
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.runner.checkpoint import CheckpointLoader

        CheckpointLoader.register_scheme(prefixes="", loader=read, force=True)


def read(filename: str, map_location: Any = None) -> Any:
    """In the place of mmengine's `load_from_local`."""
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(path, str(error))) from None
    except Exception as error:  # zip, pickle and OS errors of every kind mean the same here
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _harmless() -> list[Any]:
    """Of numpy: arrays and scalars, and the types of numbers. Of mmengine: a history of logged values, which names its
    statistics with getattr; no other attribute is given out."""
    from mmengine.logging import HistoryBuffer

    def statistic(owner: Any, name: str) -> Any:
        if owner is not HistoryBuffer or name not in STATISTICS:
            raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {name}")
        return getattr(owner, name)

    builders = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    named = [(function, f"{module}.{name}") for module in MODULES for name, function in builders.items()]
    numbers = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [HistoryBuffer, np.ndarray, np.dtype, *numbers, *named, (statistic, "builtins.getattr")]


install()
