"""Exports that hold layers beside tensors (torch.export, ONNX) and Hugging Face folders: the features of the source in
any batch and size, and a sentence for every file that asks its reader for more."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import mls
from mls.errors import CheckpointError, ConfigError
from mls.exporting import TARGETS, export, to_onnx, to_pt2, verify_export
from mls.exporting.certify import certify
from mls.exporting.source import Source, normalised
from mls.frameworks import installed as frameworks
from mls.models import backbones

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: backbones.build("resnet_tiny"),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8,) * 4, num_classes=0),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, num_classes=0, img_size=64,
        dynamic_img_size=True, dynamic_img_pad=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    torch.manual_seed(0)
    backbone, out = NETWORKS[request.param]().eval(), tmp_path_factory.mktemp("programs")
    for parameter in backbone.parameters():  # as after training: a ConvNeXt's layers begin at 1e-6 of their size
        parameter.data += 0.1 * torch.randn_like(parameter)
    card = {"architecture": request.param, "input_size": 64, "mean": MEAN, "std": STD, "sha256": "0"}
    source = Source(backbone, out / "source", card, None)
    program = to_pt2.captured(source)
    with pytest.MonkeyPatch.context() as patch:  # once for both
        for target in (to_pt2, to_onnx):
            patch.setattr(target, "captured", lambda source: program)
            target.write(source, out, out)
    return source, out


def load(source: Source, folder: Path, target: str) -> Any:
    files = {"pt2": ("backbone.pt2", "use_pt2.py"), "onnx": ("backbone.onnx", "use_onnx.py")}[target]
    return TARGETS[target].load(source, folder / files[0], folder / files[1])


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_a_program_gives_the_features_of_its_source_in_any_batch_and_size(
    target: str, exported: tuple[Source, Path]
) -> None:
    source, folder = exported
    facts = certify(source, load(source, folder, target))
    assert facts["coverage"]["keys"] == len(source.tensors())
    if source.architecture != "vit":  # the certificate has another batch and size than the program was made with
        return
    snippet = folder / f"use_{target}.py"
    names: dict = {"__file__": str(snippet)}
    exec(snippet.read_text(), names)
    network = names["load"]()
    for batch, height, width in ((1, 64, 64), (4, 96, 80)):
        pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            wanted = source.backbone(normalised(pixels, source.mean, source.std))
            got = names["features"](network, pixels if target == "pt2" else pixels.numpy())
        assert torch.allclose(torch.as_tensor(got), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert names["SMALLEST"] == 64 and names.get("OPSET", to_onnx.OPSET) == to_onnx.OPSET
    data = snippet.with_name(f"backbone.{target}").read_bytes()
    assert b"site-packages" not in data and str(Path.cwd()).encode() not in data  # no paths of this machine


def test_swapped_colours_in_a_snippet_are_caught(program: tuple[Source, bytes], tmp_path: Path) -> None:
    source, data = program
    (tmp_path / "backbone.pt2").write_bytes(data)
    (tmp_path / "use_pt2.py").write_text(
        to_pt2.filled("use_pt2.py", source, 32).replace("0.5, 0.4, 0.3", "0.3, 0.4, 0.5")
    )
    with pytest.raises(CheckpointError, match="gives other features than two layers: features by"):
        certify(source, load(source, tmp_path, "pt2"))


def changed(data: bytes, member: str, change: Callable[[bytes], bytes], more: dict[str, bytes] = {}) -> bytes:  # noqa: B006
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(member) else content)
        for name, content in more.items():
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/{name}", content)
    return buffer.getvalue()


def in_model(path: str, value: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        model = part = json.loads(content)
        *above, last = path.split("/")
        for key in above:
            part = part[int(key)] if key.isdigit() else part[key]
        part[last] = value
        return json.dumps(model).encode()

    return change


CALL = "__import__('pathlib').Path('ran').touch()"
NODE, MODEL = "graph_module/graph/nodes/0", "models/model.json"
HOSTILE = {
    "code that is run as a guard": (MODEL, in_model("guards_code", [CALL]), "guards_code in it may run code"),
    "another function": (MODEL, in_model(f"{NODE}/target", "torch.hub.load"), "target in it is 'torch.hub.load'"),
    "an operator that opens files": (
        MODEL,
        in_model(f"{NODE}/target", "torch.ops.aten.from_file.default"),
        "from_file",
    ),
    "a size that is code": (MODEL, in_model(f"{NODE}/x", {"expr_str": CALL}), "expr_str in it is "),
    "a name that is code": (MODEL, in_model("graph_module/module_call_graph/0/fqn", f"x={CALL}"), "fqn in it is "),
    "a pickle for a tensor": ("weights_config.json", lambda content: content.replace(b"false", b"true"), "use_pickle"),
    "a pickle": (
        "sample_inputs/model.pt",
        lambda content: b"cos\nsystem\n(S'touch ran'\ntR.",
        "cannot be read|asks for",
    ),
    "damage": ("weights/weight_0", lambda content: content[:-8], "cannot be read"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, bytes]:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    card = {"architecture": "two layers", "input_size": 32, "mean": MEAN, "std": STD, "sha256": "0"}
    source = Source(backbone, Path("two layers"), card, None)
    folder = tmp_path_factory.mktemp("program")
    to_pt2.write(source, folder, folder)
    return source, (folder / to_pt2.FILE).read_bytes()


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_program_that_asks_for_more_than_operators_is_refused(
    attack: str, program: tuple[Source, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source, data), (member, change, message) = program, HOSTILE[attack]
    file = tmp_path / to_pt2.FILE
    file.write_bytes(changed(data, "no such member", change))
    to_pt2.load(source, file, None)  # only the change is what is refused
    file.write_bytes(changed(data, member, change))
    with pytest.raises(CheckpointError, match=message):
        to_pt2.load(source, file, None)
    file.write_bytes(changed(data, "no such member", change, {"data/constants/opaque_obj_0": b"cos\nsystem\n"}))
    with pytest.raises(CheckpointError, match="opaque_obj_0 in it is nothing"):
        to_pt2.load(source, file, None)
    assert not (tmp_path / "ran").exists()


def test_what_is_loaded_of_a_program_is_what_was_checked(
    program: tuple[Source, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two directories in a file Python's zipfile reads the second one here, and torch's reader the first."""
    monkeypatch.chdir(tmp_path)
    (source, data), file = program, tmp_path / to_pt2.FILE
    clean = changed(data, "no such member", bytes)
    evil = changed(clean, "weights_config.json", lambda content: content.replace(b"false", b"true "))
    evil = changed(evil, "weights/weight_0", lambda content: b"cos\nsystem\n(S'touch ran'\ntR.".ljust(len(content)))
    file.write_bytes(evil[:-22] + clean)
    certify(source, to_pt2.load(source, file, None))
    assert not (tmp_path / "ran").exists()


def onnx_of(domain: str = "", location: str = "") -> bytes:
    weight = onnx.numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")
    if location:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    value = onnx.helper.make_tensor_value_info
    kind, shape = onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"]
    node = onnx.helper.make_node("Mul", ["images", "weight"], ["features"], domain=domain)
    graph = onnx.helper.make_graph(
        [node], "g", [value("images", kind, shape)], [value("features", kind, shape)], [weight]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (onnx_of(location="/etc/passwd"), "its tensor weight lies in another file"),
        (onnx_of(domain="com.other"), "asks for Mul of com.other, which is no operator of ONNX"),
        (onnx_of()[:-20], "cannot be read"),
    ],
    ids=["another file", "another operator", "damage"],
)
def test_an_onnx_file_that_asks_for_more_than_operators_is_refused(
    data: bytes, message: str, program: tuple[Source, bytes], tmp_path: Path
) -> None:
    (tmp_path / "backbone.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        to_onnx.load(program[0], tmp_path / "backbone.onnx", None)


def test_a_hugging_face_folder_is_loaded_by_timm_and_by_mls_and_nothing_else_in_it_is_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(backbones.build("timm:test_vit").state_dict(), tmp_path / "net.pth")
    (checked,) = export(tmp_path / "net.pth", ["huggingface"], tmp_path / "out", "timm:test_vit")
    folder = tmp_path / "out" / "huggingface"
    assert checked.worst == 0 and checked.file == folder / "model.safetensors"
    images, source = torch.rand(2, 3, 64, 96), mls.load_backbone(tmp_path / "net.pth", "timm:test_vit")
    with torch.no_grad():
        wanted = source(images)
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), wanted)
        assert torch.equal(mls.load_backbone(folder / "model.safetensors")(images), wanted)
    text = (folder / "README.md").read_text()
    assert "Not known to mls: timm:test_vit" in text and checked.facts["recipe_sha256"] and "{" not in text
    assert verify_export(folder / "model.safetensors")[0].worst == 0
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_args": {"embed_dim": 10**9}}, "asks for more than a backbone"),
        ({"architecture": "hf-hub:someone/else"}, "is no config.json of a network of timm"),
        ({"architecture": "test_convnext"}, "timm cannot load"),
        ({"pretrained_cfg": config["pretrained_cfg"] | {"mean": [0.1, 0.2, 0.3]}}, "gives other features"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            verify_export(folder / "model.safetensors")


def test_a_program_alone_is_compared_with_what_its_certificate_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {f"{where}.": backbones.build("resnet_tiny").state_dict() for where in ("first", "second")}
    both = {where + name: tensor for where, state in states.items() for name, tensor in state.items()}
    torch.save(both, tmp_path / "net.pth")
    monkeypatch.chdir(tmp_path)
    (checked,) = export("net.pth", ["pt2"], prefix="second", out=tmp_path / "export")
    monkeypatch.chdir("/")
    assert verify_export(checked.file)[0].worst == checked.worst == 0
    torch.save({name: tensor + 1 for name, tensor in both.items()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth, from which .*backbone\.pt2 was made, is another one now"):
        verify_export(checked.file)
    (tmp_path / "net.pth").unlink()
    with pytest.raises(CheckpointError, match=r"net\.pth, from which .*backbone\.pt2 was made, is gone: name it with"):
        verify_export(checked.file)
    checked.file.with_name("pt2.certificate.json").unlink()
    with pytest.raises(CheckpointError, match="has no certificate beside it: name what it was made from"):
        verify_export(checked.file)


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "missing", lambda name: ["onnxruntime"] if name == "onnx" else [])
    with pytest.raises(ConfigError, match=r'onnx needs onnxruntime: pip install "mls\[onnx\]"'):
        export("random:resnet_tiny", ["onnx"], tmp_path)
