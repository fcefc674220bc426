"""Certified exports: the same features in every target, and a sentence instead of a file where they would differ. Each
target is the real framework where it is installed, and our restatement of its network as well."""

import json
import pickletools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import mls
from mls.errors import CheckpointError, ConfigError
from mls.exporting import TARGETS, Checked, export, verify_export
from mls.exporting.certify import certify
from mls.exporting.restated import RestatedResNet
from mls.exporting.source import Source
from mls.frameworks import installed as frameworks
from mls.frameworks.resnet_plan import ResNetPlan
from mls.models import backbones
from mls.models.resnet_names import to_detectron2

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def trained(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, and statistics as after training: neither zeros nor ones."""
    torch.manual_seed(seed)
    network = backbones.build(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.state_dict()


def need(framework: str) -> ModuleType:
    absent = frameworks.missing(framework)
    if absent:
        command = frameworks.FRAMEWORKS[framework].commands[-1]
        pytest.skip(f"{framework} is not installed ({', '.join(absent)} missing): {command}")
    return frameworks.load(framework)


@pytest.fixture(params=["restated", "real"])
def which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to load an export: our restatement, as if no framework were installed, and the framework."""
    if request.param == "restated":
        monkeypatch.setattr(frameworks, "missing", lambda name: [name])
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "moco.pth"
    torch.save({"state_dict": {f"module.encoder_q.{name}": t for name, t in trained("resnet50").items()}}, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    export(checkpoint, ["torchvision", "timm", "detectron2", "mmseg", "safetensors"], out)
    return out


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return Source.open(checkpoint)


RECIPES = [  # of each target, and how its file is loaded where the framework is missing
    ("torchvision", "use_torchvision.py", False),
    ("timm", "use_timm.py", True),
    ("detectron2", "detectron2_fpn.yaml", True),
    ("detectron2", "detectron2_c4.yaml", True),
    ("mmseg", "mmseg_config.py", True),
    ("safetensors", "backbone.json", False),
]


@pytest.mark.parametrize(("target", "recipe", "can_be_missing"), RECIPES)
def test_every_target_has_the_same_features_at_all_stages(
    target: str, recipe: str, can_be_missing: bool, which: str, source: Source, exported: Path
) -> None:
    if which == "real" and can_be_missing:
        need(target)
    loaded = TARGETS[target].load(source, exported / TARGETS[target].FILE, exported / recipe)
    checked = Checked(target, loaded.file, certify(source, loaded))
    assert [name for name in checked.facts["stages"] if name != "features"] == STAGES
    assert checked.worst < 1e-5
    assert checked.facts["coverage"] == {"keys": 265, "of": 265}
    assert ("restatement" in loaded.by) == (which == "restated" and can_be_missing)


def test_mmseg_is_found_in_a_program_with_another_default_scope(source: Source, exported: Path) -> None:
    need("mmseg")
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmengine"):
        loaded = TARGETS["mmseg"].load(source, exported / "backbone.pth", exported / "mmseg_config.py")
    assert certify(source, loaded)


@pytest.mark.parametrize(
    ("recipe", "stands", "instead"),
    [
        ("mmseg_config.py", "type='ResNet'", "type='ResNet', deep_stem=True"),
        ("mmseg_config.py", "type='ResNet'", "type='ResNet', norm_cfg=dict(type='BN', eps=0.1)"),
        ("use_timm.py", 'NETWORK = "resnet50"', 'NETWORK = "resnet101"'),
    ],
)
def test_a_recipe_of_more_than_the_restatement_knows_gets_no_certificate_from_it(
    recipe: str, stands: str, instead: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frameworks, "missing", lambda name: [name])
    text = (exported / recipe).read_text()
    assert stands in text
    (tmp_path / recipe).write_text(text.replace(stands, instead))
    with pytest.raises(ConfigError, match=r"to be checked by (mmsegmentation|timm) alone: pip install"):
        verify_export(exported / "backbone.pth", tmp_path / recipe)


def test_the_recipes_beside_a_file_are_found(exported: Path) -> None:
    checked = verify_export(exported / "backbone.pkl")
    assert [one.facts["recipe"] for one in checked] == ["detectron2_c4.yaml", "detectron2_fpn.yaml"]


def test_the_certificate_says_what_was_compared_with_what(exported: Path, checkpoint: Path) -> None:
    facts = json.loads((exported / "mmseg.certificate.json").read_text())
    assert facts["source"]["path"] == str(checkpoint)
    assert "behind the prefix 'module.encoder_q.'" in facts["source"]["origin"]
    (check,) = facts["checks"]
    assert check["recipe"] == "mmseg_config.py"
    assert set(STAGES) <= set(check["stages"])
    assert len(facts["sha256"]) == len(facts["source"]["sha256"]) == len(check["recipe_sha256"]) == 64


FPN, C4, MMSEG = "detectron2_fpn.yaml", "detectron2_c4.yaml", "mmseg_config.py"
WRONG = {  # a recipe, what stands there, what a mistake makes of it, and what the sentence says
    "the stride in the 1x1 convolution": (FPN, "STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true", "layer2 by"),
    "the same, C4": (C4, "STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true", "layer4 by"),
    "BGR": (FPN, "FORMAT: RGB", "FORMAT: BGR", "layer1 by"),
    "no standard deviation": (FPN, "[58.395, 57.12, 57.375]", "[1, 1, 1]", "layer1 by"),
    "no normalisation": (FPN, "NORM: SyncBN", 'NORM: ""', "did not arrive"),
    "another normalisation": (FPN, "NORM: SyncBN", "NORM: GN", "running_mean"),
    "another depth": (FPN, "DEPTH: 50", "DEPTH: 101", "does not fill"),
    "no normalisation after res5": (C4, "Res5ROIHeadsExtraNorm", "Res5ROIHeads", "without a normalisation after res5"),
    "BGR in mmseg": (MMSEG, "bgr_to_rgb=True", "bgr_to_rgb=False", "layer1 by"),
    "no mean in mmseg": (MMSEG, "mean=[123.675, 116.28, 103.53]", "mean=[0, 0, 0]", "layer1 by"),
    "the stride, in mmseg": (MMSEG, "style='pytorch'", "style='caffe'", "layer2 by"),
    "the deep stem": (MMSEG, "type='ResNet'", "type='ResNetV1c'", "no plain ResNet|did not arrive"),
    "swapped colours": ("use_torchvision.py", "(0.485, 0.456, 0.406)", "(0.406, 0.456, 0.485)", "layer1 by"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_recipe_is_caught(mistake: str, which: str, source: Source, exported: Path, tmp_path: Path) -> None:
    name, right, wrong, message = WRONG[mistake]
    target = {FPN: "detectron2", C4: "detectron2", MMSEG: "mmseg"}.get(name, "torchvision")
    if which == "real":
        need(target)
    text = (exported / name).read_text()
    assert right in text
    (tmp_path / name).write_text(text.replace(right, wrong))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        certify(source, TARGETS[target].load(source, exported / TARGETS[target].FILE, tmp_path / name))


def test_a_file_without_its_recipe_is_what_the_defaults_make_of_it(which: str, exported: Path, tmp_path: Path) -> None:
    if which == "real":
        need("detectron2")
    alone = tmp_path / "backbone.pkl"
    alone.write_bytes((exported / "backbone.pkl").read_bytes())
    with pytest.raises(CheckpointError, match="gives other features"):
        verify_export(alone)


def test_another_programs_conversion_is_compared_with_what_it_was_made_from(exported: Path, tmp_path: Path) -> None:
    torch.save(trained("resnet50", seed=1), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"gives other features than .*other\.pth: layer1 by"):
        verify_export(exported / "backbone.pth", against=tmp_path / "other.pth")
    state = trained("resnet50")
    torch.save({f"encoder.{name}": tensor for name, tensor in state.items()}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="265 of 265 tensors .* did not arrive"):  # it would train from random
        verify_export(tmp_path / "backbone.pth")


def test_a_file_that_changed_after_its_certificate_is_noticed(exported: Path, tmp_path: Path) -> None:
    for name in ("backbone.safetensors", "backbone.json", "safetensors.certificate.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    data = bytearray((tmp_path / "backbone.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "backbone.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="was made for another backbone.safetensors"):
        verify_export(tmp_path / "backbone.safetensors")


def test_any_numpy_can_read_the_pickle(exported: Path) -> None:
    opcodes = pickletools.genops((exported / "backbone.pkl").read_bytes())
    names = {str(text) for code, text, _ in opcodes if code.name == "SHORT_BINUNICODE"}
    assert "numpy" in names
    assert not any(name.startswith(("numpy.", "torch")) for name in names)


def test_nothing_is_written_where_features_differ(tmp_path: Path) -> None:
    state = trained("resnet18")
    state["bn1.running_var"][0] = torch.nan  # a network that diverged has no features to compare
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="hold NaN or infinity"):
        export(tmp_path / "broken.pth", ["torchvision"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_other_resnets_keep_their_features(name: str, which: str, tmp_path: Path) -> None:
    if which == "real":
        need("detectron2")
    torch.save(trained(name), tmp_path / "net.pth")
    checked = export(tmp_path / "net.pth", ["detectron2"], tmp_path)
    assert max(one.worst for one in checked) < 1e-5
    recipes = [one.facts["recipe"] for one in checked]
    assert recipes == ["detectron2_fpn.yaml", "detectron2_c4.yaml"][: 1 if name == "resnet18" else 2]


def test_resnext_goes_to_mmseg_and_a_wide_resnet_does_not(which: str, tmp_path: Path) -> None:
    if which == "real":
        need("mmseg")
    torch.save(trained("resnext50_32x4d"), tmp_path / "grouped.pth")
    (checked,) = export(tmp_path / "grouped.pth", ["mmseg"], tmp_path)
    assert checked.worst < 1e-5
    wide = Source(backbones.build("resnet_tiny"), tmp_path, {}, ResNetPlan.of("wide_resnet50_2"))
    with pytest.raises(ConfigError, match="mmseg has no network with the layers of wide_resnet50_2"):
        TARGETS["mmseg"].write(wide, tmp_path, tmp_path)


@pytest.mark.parametrize("name", backbones.RESNETS)
def test_the_restatement_has_the_tensors_of_every_resnet(name: str) -> None:
    with torch.device("meta"):
        ours = {to_detectron2(key): t.shape for key, t in backbones.build(name).state_dict().items()}
        theirs = {key: t.shape for key, t in RestatedResNet(ResNetPlan.of(name)).state_dict().items()}
    assert ours == theirs


def test_without_a_choice_a_backbone_goes_where_it_fits(tmp_path: Path) -> None:
    torch.save(trained("resnet_tiny"), tmp_path / "tiny.pth")
    message: list[str] = []
    checked = mls.export(tmp_path / "tiny.pth", say=message.append)
    assert [one.target for one in checked] == ["safetensors", "pt2", "onnx"]
    assert (tmp_path / "export" / "backbone.safetensors").is_file()
    assert sum("not for" in line and "resnet_tiny" in line for line in message) == 5
    with pytest.raises(ConfigError, match="detectron2 has no network with the layers of resnet_tiny"):
        mls.export(tmp_path / "tiny.pth", ["detectron2"])
    with pytest.raises(ConfigError, match="unknown export target 'detectron': did you mean 'detectron2'"):
        mls.export(tmp_path / "tiny.pth", ["detectron"])


def test_a_timm_network_goes_to_timm(tmp_path: Path) -> None:
    need("timm")
    torch.save(trained("timm:resnet10t"), tmp_path / "net.pth")
    checked = export(tmp_path / "net.pth", ["timm", "safetensors", "huggingface"], tmp_path, "timm:resnet10t")
    assert [one.facts["coverage"]["keys"] for one in checked] == [70] * 3


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_snippets_load_the_backbone(library: str, exported: Path) -> None:
    need(library)
    names: dict = {"__file__": str(exported / f"use_{library}.py")}
    exec((exported / f"use_{library}.py").read_text(), names)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(names["load"]()(images), mls.load_backbone(exported / "backbone.safetensors")(images))


def test_mmseg_builds_the_segmentor_of_the_configuration_on_the_backbone(exported: Path) -> None:
    need("mmseg")
    with frameworks.quiet():
        from mmengine.config import Config
        from mmengine.registry import init_default_scope
        from mmseg.registry import MODELS

        init_default_scope("mmseg")
        config = Config.fromfile(str(exported / "mmseg_config.py"))
        config.model.backbone.norm_cfg = config.model.decode_head.norm_cfg = config.model.auxiliary_head.norm_cfg = {
            "type": "BN"
        }
        model = MODELS.build(config.model)
        model.init_weights()
    weights = torch.load(exported / "backbone.pth", weights_only=True)
    assert torch.equal(model.backbone.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])
    assert config.model.data_preprocessor.bgr_to_rgb
