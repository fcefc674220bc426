"""The optional frameworks that use our backbones: whether each can be imported, its import, and the commands that
install it. For exports and downstream training."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from mls.errors import ConfigError

# detectron2 is not on PyPI, and its own requirements ask for an omegaconf that is older than ours.
DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"


@dataclass(frozen=True)
class Framework:
    module: str
    distribution: str
    commands: tuple[str, ...]  # for installing it
    needs: tuple[str, ...] = ()  # modules without which it cannot be imported


FRAMEWORKS = {
    "torchvision": Framework("torchvision", "torchvision", ("pip install torchvision",)),
    "timm": Framework("timm", "timm", ('pip install "mls[timm]"',)),
    "onnx": Framework("onnxruntime", "onnxruntime", ('pip install "mls[onnx]"',), ("onnx", "onnxscript")),
    "mmseg": Framework(
        "mmseg", "mmsegmentation", ('pip install "mls[mmseg]"',), ("mmengine", "mmcv", "ftfy", "regex", "cv2")
    ),
    "detectron2": Framework(
        "detectron2",
        "detectron2",
        ('pip install "mls[detectron2]"', f'pip install --no-deps --no-build-isolation "{DETECTRON2}"'),
        ("fvcore", "iopath", "pycocotools", "cloudpickle"),
    ),
}


def missing(name: str) -> list[str]:
    """The modules that are not installed; nothing is imported for it."""
    framework = FRAMEWORKS[name]
    return [module for module in (framework.module, *framework.needs) if importlib.util.find_spec(module) is None]


def version(name: str) -> str:
    """
    >>> version("torchvision").split(".")[0]
    '0'
    """
    framework = FRAMEWORKS[name]
    try:
        return importlib.metadata.version(framework.distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return str(getattr(load(name), "__version__", "unknown"))


def require(name: str) -> None:
    """If it is not installed: one sentence with the commands that install it. Nothing is imported for it."""
    absent = missing(name)
    if absent:
        commands = " && ".join(FRAMEWORKS[name].commands)
        raise ConfigError(f"{name} cannot be used, {', '.join(absent)} is missing: {commands}")


def load(name: str) -> ModuleType:
    """Import the framework."""
    require(name)
    try:
        with warnings.catch_warnings():  # of other packages, at import
            warnings.simplefilter("ignore")
            if name == "mmseg":
                importlib.import_module("mls.frameworks.mmcv_lite")
                importlib.import_module("mmseg.models")
            return importlib.import_module(FRAMEWORKS[name].module)
    except ImportError as error:  # a missing system library, or versions that do not fit together
        raise ConfigError(f"{name} is installed but cannot be imported ({error}): repair it, or uninstall it") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the frameworks' log lines and warnings, for example about heads that a backbone file does not have."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
