"""Transforms, loader and metric for mmsegmentation: images and labels come from our readers, which know every layout
and the embedded scenes; its metric without the rounding. Backbones that it does not have, and our optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModule, is_model_wrapper
from mmengine.registry import DefaultScope
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, TRANSFORMS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mls import distributed
from mls.errors import UserError
from mls.eval.data.regions import RegionImages
from mls.eval.dense.loop import build_optimizer
from mls.eval.dense.schema import SegmentationData
from mls.eval.dense.trunk import build_trunk
from mls.eval.dense.views import TrainingViews, loader
from mls.models import backbones


@TRANSFORMS.register_module()
class LoadRegionImage(BaseTransform):
    """Like LoadImageFromFile: BGR."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        pixels = results["images"].pixels(results["row"])
        image = np.ascontiguousarray(pixels.flip(0).permute(1, 2, 0).numpy())
        return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}


@TRANSFORMS.register_module()
class LoadRegionLabels(BaseTransform):
    """Like LoadAnnotations. In the test it follows Resize, which would scale labels, too."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        labels = results["images"].labels_for(results["row"], results["ori_shape"]).numpy()
        return {**results, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}


class MmsegViews(TrainingViews):
    """Batches in mmsegmentation's format. A view is a pure function of (seed, place): numpy's global stream, from which
    its transforms draw, is seeded for each view."""

    def __init__(self, images: RegionImages, data: SegmentationData, seed: int, pipeline: Sequence[Any]) -> None:
        super().__init__(images, data, seed)
        with DefaultScope.overwrite_default_scope("mmseg"):  # otherwise RandomResize would use mmcv's Resize
            self.pipeline = Compose([TRANSFORMS.build(one) for one in pipeline])
        self.metainfo = {"classes": images.class_names}

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[tuple[int, int]]) -> Any:
        batch = super().__getitems__(indices)
        return batch if isinstance(batch, UserError) else pseudo_collate(batch)

    def view(self, row: int, seed: int) -> Any:
        np.random.seed(seed % 2**32)
        return self.pipeline({"images": self.images, "row": row})


def test_loader(views: MmsegViews) -> DataLoader[Any]:
    """This process' share, one image at a time. All processes have the same number; mmengine drops the duplicates."""
    count, world = len(views), distributed.world()
    rows = [(distributed.rank() + world * number) % count for number in range(-(-count // world))]
    return loader(views, [[(row, row)] for row in rows])


@METRICS.register_module()
class UnroundedIoUMetric(IoUMetric):
    """As shares; IoUMetric rounds to a hundredth of a per cent. `collect_dir`: the folder for the counts of all
    processes, instead of one in the working directory."""

    def __init__(self, collect_dir: str, **options: Any) -> None:
        super().__init__(**options)
        self.collect_dir = collect_dir

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        counts: list[Any] = [torch.stack(of_images).double().sum(0) for of_images in zip(*results, strict=True)]
        right, either, found, true = counts
        values = self.total_area_to_metrics(right, either, found, true, self.metrics, self.nan_to_num, self.beta)
        return {name: float(np.nanmean(of_classes)) for name, of_classes in values.items()}


@MODELS.register_module()
class OurBackbone(BaseModule):
    """A network as our own segmenters take it (trunk.py). mmsegmentation's VisionTransformer would give other maps at
    other sizes than that of pretraining, as it interpolates positions in another way, and has no registers; its
    TIMMBackbone would leave out a transformer's last normalisation."""

    def __init__(self, architecture: str, output_stride: int, synced: bool, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.trunk = build_trunk(backbones.build(architecture), output_stride)
        if synced:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.trunk)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.trunk(images).values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OurOptimizer:
    """The optimizer of our own loop: AdamW, rates that fall from the heads to the stem."""

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any]) -> None:
        self.wrapper, self.schedule = optim_wrapper_cfg, paramwise_cfg["schedule"]

    def __call__(self, model: Any) -> Any:
        network = model.module if is_model_wrapper(model) else model
        optimizer = build_optimizer(self.schedule, network, network.backbone)
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": optimizer})
