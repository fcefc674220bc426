"""The classification networks of torchvision as backbones, with their published weights or without. The layer that
gives the class scores is found, not assumed to have a certain name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from mls.errors import CheckpointError, ConfigError, reason, unknown_name
from mls.models.any_size import AnySizeVisionTransformer
from mls.models.backbones import Backbone


def build(name: str, weights: str | None) -> Backbone:
    """`weights`: one of torchvision's published sets for this network, "DEFAULT" for its best; None: random."""
    return detach_head(_torchvision(name, weights))


def check_network(name: str) -> None:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision network", name, get_close_matches(name, known, n=8, cutoff=0.3) or known)


def published(name: str, entry: str) -> Any:
    """torchvision's entry for this set of a network's weights; "DEFAULT" stands for the best one."""
    from torchvision import models

    check_network(name)
    sets = models.get_model_weights(name).__members__
    if entry not in sets:
        raise unknown_name(f"weights of torchvision's {name}", entry, sets)
    return sets[entry]


def _torchvision(name: str, entry: str | None) -> nn.Module:
    """A classification network of torchvision, with the published weights of that name or, without one, random."""
    from torchvision import models

    if entry is None:
        check_network(name)
        return models.get_model(name)
    found = published(name, entry)
    try:
        return models.get_model(name, weights=found)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"torchvision's weights {name}@{found.name} cannot be had ({reason(error)}): "
            f"download {found.url} into {torch.hub.get_dir()}/checkpoints"
        ) from None


def detach_head(model: nn.Module) -> Backbone:
    """Any classification network as a backbone, in place: the linear layer that gives its class scores becomes the
    identity, so its output is what that layer took in. Auxiliary outputs go too.

    >>> from torchvision.models import vgg11
    >>> detach_head(vgg11()).feature_dim
    4096
    """
    _drop_auxiliary(model)
    if type(model) is VisionTransformer:
        model.__class__ = AnySizeVisionTransformer
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        name, found = linear[-1]
        classes = _output_shape(model)
        model.set_submodule(name, nn.Identity())
        if classes == (1, found.out_features) and _output_shape(model) == (1, found.in_features):
            backbone = cast(Backbone, model)
            backbone.feature_dim = found.in_features
            return backbone
    raise ConfigError(
        f"{type(model).__name__} has no linear layer that gives its class scores, so its head cannot be replaced: "
        "choose another network, such as resnet50"
    )


def _drop_auxiliary(model: Any) -> None:
    """GoogLeNet and Inception give a second output in training, from halfway up."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False
        for name, _ in list(model.named_children()):
            if name.lower().startswith("aux"):
                setattr(model, name, None)


@torch.no_grad()
def _output_shape(model: nn.Module) -> tuple[int, ...]:
    """Of one image, on the meta device: shapes alone, nothing is computed."""
    tensors = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    size = getattr(model, "image_size", 224)  # vision transformers insist on theirs
    training = model.training
    try:
        return tuple(functional_call(model.eval(), tensors, torch.empty(1, 3, size, size, device="meta")).shape)
    finally:
        model.train(training)
