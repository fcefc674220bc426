"""Downstream evaluation: protocols (configs/eval/), the data sets they need, the papers' tables. Importing is light:
names are fetched when first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor and a type checker see; at run time __getattr__ finds the same
    from mls.eval.cells import run
    from mls.eval.extraction import extract
    from mls.eval.prediction import predict, predict_batches, predict_dense
    from mls.eval.protocol import load_protocol, protocols
    from mls.eval.suite import load_suite, suites
    from mls.frozen.probe import knn, linear_probe

_HOME = {
    "extract": "mls.eval.extraction",
    "knn": "mls.frozen.probe",
    "linear_probe": "mls.frozen.probe",
    "load_protocol": "mls.eval.protocol",
    "protocols": "mls.eval.protocol",
    "predict": "mls.eval.prediction",
    "predict_batches": "mls.eval.prediction",
    "predict_dense": "mls.eval.prediction",
    "run": "mls.eval.cells",
    "suites": "mls.eval.suite",
    "load_suite": "mls.eval.suite",
}
__all__ = ["extract", "knn", "linear_probe", "load_protocol", "load_suite", "predict", "predict_batches"]
__all__ += ["predict_dense", "protocols", "run", "suites"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mls.eval' has no attribute '{name}'")
