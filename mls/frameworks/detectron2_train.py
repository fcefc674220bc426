"""Trains and evaluates a detector of detectron2 on an exported backbone; `mls export` copies this file beside the
weights, where it needs nothing but detectron2. It is detectron2's own trainer, with the head that the C4 recipe names,
and with any data in COCO's layout.

    python detectron2_train.py --config-file detectron2_fpn.yaml --coco /data/coco --num-gpus 8
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any


def register_extra_norm() -> None:
    """Register `MODEL.ROI_HEADS.NAME: Res5ROIHeadsExtraNorm`: a normalisation after res5, as MoCo adds it."""
    from detectron2.layers import get_norm  # pyright: ignore
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads  # pyright: ignore

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg: Any) -> tuple[Any, int]:
            blocks, channels = super()._build_res5_block(cfg)
            blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return blocks, channels

    if Res5ROIHeadsExtraNorm.__name__ not in ROI_HEADS_REGISTRY:
        ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


def new_config() -> Any:
    """detectron2's defaults, with the head of the C4 recipe registered."""
    from detectron2.config import get_cfg  # pyright: ignore

    register_extra_norm()
    return get_cfg()


def annotations_of(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def register_coco(root: Path, split: str) -> str:
    """A split in the layout of COCO 2017, with any classes. Returns the name of the data set in detectron2."""
    from detectron2.data.datasets import register_coco_instances  # pyright: ignore

    name = unregistered(f"{root}/{split}")
    register_coco_instances(name, {}, str(annotations_of(root, split)), str(root / split))
    return name


def unregistered(name: str) -> str:
    """Remove a data set of this name from detectron2's catalogs: its files may have changed since."""
    from detectron2.data import DatasetCatalog, MetadataCatalog  # pyright: ignore

    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    return name


def configure(args: Namespace) -> Any:
    cfg = new_config()
    cfg.merge_from_file(args.config_file)
    if not Path(cfg.MODEL.WEIGHTS).is_file():  # the folder was moved
        cfg.MODEL.WEIGHTS = str(Path(args.config_file).parent / Path(cfg.MODEL.WEIGHTS).name)
    if args.coco:
        train, test = (register_coco(args.coco, split) for split in ("train2017", "val2017"))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (test,)
        categories = json.loads(annotations_of(args.coco, "val2017").read_text())["categories"]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(categories)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    return cfg


def build_evaluator(name: str, **coco: Any) -> Any:
    """The evaluator that the data set is registered for; `coco` are options of COCO's."""
    from detectron2.data import MetadataCatalog  # pyright: ignore
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator  # pyright: ignore

    if MetadataCatalog.get(name).evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    return COCOEvaluator(name, **coco)


def train(args: Namespace) -> dict[str, Any]:
    from detectron2.engine import DefaultTrainer, default_setup  # pyright: ignore

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
            return build_evaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    cfg = configure(args)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer._last_eval_results  # detectron2's `train` returns them only if TEST.EXPECTED_RESULTS is set


def main() -> None:
    from detectron2.engine import default_argument_parser, launch  # pyright: ignore

    parser = default_argument_parser()
    parser.add_argument("--coco", type=Path, help="a folder in COCO's layout; default: the recipe's data sets")
    args = parser.parse_args()
    launch(train, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))


if __name__ == "__main__":
    main()
