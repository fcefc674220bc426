"""Self-supervised pretraining on scene images with multi-label pseudo-targets.

The public API is the list below. Names are imported when they are first used: `import mls` stays light.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load_config": "mls.recipes",
    "pretrain": "mls.engine",
    "resume": "mls.engine",
    "Run": "mls.engine",
    "load_backbone": "mls.models",
    "export": "mls.exporting",
    "verify_export": "mls.exporting",
}
_PARTS = ("eval", "losses", "matching", "methods")  # modules that people reach through `mls.`
__all__ = ["Run", "__version__", "export", "load_backbone", "load_config", "pretrain", "resume", "verify_export"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"mls.{name}")
    raise AttributeError(f"module 'mls' has no attribute '{name}'")
