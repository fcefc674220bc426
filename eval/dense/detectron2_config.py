"""A detection protocol in detectron2's keys, merged over the recipe that `mls export` writes
(configs/export/detectron2_*.yaml), which holds what no protocol changes. The training is in with_detectron2.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.data.loader import worker_count
from mls.errors import ConfigError
from mls.eval.dense.detector import pyramid_strides
from mls.eval.dense.detectron2_data import written
from mls.eval.dense.prepare import SCENES
from mls.eval.dense.schema import Detection, DetectorConfig
from mls.eval.dense.trunk import Intermediates, Trunk
from mls.exporting.source import Source
from mls.exporting.to_detectron2 import C4, FPN
from mls.frameworks import detectron2_train

RECIPES = {"fpn": FPN, "c4": C4}
NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@dataclass(frozen=True)
class OurTrunk:
    """A network that detectron2 does not have: detectron2_backbone.py puts ours under its pyramids."""

    architecture: str
    levels: list[str]  # by detectron2's names, with the subsampled one

    @classmethod
    def of(cls, architecture: str, trunk: Trunk | Intermediates, settings: DetectorConfig) -> OurTrunk:
        strides = pyramid_strides(trunk, settings)
        first = int(math.log2(strides[0]))
        if strides != [2 ** (first + level) for level in range(len(strides))]:
            raise ConfigError(
                f"detectron2's pyramids have strides that double from a power of 2, those of {architecture} are "
                f"{', '.join(map(str, strides))}: choose another backbone, or backend=torchvision"
            )
        return cls(architecture, [f"p{first + level}" for level in range(len(strides) + 1)])


def overrides(protocol: Detection) -> dict[str, Any]:
    """The protocol's settings by detectron2's keys.

    >>> overrides(Detection())["SOLVER.STEPS"], overrides(Detection())["MODEL.RPN.IN_FEATURES"]
    ((60000, 80000), ['p2', 'p3', 'p4', 'p5', 'p6'])
    """
    data, model, training = protocol.data, protocol.model, protocol.training
    values = {
        "INPUT.MIN_SIZE_TRAIN": tuple(data.min_sizes),
        "INPUT.MIN_SIZE_TEST": data.test_size,
        "INPUT.MAX_SIZE_TRAIN": data.max_size,
        "INPUT.MAX_SIZE_TEST": data.max_size,
        "INPUT.RANDOM_FLIP": "horizontal" if data.flip else "none",  # with probability one half
        "INPUT.MASK_FORMAT": "bitmask" if written(data) else "polygon",
        "DATALOADER.NUM_WORKERS": 0 if data.name in SCENES else worker_count(data.workers),
        "MODEL.MASK_ON": model.masks,
        "MODEL.FPN.OUT_CHANNELS": model.width,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": model.width,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": model.width,
        "MODEL.ROI_BOX_HEAD.FC_DIM": model.box_width,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": model.before_nms[0],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": model.before_nms[1],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": model.proposals[0],
        "MODEL.RPN.POST_NMS_TOPK_TEST": model.proposals[1],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": model.proposal_batch,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": model.box_batch,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": model.score,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": model.nms,
        "TEST.DETECTIONS_PER_IMAGE": model.detections,
        "TEST.PRECISE_BN.ENABLED": training.precise_bn > 0,
        "TEST.PRECISE_BN.NUM_ITER": training.precise_bn,
        "SOLVER.MAX_ITER": training.steps,
        "SOLVER.IMS_PER_BATCH": training.batch_size,
        "SOLVER.BASE_LR": training.lr,
        "SOLVER.MOMENTUM": training.momentum,
        "SOLVER.WEIGHT_DECAY": training.weight_decay,
        "SOLVER.WEIGHT_DECAY_NORM": training.norm_decay,
        "SOLVER.STEPS": tuple(training.falls),  # the rate is multiplied by 0.1 at each
        "SOLVER.WARMUP_ITERS": training.warmup_steps,
        "SOLVER.WARMUP_FACTOR": training.warmup_from,
    }
    if model.neck == "c4":
        return {**values, "MODEL.ANCHOR_GENERATOR.SIZES": [list(model.anchors)]}
    levels = [f"p{level}" for level, _ in enumerate(model.anchors, start=2)]
    sizes = [[size] for size in model.anchors]
    return {**values, "MODEL.ANCHOR_GENERATOR.SIZES": sizes, "MODEL.RPN.IN_FEATURES": levels}


def refuse_unknown_to_detectron2(protocol: Detection, source: Source) -> None:
    """Refuse a backbone that it cannot build. schema.py refuses what depends on the protocol alone."""
    if protocol.model.neck == "c4" and (source.plan is None or not source.plan.bottleneck):
        raise ConfigError(
            f"detectron2's C4 needs a ResNet of 50 layers or more, {source.architecture} is none: set model.neck=fpn, "
            "or backend=torchvision"
        )
    sizes = len(protocol.model.anchors)
    if protocol.model.neck == "fpn" and source.plan is not None and sizes not in (4, 5):
        raise ConfigError(
            f"model.anchors has {sizes} sizes: detectron2's pyramid has a ResNet's four levels and one more, so give 5 "
            "sizes, or 4 to leave that one out"
        )


def configuration(
    protocol: Detection,
    recipe: Path,
    train: Sequence[str],
    test: str,
    classes: int,
    device: str,
    world: int,
    ours: OurTrunk | None = None,
) -> Any:
    """detectron2's CfgNode. SyncBN is used only with several GPUs."""
    cfg = detectron2_train.new_config()
    cfg.merge_from_file(str(recipe))
    cfg.merge_from_list([part for pair in overrides(protocol).items() for part in pair])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.DEVICE = device
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), (test,)
    if ours is not None:
        from mls.eval.dense import detectron2_backbone

        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TRUNK = detectron2_backbone.NAME, ours.architecture
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ours.levels[:-1]
        cfg.MODEL.RPN.IN_FEATURES = ours.levels[: len(protocol.model.anchors)]
    for part in NORMS:
        if cfg.MODEL[part].NORM == "SyncBN" and (device != "cuda" or world == 1):
            cfg.MODEL[part].NORM = "BN"
    cfg.freeze()
    return cfg
