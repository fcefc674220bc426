"""The maps of a backbone: the one it pools its feature from, or that of any layer, dilated for a smaller stride."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet, VisionTransformer

from mls.errors import ConfigError, reason
from mls.models.any_size import tokens
from mls.models.backbones import TinyResNet

Images = Float[Tensor, "batch 3 height width"]
Map = Float[Tensor, "batch dim rows columns"]


def pooled_and_map(backbone: nn.Module, images: Images) -> tuple[Float[Tensor, "batch dim"], Map]:
    """The first is what `backbone(images)` gives.

    >>> g, maps = pooled_and_map(TinyResNet(), torch.zeros(1, 3, 64, 64))
    >>> g.shape, maps.shape
    (torch.Size([1, 128]), torch.Size([1, 128, 8, 8]))
    """
    if isinstance(backbone, TinyResNet):
        maps = backbone.maps(images)
        return maps.mean((2, 3)), maps
    if isinstance(backbone, ResNet):
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
        maps = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x))))
        return backbone.fc(torch.flatten(backbone.avgpool(maps), 1)), maps
    if _of_timm(backbone):
        network = cast(Any, backbone)
        features = network.forward_features(images)
        return network.forward_head(features, pre_logits=True), _as_map(network, features, images)
    raise ConfigError(f"{type(backbone).__name__} gives no map of features here: use a ResNet or a network of timm")


def dense_features(
    backbone: nn.Module | str | Path, images: Images, layer: str | int | None = None, output_stride: int | None = None
) -> Map:
    """A feature for every place of the images, which are standardised already (the backbone's card says how).

    backbone       a network, or anything that `load_backbone` reads; of torchvision and timm, CNN or transformer
    layer          a module by name ("layer3", "features.5", "stages.2"), or a transformer's block by number (-1 is the
                   last), its tokens normalised as the last ones are; default: what the pooled feature is made of
    output_stride  of a CNN: strides beyond it become dilations, so that the map has that stride and the same weights

    Of a transformer the tokens of patches are taken, without class token and registers; positions are interpolated to
    the size of the images, which are filled up to whole patches.

    >>> dense_features("resnet_tiny", torch.zeros(1, 3, 64, 96)).shape
    torch.Size([1, 128, 8, 12])
    >>> dense_features("resnet_tiny", torch.zeros(1, 3, 64, 96), layer="layer2", output_stride=2).shape
    torch.Size([1, 64, 32, 48])
    """
    return DenseFeatures(backbone, layer, output_stride)(images)


class DenseFeatures(nn.Module):
    """`dense_features` of one backbone, for many batches."""

    def __init__(
        self, backbone: nn.Module | str | Path, layer: str | int | None = None, output_stride: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            from mls.models import load_backbone

            backbone = load_backbone(backbone)
        self.name, self.last = type(backbone).__name__, dict[str, bool]()  # are a module's channels the last axis?
        self.backbone = backbone if output_stride is None else dilated(backbone, output_stride)
        if not isinstance(layer, str | int | None):
            raise ConfigError(f"layer is {layer!r}: give a module's name or a block's number")
        number = isinstance(layer, int) or (layer or "").lstrip("-").isdigit()
        self.layer = int(layer or 0) if number else layer or None

    def forward(self, images: Images) -> Map:
        if images.ndim != 4:
            raise ConfigError(f"images are [batch, 3, height, width], these are {list(images.shape)}: add images[None]")
        height, width = images.shape[2:]
        try:
            return self._map(images)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"{self.name} takes no images of {height} × {width} ({reason(error)}): choose another size"
            ) from None

    def _map(self, images: Images) -> Map:
        if isinstance(self.layer, int):
            return self._block(images, self.layer)
        if self.layer is not None:
            return self._of_module(images, self.layer)
        if isinstance(self.backbone, VisionTransformer):
            return self._as_grid(tokens(self.backbone, images), images)
        if isinstance(self.backbone, TinyResNet) or _of_timm(self.backbone):
            return pooled_and_map(self.backbone, images)[1]
        if hasattr(self.backbone, "maps"):
            return cast(Any, self.backbone).maps(images)
        if isinstance(self.backbone, DenseNet):
            return torch.relu(self.backbone.features(images))
        pools = [name for name, part in self.backbone.named_modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
        if not pools:
            raise ConfigError(f"{self.name} has no pooling layer that shows its last map: {self._names()}")
        return self._of_module(images, pools[-1], takes=True)

    def _block(self, images: Images, number: int) -> Map:
        if isinstance(self.backbone, VisionTransformer):
            blocks = len(self.backbone.encoder.layers)
            if -blocks <= number < blocks:
                return self._as_grid(tokens(self.backbone, images, number % blocks), images)
        elif hasattr(self.backbone, "blocks") and hasattr(self.backbone, "forward_intermediates"):
            network = cast(Any, self.backbone)
            blocks = len(network.blocks)
            if -blocks <= number < blocks and hasattr(network, "norm"):
                return network.forward_intermediates(images, indices=[number % blocks], norm=True)[1][0]
        else:
            raise ConfigError(f"{self.name} has no blocks with numbers: {self._names()}")
        raise ConfigError(f"{self.name} has {blocks} blocks: choose layer from {-blocks} to {blocks - 1}")

    def _of_module(self, images: Images, name: str, takes: bool = False) -> Map:
        """What the module gives, or takes."""
        parts, found = dict(self.backbone.named_modules()), []
        if name not in parts:
            raise ConfigError(f"{self.name} has no layer {name}: {self._names()}")
        handle = parts[name].register_forward_hook(lambda _, given, got: found.append(given[0] if takes else got))
        try:
            self.backbone(images)
        finally:
            handle.remove()
        if not found or not isinstance(found[0], Tensor) or found[0].ndim not in (3, 4):
            raise ConfigError(f"layer {name} of {self.name} gives no map: {self._names()}")
        if takes or found[0].ndim == 3:
            return found[0] if takes else self._as_grid(found[0], images)
        return found[0].permute(0, 3, 1, 2) if self._channels_last(name, found[0], images) else found[0]

    @torch.no_grad()
    def _channels_last(self, name: str, features: Tensor, images: Images) -> bool:
        """Asked of each module, as networks permute in their midst: the axis that grows with the images' width is
        that of the columns."""
        if name not in self.last:
            height, width = images.shape[2:]
            wider, training = [], self.backbone.training
            part = self.backbone.get_submodule(name)
            handle = part.register_forward_hook(lambda _, given, got: wider.append(got))
            try:
                self.backbone.eval()(images.new_zeros(1, 3, height, 2 * width))
                self.last[name] = wider[0].shape[2] > features.shape[2]
            except (AssertionError, RuntimeError):  # it takes one size alone
                self.last[name] = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            finally:
                handle.remove()
                self.backbone.train(training)
        return self.last[name]

    def _as_grid(self, features: Tensor, images: Images) -> Map:
        if isinstance(self.backbone, VisionTransformer) and features.ndim == 3:
            rows = -(-images.shape[2] // self.backbone.patch_size)
            return features[:, 1:].transpose(1, 2).unflatten(2, (rows, -1))
        return _as_map(self.backbone, features, images)

    def _names(self) -> str:
        known = [name for name, _ in self.backbone.named_children()]
        return f"name a part that gives a map (its parts: {', '.join(known)})"


def patches_of(backbone: nn.Module) -> tuple[int, int]:
    """Height and width of a transformer's patches; of other networks (1, 1)."""
    embedding = getattr(backbone, "patch_embed", backbone)
    if hasattr(embedding, "feat_ratio"):  # of a hybrid with the strides of its CNN
        return embedding.feat_ratio(as_scalar=False)  # pyright: ignore[reportCallIssue, reportReturnType]
    size = getattr(embedding, "patch_size", (1, 1))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _of_timm(backbone: nn.Module) -> bool:
    return hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")


def _as_map(backbone: Any, features: Tensor, images: Tensor) -> Map:
    if features.ndim == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # Swin and its like
        return features.permute(0, 3, 1, 2) if channels_last else features
    height, width = images.shape[2:]
    before = getattr(backbone, "num_prefix_tokens", 0)  # the class token and registers
    grid = split_like(features.shape[1] - before, height / width)
    size_of = getattr(getattr(backbone, "patch_embed", None), "dynamic_feat_size", None)
    if size_of is not None:  # of a hybrid it is rounded down
        rows, columns = size_of((height, width))
        if features.shape[1] == rows * columns:  # what comes before the tokens are put in front
            before = 0
        if features.shape[1] - before == rows * columns:
            grid = rows, columns
    return features[:, before:].transpose(1, 2).unflatten(2, grid)


def split_like(places: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many places, of images of this height over width.

    >>> split_like(12, 65 / 97), split_like(26, 17 / 200)
    ((3, 4), (2, 13))
    """
    splits = [(rows, places // rows) for rows in range(1, places + 1) if places % rows == 0]
    return min(splits, key=lambda split: abs(math.log(split[0] / split[1] / aspect)))


# --------------------------------------------------------------------------------------------------------- dilation


def dilated(backbone: nn.Module, output_stride: int) -> nn.Module:
    """A copy whose last map has this stride, or a smaller one that it had already."""
    if not isinstance(output_stride, int) or output_stride < 1 or output_stride & (output_stride - 1):
        raise ConfigError(f"output_stride is {output_stride}: give a power of two, such as 8 or 16")
    if isinstance(backbone, TinyResNet | ResNet):
        network = copy.deepcopy(backbone)
        stages = {name: part for name, part in network.named_children() if name.startswith("layer")}
        dilate(stages, _strides(network, stages), output_stride)
        return network
    architecture = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is not None and len({stage["reduction"] for stage in cast(Any, backbone).feature_info}) > 1:
        import timm

        try:
            network = timm.create_model(architecture, num_classes=0, output_stride=output_stride)
            network.load_state_dict(backbone.state_dict())
            return network.to(next(backbone.parameters())).train(backbone.training)
        except (TypeError, AssertionError, RuntimeError, NotImplementedError):
            pass
    raise ConfigError(
        f"{type(backbone).__name__} cannot be dilated to output_stride={output_stride}: leave it out, and give larger "
        "images or an earlier layer"
    )


def dilate(stages: Mapping[str, nn.Module], strides: Mapping[str, int], output_stride: int) -> None:
    """In stages with a larger stride, replace strides by dilation: convolutions after the one whose stride is removed
    keep their receptive field. As torchvision's `replace_stride_with_dilation`, mmsegmentation's
    `contract_dilation`."""
    before, dilation = 1, 1
    for name, stage in stages.items():
        if strides[name] <= output_stride:
            continue
        dilation = strides[name] // output_stride
        after_stride = False
        for part in stage.modules():
            if not isinstance(part, nn.Conv2d):
                continue
            strided = part.stride != (1, 1)
            part.stride = (1, 1)
            if part.kernel_size == (3, 3):
                width = before if strided or not after_stride else dilation
                after_stride = after_stride or strided
                part.dilation = part.padding = (width, width)
        before = dilation


@torch.no_grad()
def _strides(network: nn.Module, stages: Mapping[str, nn.Module], size: int = 64) -> dict[str, int]:
    found, training = {}, network.training
    note = lambda name: lambda _, __, output: found.update({name: size // output.shape[2]})
    handles = [stage.register_forward_hook(note(name)) for name, stage in stages.items()]
    network.eval()(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    network.train(training)
    for handle in handles:
        handle.remove()
    return found
