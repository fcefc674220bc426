"""A detection protocol in detectron2's keys, merged over the recipe that `mls export` writes
(configs/export/detectron2_*.yaml), which holds what no protocol changes. The training is in with_detectron2.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mls.data.loader import worker_count
from mls.errors import ConfigError
from mls.eval.dense.prepare import SCENES
from mls.eval.dense.schema import Detection
from mls.exporting.source import Source
from mls.exporting.to_detectron2 import C4, FPN
from mls.frameworks import detectron2_train

RECIPES = {"fpn": FPN, "c4": C4}
NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


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
        "INPUT.MASK_FORMAT": "bitmask" if data.name in SCENES else "polygon",
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
    plan = source.plan_for("detectron2", "take a ResNet such as resnet50, or set backend=torchvision")
    if protocol.model.neck == "c4" and not plan.bottleneck:
        raise ConfigError(
            f"detectron2's C4 needs a ResNet of 50 layers or more, {plan.name} has fewer: set model.neck=fpn, or "
            "backend=torchvision"
        )


def configuration(
    protocol: Detection, recipe: Path, train: Sequence[str], test: str, classes: int, device: str, world: int
) -> Any:
    """detectron2's CfgNode. SyncBN is used only with several GPUs."""
    cfg = detectron2_train.new_config()
    cfg.merge_from_file(str(recipe))
    cfg.merge_from_list([part for pair in overrides(protocol).items() for part in pair])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.DEVICE = device
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), (test,)
    for part in NORMS:
        if cfg.MODEL[part].NORM == "SyncBN" and (device != "cuda" or world == 1):
            cfg.MODEL[part].NORM = "BN"
    cfg.freeze()
    return cfg
