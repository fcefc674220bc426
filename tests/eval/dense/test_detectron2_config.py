"""A protocol in detectron2's keys: every setting arrives or is refused, and the published protocols become the
published configurations."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mls.errors import ConfigError
from mls.eval import load_protocol
from mls.eval.dense.detectron2_config import RECIPES, OurTrunk, configuration, overrides, refuse_unknown_to_detectron2
from mls.eval.dense.loop import lr_share
from mls.eval.dense.prepare import backbone_source
from mls.eval.dense.schema import Detection, DetectorConfig, check
from mls.eval.dense.trunk import build_trunk
from mls.frameworks import installed as frameworks
from mls.models import load_backbone

needs_detectron2 = pytest.mark.skipif(
    bool(frameworks.missing("detectron2")),
    reason="detectron2 is not installed: `mls doctor --frameworks` has the command",
)
# What detectron2's keys do not say: where the data are and what the network starts from, `poly` (refused), and what a
# run works out with the machine it is on.
ELSEWHERE = {
    "data": {"name", "root", "check_sizes", "max_unreadable", "odd", "scenes"},
    "model": {"backbone", "weights", "neck"},
    "training": {"power", "min_lr", "precision", "device", "optimizer", "layer_decay"},  # with_detectron2.py
}


def other(value: Any) -> Any:
    """Another value of the same kind that no check finds wrong."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "poly"
    if isinstance(value, list):
        return [one + 1 for one in value]
    return 3 if value is None else value + 1 if isinstance(value, int) else value / 3 + 0.001


def settings() -> list[tuple[str, str]]:
    protocol = Detection()
    parts = [(part, field.name) for part in ELSEWHERE for field in dataclasses.fields(getattr(protocol, part))]
    return [(part, name) for part, name in parts if name not in ELSEWHERE[part]]


@pytest.mark.parametrize(("part", "name"), settings())
def test_every_setting_of_a_protocol_reaches_detectron2_or_is_refused(part: str, name: str) -> None:
    protocol = Detection(backend="detectron2")
    section = getattr(protocol, part)
    changed = dataclasses.replace(section, **{name: other(getattr(section, name))})
    another = dataclasses.replace(protocol, **{part: changed})
    refused = ""
    try:
        check(another)
    except ConfigError as error:
        refused = str(error)
    assert f"{part}.{name}" in refused or (not refused and overrides(another) != overrides(protocol))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.flip=0.3", "detectron2 mirrors half of the images or none, set 0.5 or 0"),
        ("training.schedule=poly", "set training.schedule=steps"),
    ],
)
def test_what_detectron2_has_no_setting_for_is_refused_as_the_protocol_is_read(override: str, sentence: str) -> None:
    load_protocol("coco_fpn_1x", ["backend=detectron2"])
    with pytest.raises(ConfigError, match=sentence):
        load_protocol("coco_fpn_1x", ["backend=detectron2", override])


@pytest.mark.parametrize(
    ("backbone", "neck", "sentence"),
    [
        ("scratch:resnet18", "c4", "resnet18 is none: set model.neck=fpn"),
        ("vit_tiny", "c4", "vit_tiny is none: set model.neck=fpn"),
        ("scratch:resnet18", "fpn", "model.anchors has 3 sizes: .* give 5 sizes, or 4"),
    ],
)
def test_a_backbone_that_does_not_fit_detectron2_is_refused(backbone: str, neck: str, sentence: str) -> None:
    options = [f"model.backbone={backbone}", f"model.neck={neck}", "model.anchors=[8,16,32]"]
    protocol = load_protocol("coco_fpn_1x", ["backend=detectron2", *options])
    source = backbone_source(protocol, "random", 0)
    with pytest.raises(ConfigError, match=sentence):
        refuse_unknown_to_detectron2(protocol, source)


def test_the_levels_of_other_networks_have_detectron2s_names_or_are_refused() -> None:
    model = DetectorConfig(anchors=[8, 16, 32, 64])
    vit = build_trunk(load_backbone("vit_tiny"))
    assert OurTrunk.of("vit_tiny", vit, model).levels == ["p0", "p1", "p2", "p3", "p4"]
    vit.strides = {"block3": 12}
    with pytest.raises(ConfigError, match="double from a power of 2, those of vit_tiny are 3, 6, 12, 24"):
        OurTrunk.of("vit_tiny", vit, model)


def built(name: str, device: str = "cuda", world: int = 8) -> Any:
    protocol = load_protocol(name, ["backend=detectron2"])
    recipe = Path(__file__).parents[3] / "configs" / "export" / RECIPES[protocol.model.neck]
    classes = 20 if protocol.data.name == "voc0712" else 80
    with frameworks.quiet():
        return configuration(protocol, recipe, ["train"], "test", classes, device, world)


def differences(cfg: Any, published: str) -> dict[str, Any]:
    """What is not as in a configuration that detectron2 ships: key to our value."""
    import detectron2
    from detectron2.config import get_cfg

    root = Path(detectron2.__file__).parent
    configs = root / "model_zoo" / "configs" if (root / "model_zoo" / "configs").is_dir() else root.parent / "configs"
    theirs = get_cfg()
    theirs.merge_from_file(str(configs / published))
    ours, theirs = flat(cfg), flat(theirs)
    assert ours.keys() == theirs.keys()
    return {key: value for key, value in ours.items() if value != theirs[key]}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for key, value in node.items():
        below = flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        parts |= below
    return {key: list(value) if isinstance(value, tuple) else value for key, value in parts.items()}


# What MoCo's configurations for detectron2 change (https://arxiv.org/abs/1911.05722), and where data and weights are.
SELF_SUPERVISED = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "TEST.PRECISE_BN.ENABLED": True,
    "MODEL.WEIGHTS": "backbone.pkl",
    "DATASETS.TRAIN": ["train"],
    "DATASETS.TEST": ["test"],
}
C4 = {**SELF_SUPERVISED, "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm"}
FPN = {  # and DenseCL's of the heads (https://arxiv.org/abs/2011.09157)
    **SELF_SUPERVISED,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
TWICE = {"SOLVER.STEPS": [120000, 160000], "SOLVER.MAX_ITER": 180000}


@needs_detectron2
@pytest.mark.parametrize(
    ("protocol", "published", "expected"),
    [
        ("coco_fpn_1x", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", FPN),
        ("coco_fpn_2x", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", {**FPN, **TWICE}),
        ("coco_c4_1x", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", C4),
        ("coco_c4_2x", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", {**C4, **TWICE}),
        (
            "voc0712_c4",
            "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
            {**C4, "SOLVER.STEPS": [18000, 22000], "SOLVER.MAX_ITER": 24000},
        ),
    ],
)
def test_a_protocol_is_detectron2s_published_configuration_with_mocos_changes(
    protocol: str, published: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mls.eval.dense.detectron2_config.worker_count", lambda wanted: 4)  # the machine's
    assert differences(built(protocol), published) == expected


@needs_detectron2
def test_statistics_are_shared_by_processes_only_on_several_gpus() -> None:
    for device, world, norm in (("cuda", 8, "SyncBN"), ("cuda", 1, "BN"), ("cpu", 2, "BN")):
        model = built("coco_fpn_1x", device, world).MODEL
        assert {model.RESNETS.NORM, model.FPN.NORM, model.ROI_BOX_HEAD.NORM, model.ROI_MASK_HEAD.NORM} == {norm}


@needs_detectron2
@pytest.mark.parametrize("name", ["coco_fpn_1x", "coco_c4_2x", "voc0712_c4", "short"])
def test_the_learning_rate_of_every_step_is_that_of_the_other_back_end(name: str) -> None:
    from detectron2.solver import build_lr_scheduler

    short = ["training.steps=7", "training.falls=[4,5]", "training.warmup_steps=3"]
    protocol = load_protocol("coco_fpn_1x", short) if name == "short" else load_protocol(name)
    schedule, cfg = protocol.training, built("coco_fpn_1x" if name == "short" else name).clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (
        schedule.steps,
        tuple(schedule.falls),
        schedule.warmup_steps,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], cfg.SOLVER.BASE_LR)
    rates = build_lr_scheduler(cfg, optimizer)
    near = {step + shift for step in (*schedule.falls, schedule.warmup_steps) for shift in (-1, 0, 1, 2)}
    for step in sorted({1, 2, schedule.steps} | near):
        rates.last_epoch = step - 1
        assert rates.get_lr()[0] == pytest.approx(schedule.lr * lr_share(schedule, step), rel=1e-6)
