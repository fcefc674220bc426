"""Any network as a multi-label classifier. Its last layer is found, not assumed to have a certain name, and replaced by
a linear or a cosine head of as many classes as the data have. How it is trained is in training.py."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mls.errors import CheckpointError, ConfigError, unknown_name
from mls.losses import at_least_fp32
from mls.models import backbones, load_backbone
from mls.models.backbones import Backbone
from mls.streams import derive

PREFIXES = ("random", "scratch", "timm", "torchvision")


class CosineHead(nn.Linear):
    """The cosines of the features with one direction per class, which is the class' label embedding: a row of `weight`
    (the hyperspherical classifier, ECCV 2022). In fp32 or better whatever precision the features come in."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes, bias=False)

    def forward(self, input: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(F.normalize(at_least_fp32(input)), F.normalize(at_least_fp32(self.weight)))


HEADS = {"linear": nn.Linear, "cosine": CosineHead}


class Classifier(nn.Module):
    """A backbone, which maps images to features [batch, dim], and a head, which maps these to logits or cosines.

    >>> classifier = build_classifier("resnet_tiny", classes=10)
    >>> classifier(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(images))

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.backbone(images)


def build_classifier(
    weights: str | Path, classes: int, head: Literal["linear", "cosine"] = "linear", seed: int = 0
) -> Classifier:
    """A classifier with a new head, in evaluation mode. `weights` says which backbone, and where its weights come from:

    a run folder, a .safetensors file      what pretraining saved
    NAME, random:NAME                      a backbone of mls (timm:NAME too), randomly initialised
    scratch:NAME                           a classification network of torchvision, randomly initialised
    torchvision:NAME, torchvision:NAME@SET the same with torchvision's published weights: its best set, or this one

    >>> build_classifier("scratch:densenet121", classes=10, head="cosine").head
    CosineHead(in_features=1024, out_features=10, bias=False)
    """
    if head not in HEADS:
        raise unknown_name("head", head, HEADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        backbone = _backbone(weights)
        # A stream of its own: the head is the same whatever the backbone has drawn.
        torch.manual_seed(derive(seed, "init", "classifier"))
        return Classifier(backbone, HEADS[head](backbone.feature_dim, classes)).eval()


def _backbone(weights: str | Path) -> Backbone:
    prefix, _, name = str(weights).partition(":")
    if not name or Path(weights).expanduser().exists() or prefix == "timm":
        return load_backbone(weights)
    if prefix not in PREFIXES:
        raise unknown_name(f"kind of weights in {weights}", prefix, PREFIXES)
    if prefix == "random":
        return backbones.build(name)
    if prefix == "scratch":
        return detach_head(_torchvision(name, None))
    name, _, entry = name.partition("@")
    return detach_head(_torchvision(name, entry or "DEFAULT"))


def _torchvision(name: str, entry: str | None) -> nn.Module:
    """A classification network of torchvision, with the published weights of that name or, without one, random."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision network", name, get_close_matches(name, known, n=8, cutoff=0.3) or known)
    if entry is None:
        return models.get_model(name)
    sets = models.get_model_weights(name).__members__
    if entry not in sets:
        raise unknown_name(f"weights of torchvision's {name}", entry, sets)
    try:
        return models.get_model(name, weights=sets[entry])
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"torchvision's weights {name}@{sets[entry].name} cannot be had ({str(error).splitlines()[0]}): "
            f"download {sets[entry].url} into {torch.hub.get_dir()}/checkpoints"
        ) from None


def detach_head(model: nn.Module) -> Backbone:
    """Any classification network as a backbone, in place: the linear layer that gives its class scores becomes the
    identity, so its output is what that layer took in. Auxiliary outputs go too.

    >>> from torchvision.models import vgg11
    >>> detach_head(vgg11()).feature_dim
    4096
    """
    _drop_auxiliary(model)
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


class _GlobalPooling(TorchFunctionMode):
    """Notes the last map that is averaged over its positions, whether a module or a line of code does it."""

    POOLS = (F.adaptive_avg_pool2d, torch.mean, Tensor.mean)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.map: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.POOLS and args and args[0].ndim == 4 and args[0].shape[1] == self.dim:
            self.map = args[0]
        return func(*args, **(kwargs or {}))


def last_map(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch dim map_height map_width"]:
    """The map whose mean over positions is the features, in evaluation mode. With a linear head, the class activation
    map of class c is therefore `head.weight[c]` times it.

    >>> last_map(load_backbone("resnet_tiny"), torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 128, 4, 4])
    """
    with _GlobalPooling(backbone.feature_dim) as pooling:
        features = backbone(images)
    if pooling.map is not None:
        difference = (pooling.map.mean((2, 3)) - features).norm()
        if difference <= 0.01 * features.norm():  # bf16 rounds this much
            return pooling.map
    raise ConfigError(
        f"the features of {type(backbone).__name__} are not the mean of a map, so there are no class activation maps: "
        "choose a network whose head follows global average pooling, such as resnet50, in evaluation mode"
    )
