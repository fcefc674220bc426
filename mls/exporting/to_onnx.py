"""ONNX: `backbone.onnx` for onnxruntime and whatever else reads it, and a snippet that runs it. The tensors keep the
names that they have in torch, so that the certificate finds each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mls.errors import CheckpointError, refusal
from mls.exporting.certify import Loaded
from mls.exporting.source import NoCounterpart, Pixels, Source, Stages
from mls.exporting.to_pt2 import captured, filled, running
from mls.exporting.to_torchvision import prepared, read_snippet
from mls.frameworks import installed as frameworks

FILE, RECIPE = "backbone.onnx", "use_onnx.py"
OPSET = 18  # the first that resizes with antialiasing, as transformers' positions are interpolated
LARGEST = 2**31 - 2**24  # bytes of a file that holds its tensors itself


def write(source: Source, folder: Path, final: Path) -> list[str]:
    if absent := frameworks.missing("onnx"):
        raise NoCounterpart(f"onnx needs {', '.join(absent)}: {frameworks.FRAMEWORKS['onnx'].commands[0]}")
    if sum(tensor.nbytes for tensor in source.tensors().values()) > LARGEST:
        raise NoCounterpart(f"{source.architecture} has more than the 2 GB of a single ONNX file: export to pt2")
    program, smallest = captured(source)
    with frameworks.quiet():
        # Not optimized: folding a normalisation into a convolution would leave nothing to compare tensors with.
        options: dict[str, Any] = {"opset_version": OPSET, "optimize": False, "verbose": False}
        made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["features"], **options)
    assert made is not None
    model = made.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # names of the source
    (folder / FILE).write_bytes(model.SerializeToString())
    (folder / RECIPE).write_text(filled(RECIPE, source, smallest))
    return [RECIPE]


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    settings = read_snippet(recipe)
    runtime = frameworks.load("onnx")
    import onnx

    data = file.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
        _refuse_other_files(model)
        onnx.checker.check_model(model)
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf, onnx and onnxruntime each have their own
        raise CheckpointError(refusal(file, error)) from None
    tensors = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in model.graph.initializer}

    def stages(pixels: Pixels) -> Stages:
        with running(file):
            (found,) = session.run(["features"], {"images": prepared(pixels, source, settings).numpy()})
        return {"features": torch.from_numpy(found)}

    opset = next((one.version for one in model.opset_import if not one.domain), "unknown")
    return Loaded(file, recipe, f"onnxruntime {frameworks.version('onnx')}, opset {opset}", tensors, stages)


def _refuse_other_files(model: Any) -> None:
    """A ValueError for tensors that lie in other files, wherever on this machine, and for operators that are not
    ONNX's own."""
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto" and (message.data_location or message.external_data):
            raise ValueError(f"its tensor {message.name[:60]} lies in another file: save it with all tensors inside")
        if kind == "NodeProto" and message.domain not in ("", "ai.onnx"):
            raise ValueError(
                f"it asks for {message.op_type[:60]} of {message.domain[:60]}, which is no operator of ONNX"
            )


def _messages(message: Any) -> Iterator[Any]:
    """All parts of a protobuf message, those of graphs inside operators too."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(one)
