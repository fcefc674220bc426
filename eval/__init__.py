"""Downstream evaluation: protocols (configs/eval/), the data sets they need, the papers' tables. Importing is light:
names are fetched when first used."""

import importlib

_HOME = {
    "extract": "mls.eval.extraction",
    "knn": "mls.frozen.probe",
    "linear_probe": "mls.frozen.probe",
    "load_protocol": "mls.eval.protocol",
    "protocols": "mls.eval.protocol",
    "run": "mls.eval.cells",
    "suites": "mls.eval.suite",
    "load_suite": "mls.eval.suite",
}
__all__ = ["extract", "knn", "linear_probe", "load_protocol", "load_suite", "protocols", "run", "suites"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mls.eval' has no attribute '{name}'")
