"""Backbones by name: torchvision's ResNets, a tiny one for demos, any of timm's. Each maps images to one feature a
image and says its width in `feature_dim`. Parameter names are the library's own, so exports need no renaming."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from mls.errors import CheckpointError, ConfigError, MissingLibrary, reason, unknown_name
from mls.plugins import Registry

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
RESNETS += ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}  # of timm's transformers
TINY_OF = "vit_tiny_patch16_224"  # the network of timm that is vit_tiny with these arguments
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}


if TYPE_CHECKING:

    class Backbone(nn.Module):
        """What `build` gives, to a type checker: a library's own module, with the width of its features."""

        feature_dim: int
        card: dict[str, Any]  # where the weights come from a file
else:
    Backbone = nn.Module


BACKBONES = Registry[Callable[[], Backbone]]("backbone")
# Decorator of a class or function without arguments that gives a randomly initialised backbone, its features' width in
# `feature_dim`. With parts called layer1 to layer4 it fits whatever a ResNet fits.
register = BACKBONES.register
names = BACKBONES.names


def build(name: str, drop_path: float = 0.0) -> Backbone:
    """A randomly initialised backbone. `drop_path`: in training the last block leaves its branch out in this share of
    the images, earlier ones in smaller shares (stochastic depth, https://arxiv.org/abs/1603.09382).

    >>> build("resnet18").feature_dim
    512
    """
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if name.startswith("timm:"):
        return timm_network(name.removeprefix("timm:"), **options)
    if drop_path and name != "vit_tiny":
        raise ConfigError(f"model.drop_path={drop_path:g} is for networks of timm: set it to 0 for {name}")
    return cast(Callable[..., Backbone], BACKBONES[name])(**options)


def _resnet(name: str) -> Backbone:
    model = getattr(torchvision_resnet, name)(weights=None)
    model.feature_dim = model.fc.in_features
    model.fc = nn.Identity()
    return cast(Backbone, model)


for resnet in RESNETS:
    BACKBONES.add(resnet, partial(_resnet, resnet))


def _timm(name: str) -> Any:
    """The library, where it is installed and has this network."""
    try:
        import timm
    except ImportError:
        raise MissingLibrary(f'{name} is a network of timm: pip install "mls[timm]"') from None
    if not timm.is_model(name):
        raise unknown_name("timm backbone", name, timm.list_models(f"*{name[:6]}*") or timm.list_models("resnet*"))
    return timm


def timm_name(name: str) -> str:
    """With the tag of the published weights that the name alone stands for."""
    _timm(name)
    found = _published(name)
    return f"{found.architecture}.{found.tag}" if found is not None and found.tag else name


def timm_network(name: str, published: bool = False, **options: Any) -> Backbone:
    """A network of timm, random or with the weights that its name and tag (`NAME.TAG`) are published with."""
    timm, without = _timm(name), f"timm:{name} has no stochastic depth: set model.drop_path=0"
    try:
        model = _of_any_size(partial(timm.create_model, name, pretrained=published, num_classes=0, **options))
    except TypeError:  # a network that knows no such option
        if "drop_path_rate" not in options:
            raise
        raise ConfigError(without) from None
    except (OSError, RuntimeError) as error:  # no network, no such file, or no weights under this name
        if not published:
            raise
        raise CheckpointError(_not_published(name, error)) from None
    if "drop_path_rate" in options and not drop_paths(model):
        raise ConfigError(without)
    if "drop_path_rate" not in options:
        for layer in drop_paths(model):  # some networks of timm have a rate of their own, as Swin's 0.1
            layer.drop_prob = 0.0
    backbone = cast(Backbone, model)
    backbone.feature_dim = cast(int, model.num_features)
    if published:
        backbone.card = timm_card(name)
    return backbone


def _of_any_size(create: Callable[..., Any]) -> Any:
    """A transformer interpolates its positions to the images and fills them up to whole patches, if it can."""
    try:
        return create(**ANY_SIZE)
    except TypeError:  # another kind of network; no weight was drawn or downloaded
        return create()


def drop_paths(network: nn.Module) -> list[Any]:
    """The layers that leave out a branch at random."""
    return [module for module in network.modules() if type(module).__name__ == "DropPath"]


def measuring_norms(network: nn.Module) -> Sequence[nn.Module]:
    """Batch normalisation alone is in training, to take the mean over the batches that come: nothing else may drop a
    branch or a channel at random. They are given back; there may be none."""
    norms = [module for module in network.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None
    return norms


def freeze_patches(backbone: nn.Module, name: str) -> None:
    """A transformer's patch projection learns nothing: MoCo-v3 found its gradients to come in bursts."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise ConfigError(
            f"{name} has no patch projection: set model.freeze_patches=false, or take a transformer of timm"
        )
    projection.requires_grad_(False)


def timm_card(name: str) -> dict[str, Any]:
    """What the published weights of a network take as input."""
    found = _published(name)
    if found is None:
        return {"architecture": f"timm:{name}"}
    input_size, mean, std = found.input_size[1], list(found.mean), list(found.std)
    return {"architecture": f"timm:{name}", "input_size": input_size, "mean": mean, "std": std}


def _published(name: str) -> Any:
    """timm's entry for the weights of this name, or None."""
    import timm

    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # the network is known, the tag is not
        return None


def _not_published(name: str, error: Exception) -> str:
    """What to do where timm's own cache lacks the weights and they cannot be downloaded."""
    found = _published(name)
    hub = found.hf_hub_id if found is not None else None
    if hub is None:
        return f"timm publishes no weights as {name} ({reason(error)}): random:timm:{name} is the network without any"
    folder = f"hub/models--{hub.replace('/', '--')} under $HF_HOME (~/.cache/huggingface)"
    return (
        f"the weights timm:{name} cannot be downloaded here: copy {folder} from a machine that has them, or name the "
        f"file itself, model.safetensors of {hub}"
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


@register("resnet_tiny")
class TinyResNet(Backbone):
    """Three one-block stages for 32-pixel images: 0.3 million parameters, features of width 128."""

    def __init__(self, width: int = 32, stride: int = 2) -> None:
        super().__init__()
        self.feature_dim = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        x = torch.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.maps(images).mean((2, 3))


# Half as wide at twice the resolution, for the same cost: what small windows need.
BACKBONES.add("resnet_tiny_fine", partial(TinyResNet, width=16, stride=1))

# A transformer for 32-pixel images: 64 patches of 4 pixels, 0.2 million parameters, features of width 64.
BACKBONES.add("vit_tiny", partial(timm_network, TINY_OF, **TINY))
