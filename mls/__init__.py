"""Self-supervised pretraining on scene images with multi-label pseudo-targets.

The public API is the list below. Names are imported when they are first used: `import mls` stays light.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor and a type checker see; at run time __getattr__ finds the same
    from mls import eval, losses, matching, methods, plugins
    from mls.engine import Run, pretrain, resume
    from mls.exporting import export, verify_export
    from mls.models import load_backbone
    from mls.models.spatial import dense_features
    from mls.recipes import load_config

__version__ = "0.2.0"

_HOME = {
    "load_config": "mls.recipes",
    "pretrain": "mls.engine",
    "resume": "mls.engine",
    "Run": "mls.engine",
    "load_backbone": "mls.models",
    "dense_features": "mls.models.spatial",
    "export": "mls.exporting",
    "verify_export": "mls.exporting",
}
_PARTS = ("eval", "losses", "matching", "methods", "plugins")  # modules that people reach through `mls.`
__all__ = [
    "Run",
    "__version__",
    "dense_features",
    "export",
    "load_backbone",
    "load_config",
    "pretrain",
    "resume",
    "verify_export",
]
__all__ += ["eval", "losses", "matching", "methods", "plugins"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"mls.{name}")
    raise AttributeError(f"module 'mls' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
