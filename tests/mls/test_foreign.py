"""Checkpoints in the layouts that other projects publish: read as backbones, whatever is around them, or refused."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18, resnet50

from mls.config import ModelConfig
from mls.errors import CheckpointError
from mls.models import backbones, build_encoder, card, foreign, load_backbone
from mls.models.resnet_names import from_detectron2, from_sequential, to_detectron2

State = dict[str, Tensor]


def network(seed: int = 0) -> State:
    """torchvision's, with its classes; statistics as after training."""
    torch.manual_seed(seed)
    state = resnet18().state_dict()
    return {name: torch.rand_like(t) + 0.5 if "running" in name else t for name, t in state.items()}


def behind(prefix: str, state: State, head: str = "fc") -> State:
    """As a project's module holds it: its own head instead of the classes."""
    trunk = {f"{prefix}{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return {**trunk, f"{prefix}{head}.0.weight": torch.zeros(4, 512)}


def children(state: State) -> State:
    """nn.Sequential(*list(resnet.children())[:-1]), as lightly's examples build it."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = ((name.partition("."), tensor) for name, tensor in state.items() if not name.startswith("fc."))
    return {f"{numbers[first]}.{rest}": tensor for (first, _, rest), tensor in parts}


def no_counters(state: State) -> State:
    """As saved before torch 0.4.1."""
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03}]}
NET, SLOW = network(0), network(1)
LAYOUTS: dict[str, tuple[dict, str]] = {
    "moco": (
        {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {
                **behind("module.encoder_q.", NET),
                **behind("module.encoder_k.", SLOW),
                "module.queue": torch.zeros(128, 16),
                "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            },
            "optimizer": OPTIMIZER,
        },
        "module.encoder_q.",
    ),
    "moco_v3": (
        {
            "epoch": 300,
            "arch": "resnet18",
            "state_dict": {
                **behind("module.base_encoder.", NET),
                **behind("module.momentum_encoder.", SLOW),
                "module.predictor.0.weight": torch.zeros(4, 4),
            },
            "optimizer": OPTIMIZER,
            "scaler": {"scale": 65536.0},
        },
        "module.base_encoder.",
    ),
    "densecl, training": (
        {
            "meta": {"epoch": 800, "iter": 1, "mmcv_version": "0.2.16", "time": "now"},
            "state_dict": {
                **behind("encoder_q.0.", NET),
                "encoder_q.1.mlp.0.weight": torch.zeros(4, 512),
                **behind("encoder_k.0.", SLOW),
                **behind("backbone.", NET),
                "queue": torch.zeros(4, 4),
                "queue2": torch.zeros(4, 4),
            },
        },
        "encoder_q.0.",
    ),
    "densecl, extracted": ({"state_dict": no_counters(behind("", NET, "neck")), "author": "OpenSelfSup"}, ""),
    "solo-learn": (
        {
            "epoch": 400,
            "pytorch-lightning_version": "1.6.4",
            "state_dict": {
                **behind("backbone.", NET),
                **behind("momentum_backbone.", SLOW),
                "projector.0.weight": torch.zeros(4, 512),
                "classifier.weight": torch.zeros(10, 512),
            },
        },
        "backbone.",
    ),
    "lightly": (
        {
            "epoch": 1,
            "state_dict": {
                **{f"backbone.{name}": tensor for name, tensor in children(NET).items()},
                "projection_head.layers.0.weight": torch.zeros(4, 512),
                **{f"backbone_momentum.{name}": tensor for name, tensor in children(SLOW).items()},
            },
        },
        "backbone.",
    ),
    "torchvision": (NET, ""),
    "timm": ({"epoch": 1, "arch": "resnet18", "state_dict": NET, "state_dict_ema": SLOW}, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_read_and_says_where_the_backbone_was(layout: str, tmp_path: Path) -> None:
    content, prefix = LAYOUTS[layout]
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path)
    backbone = load_backbone(path)
    assert not backbone.training
    assert all(torch.equal(t, NET[name]) for name, t in backbone.state_dict().items() if t.is_floating_point())
    assert (backbone.card["architecture"], backbone.card["prefix"]) == ("resnet18", prefix)
    assert f"'{prefix}'" in backbone.card["origin"] or not prefix
    assert card(path) == backbone.card  # what the downstream protocols ask for mean and std


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    torch.save(LAYOUTS["moco"][0], tmp_path / "moco.pth")
    left = load_backbone(tmp_path / "moco.pth").card["origin"].partition("left out: ")[2]
    assert left.split(", ") == ["encoder_k", "fc", "queue", "queue_ptr"]


def test_another_programs_json_beside_a_checkpoint_is_no_card(tmp_path: Path) -> None:
    torch.save(NET, tmp_path / "net.pth")
    (tmp_path / "net.json").write_text('[{"epoch": 1}]')
    assert load_backbone(tmp_path / "net.pth").card["architecture"] == "resnet18"


def test_a_checkpoint_of_ours_gives_the_backbone_with_its_runs_mean_and_std(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("augment: {mean: [0.1, 0.2, 0.3], size: 64}\n")
    content = {f"pair.{kind}.backbone.{name}": t for kind in ("query", "key") for name, t in NET.items()}
    torch.save({"step": 3, "method": {**content, "_extra_state": {}}}, tmp_path / "checkpoints" / "step-00000003.pt")
    facts = load_backbone(tmp_path / "checkpoints" / "step-00000003.pt").card
    assert (facts["prefix"], facts["mean"], facts["input_size"]) == ("pair.query.backbone.", [0.1, 0.2, 0.3], 64)


def test_safetensors_without_a_card_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(NET, tmp_path / "model.safetensors")
    assert torch.equal(load_backbone(tmp_path / "model.safetensors").conv1.weight, NET["conv1.weight"])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_pickle_of_mocos_conversion_script_is_read(protocol: int, tmp_path: Path) -> None:
    arrays = {to_detectron2(name): t.numpy() for name, t in NET.items() if not name.startswith("fc.")}
    content = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    (tmp_path / "converted.pkl").write_bytes(pickle.dumps(content, protocol))
    backbone = load_backbone(tmp_path / "converted.pkl")
    assert all(torch.equal(tensor, NET[name]) for name, tensor in backbone.state_dict().items())


def test_a_vision_transformer_is_read_where_its_architecture_is_named(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install mls[timm])")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {f"module.base_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    torch.save({"state_dict": {**state, "module.base_encoder.head.0.weight": torch.zeros(4, 192)}}, tmp_path / "v3.pth")
    with pytest.raises(CheckpointError, match="name its architecture with --architecture, such as timm:"):
        load_backbone(tmp_path / "v3.pth")
    backbone = load_backbone(tmp_path / "v3.pth", architecture="timm:vit_tiny_patch16_224")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(backbone(images), vit.eval()(images))
    # A run says which architecture it is in model.backbone.
    start = ModelConfig(backbone="timm:vit_tiny_patch16_224", weights=str(tmp_path / "v3.pth"), projection=8)
    started = build_encoder(start, seed=3).backbone.state_dict()
    assert all(torch.equal(tensor, started[name]) for name, tensor in vit.state_dict().items())


def test_two_networks_in_a_file_are_not_guessed_between(tmp_path: Path) -> None:
    torch.save({**behind("left.", NET), **behind("right.", SLOW)}, tmp_path / "pair.pth")
    with pytest.raises(CheckpointError, match=r"several networks, behind 'left\.', 'right\.': say which"):
        load_backbone(tmp_path / "pair.pth")
    assert torch.equal(load_backbone(tmp_path / "pair.pth", prefix="right").conv1.weight, SLOW["conv1.weight"])


def test_a_network_that_is_nearly_one_of_ours_is_refused_with_what_differs(tmp_path: Path) -> None:
    small = {**NET, "conv1.weight": torch.zeros(64, 3, 3, 3)}  # the stem that CIFAR networks have
    torch.save(small, tmp_path / "cifar.pth")
    with pytest.raises(CheckpointError, match=r"1 names away from resnet18 \(conv1.weight is \[64, 3, 3, 3\]"):
        load_backbone(tmp_path / "cifar.pth")
    torch.save({name: t for name, t in NET.items() if "layer4.1" not in name}, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"resnet18 \(layer4\.1\.conv1\.weight is missing"):
        load_backbone(tmp_path / "cut.pth")


def test_the_blocks_of_a_deeper_network_are_too_much() -> None:
    with torch.device("meta"):
        deep = resnet50().state_dict()
    assert foreign.misfits(deep, "resnet50") == []
    deep["layer3.6.conv1.weight"] = torch.empty(256, 1024, 1, 1, device="meta")
    assert foreign.misfits(deep, "resnet50") == ["layer3.6.conv1.weight is too much"]


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    ("name", "save"),
    [("c.pth", torch.save), ("c.pkl", lambda content, path: path.write_bytes(pickle.dumps(content)))],
)
def test_a_pickle_that_could_run_code_is_refused_and_runs_none(name: str, save: Callable, tmp_path: Path) -> None:
    save({"state_dict": {}, "more": Harmful(tmp_path / "trace")}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.mkdir .* so it was not read"):
        load_backbone(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_with_its_programs_objects_says_what_to_save_instead(tmp_path: Path) -> None:
    torch.save({"state_dict": NET, "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pth")
    with pytest.raises(CheckpointError, match=r"asks for argparse\.Namespace .* save its state_dict alone"):
        load_backbone(tmp_path / "args.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.safetensors"])
def test_a_damaged_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_backbone(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_without_tensors_or_without_a_network_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        load_backbone(tmp_path / "empty.pth")
    torch.save({"words": torch.zeros(3)}, tmp_path / "words.pth")
    with pytest.raises(CheckpointError, match="holds no network of mls"):
        load_backbone(tmp_path / "words.pth")


@pytest.mark.parametrize("name", backbones.RESNETS)
def test_names_go_to_detectron2_and_back(name: str) -> None:
    with torch.device("meta"):
        names = list(backbones.build(name).state_dict())
    assert [from_detectron2(to_detectron2(one)) for one in names] == names
    assert len({to_detectron2(one) for one in names}) == len(names)
    assert [from_sequential(one) for one in children(dict.fromkeys(names))] == names
