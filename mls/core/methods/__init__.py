"""Pretraining methods by name."""

from torch import Tensor

from mls.config import Config
from mls.core.method import Keys, Method, StepOutput
from mls.core.methods.mls import MLS, KnnMoCo
from mls.core.methods.moco import MoCo
from mls.core.methods.supervised import Supervised
from mls.errors import unknown_name
from mls.models import EncoderPair

__all__ = ["MLS", "Keys", "KnnMoCo", "Method", "MoCo", "StepOutput", "Supervised", "build", "names"]

METHODS = {"moco_v2": MoCo, "mls": MLS, "knn_moco": KnnMoCo, "supervised": Supervised}


def names() -> list[str]:
    return sorted(METHODS)


def build(config: Config, pair: EncoderPair, image_labels: Tensor | None = None) -> MoCo:
    """`image_labels` [images, classes] are for the controls (oracle, supervised) and for monitoring alone."""
    if config.objective.method not in METHODS:
        raise unknown_name("method", config.objective.method, names())
    return METHODS[config.objective.method](config, pair, image_labels)
