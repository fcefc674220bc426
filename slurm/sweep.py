"""Sweeps: `--sweep objective.k=1,5 --sweep seed=0,1` gives every combination, each a run in one folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from mls.errors import ConfigError

SHORT = {"seed": "run.seed"}


def combinations(sweeps: Sequence[str]) -> list[list[str]]:
    """Every combination as overrides.

    >>> combinations(["objective.k=1,5", "seed=0,1"])[1]
    ['objective.k=1', 'run.seed=1']
    >>> combinations(["augment.scale=[0.2,1.0],[0.6,1.0]"])
    [['augment.scale=[0.2,1.0]'], ['augment.scale=[0.6,1.0]']]
    """
    axes = []
    for sweep in sweeps:
        key, separator, values = sweep.partition("=")
        # Commas inside brackets belong to a value.
        found = [value for value in re.split(r",(?![^\[{]*[\]}])", values) if value]
        if not separator or not found:
            raise ConfigError(f"'{sweep}' is not a sweep: write key=value,value, for example objective.k=1,5,20")
        axes.append([f"{SHORT.get(key, key)}={value}" for value in found])
    return [list(combination) for combination in itertools.product(*axes)]


def cell_name(overrides: Sequence[str]) -> str:
    """The folder of a combination.

    >>> cell_name(["objective.k=5", "run.seed=1", "augment.scale=[0.2,1.0]"])
    'k=5_seed=1_scale=0.2-1.0'
    """
    parts = [override.partition("=") for override in overrides]
    name = "_".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in parts)
    return re.sub(r"[^\w.=+-]+", "-", name.replace("[", "").replace("]", ""))
