"""Pretraining methods by name. A method is one file here, or a plug-in's: a class with `@register(name, options)`.
Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mls.config import OBJECTIVES, Config, ObjectiveConfig
from mls.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from mls.core.method import Method, StepOutput
    from mls.models import Precision

__all__ = ["Method", "StepOutput", "build", "find", "names", "planned", "register"]

# Of the methods that are not in a file of their own name.
FILES = {"knn_moco": "mls", "mls_words": "words", "supervised": "controls"}
METHODS: Registry[type[Method]] = Registry("method")

MethodClass = TypeVar("MethodClass", bound="type[Method]")


def register(name: str, options: type[ObjectiveConfig]) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: `objective.method=name` trains this method, and `objective.*` is checked against `options`."""

    def enter(method: MethodClass) -> MethodClass:
        OBJECTIVES.add(name, options)
        return METHODS.register(name)(method)

    return enter


def names() -> list[str]:
    return OBJECTIVES.names()


def find(name: str) -> type[Method]:
    """The class of a method."""
    module = OBJECTIVES[name].__module__
    if name not in METHODS and module == ObjectiveConfig.__module__:  # one of ours, not imported yet
        importlib.import_module(f"mls.core.methods.{FILES.get(name, name.removesuffix('_v2'))}")
    return METHODS[name]


def build(config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> Method:
    """`image_labels` [images, classes] are for the controls (oracle, supervised): no method learns from them."""
    method = find(config.objective.method)(config, precision, image_labels)
    if config.engine.checkpointing:
        from mls.models.gradient_checkpointing import checkpoint_blocks

        checkpoint_blocks(method.backbone)
    return method


def planned(config: Config, image_labels: Tensor | None = None) -> Method:
    """Without making anything: a tensor on torch's meta device has a size and no values."""
    import torch

    from mls.streams import initialisation

    with torch.device("meta"), initialisation(0):
        return build(replace(config, model=replace(config.model, weights=None)), image_labels=image_labels)


def __getattr__(name: str) -> object:
    if name in ("Method", "StepOutput"):
        return getattr(importlib.import_module("mls.core.method"), name)
    raise AttributeError(f"module 'mls.core.methods' has no attribute '{name}'")
