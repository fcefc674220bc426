"""The frameworks that use our backbones and that may be missing: which are importable, how to import them, and the
command that installs one. Exports and downstream adapters both ask here."""

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
    commands: tuple[str, ...]  # that install it
    needs: tuple[str, ...] = ()  # modules without which it cannot be imported


FRAMEWORKS = {
    "torchvision": Framework("torchvision", "torchvision", ("pip install torchvision",)),
    "timm": Framework("timm", "timm", ('pip install "mls[timm]"',)),
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
    """The modules that are not there: nothing is imported to find out."""
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
    """Where it cannot be used: one sentence with the commands that install it. Nothing is imported to find out."""
    absent = missing(name)
    if absent:
        commands = " && ".join(FRAMEWORKS[name].commands)
        raise ConfigError(f"{name} cannot be used, {', '.join(absent)} is missing: {commands}")


def load(name: str) -> ModuleType:
    """The framework, ready for use."""
    require(name)
    try:
        with warnings.catch_warnings():  # of code that is not ours, at import
            warnings.simplefilter("ignore")
            if name == "mmseg":
                importlib.import_module("mls.frameworks.mmcv_lite")
                importlib.import_module("mmseg.models")
            return importlib.import_module(FRAMEWORKS[name].module)
    except ImportError as error:  # a system library, or a version that does not go with the others
        raise ConfigError(f"{name} is installed but cannot be imported ({error}): repair it, or uninstall it") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the frameworks' own words: they complain of heads that a backbone does not bring."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
