"""torch.export: `backbone.pt2`, a program that needs neither mls nor the network's source, and a snippet that runs it.
torch's own loader runs what such a file asks for, so a file is read through here before it is loaded."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbolic
from torch.export import Dim, ExportedProgram

from mls.errors import CheckpointError, refusal
from mls.exporting.certify import Loaded
from mls.exporting.source import NoCounterpart, Pixels, Source, Stages
from mls.exporting.to_torchvision import prepared, read_snippet
from mls.frameworks import installed as frameworks
from mls.models import foreign

FILE, RECIPE = "backbone.pt2", "use_pt2.py"
SMALLEST = 64  # side of an image, where those that it was trained on are not smaller: two cells of a map of stride 32
MEMBERS = re.compile(
    r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)"
    r"|sample_inputs/model\.pt)|models/model\.json|archive_format|archive_version|byteorder|\.data/\w+"
)
OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|getitem|and_|or_|not_)"
)
# Sizes are formulas in sympy's notation, which torch evaluates as Python; other text becomes part of generated code.
FORMULA = re.compile(
    r"\s|[-+*/(),]|\d+|Symbol\('[a-z]+\d+'|(positive|integer)=True|[a-z]+\d+"
    r"|(Add|Mul|Pow|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|Max|Min|Integer|Eq|Ne|Lt|Le|Gt|Ge)(?=\()"
)
WORD = re.compile(r"[\w.+:-]*|\[\]")
KEPT = ("val", "tensor_meta", "unbacked_bindings")  # of a node; the rest are paths and names of the source


def write(source: Source, folder: Path, final: Path) -> list[str]:
    program, smallest = captured(source)
    buffer = io.BytesIO()
    with frameworks.quiet():
        torch.export.save(program, buffer)
    (folder / FILE).write_bytes(buffer.getvalue())  # of a full disk torch's own writer says nothing
    (folder / RECIPE).write_text(filled(RECIPE, source, smallest))
    return [RECIPE]


def filled(recipe: str, source: Source, smallest: int | None) -> str:
    """The template in configs/export/ with its values; its comments stay."""
    values = {"MEAN": tuple(source.card["mean"]), "STD": tuple(source.card["std"])}
    values |= {"SIZE": source.card["input_size"], "SMALLEST": smallest}
    text = (files("mls.configs") / "export" / recipe).read_text()
    for key, value in values.items():
        text = re.sub(rf"^({key} =) .*?(  #.*)?$", lambda old, v=value: f"{old[1]} {v}{old[2] or ''}", text, flags=re.M)
    return text


def captured(source: Source) -> tuple[ExportedProgram, int | None]:
    """The program for batches and images of any size, and the smallest side of an image; None where the network takes
    images of one size. Neither batch nor size is the certificate's, which so shows that both are free."""
    size = source.card["input_size"]
    smallest, reason = min(size, SMALLEST), ""
    sides = {2: Dim("height", min=smallest), 3: Dim("width", min=smallest)}
    # With the second setting a last map of 1 × 1 may grow, but where it also asks for two images it is no use.
    for free, oblivious in ((sides, False), (sides, True), ({}, False)):
        images = torch.rand(3, 3, size + (32 if free else 0), size)
        batch = {0: Dim("batch", min=1), **free}
        try:
            with frameworks.quiet(), symbolic.patch(backed_size_oblivious=oblivious):  # pyright: ignore
                program = torch.export.export(source.backbone, (images,), dynamic_shapes=(batch,))
                program.module()(images[:1, :, : smallest if free else size, : smallest if free else size])
        except Exception as error:  # of many kinds, for each thing that a network may do
            reason = reason or " ".join(str(error).split())[:200]
            continue
        for node in program.graph.nodes:
            node.meta = {key: node.meta[key] for key in KEPT if key in node.meta}
        program._guards_code = []  # Python that torch would run at loading; the sizes stand in the recipe
        return program, smallest if free else None
    raise NoCounterpart(f"torch.export cannot follow {source.architecture} ({reason}): leave pt2 and onnx out of --to")


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    settings = read_snippet(recipe)
    data = file.read_bytes()
    try:
        with frameworks.quiet():
            program = torch.export.load(_without_code(data))
    except Exception as error:  # each part of a damaged file has its own kinds
        raise CheckpointError(refusal(file, error)) from None
    network = program.module()

    def stages(pixels: Pixels) -> Stages:
        with torch.no_grad(), running(file):
            return {"features": network(prepared(pixels, source, settings))}

    return Loaded(file, recipe, f"torch {torch.__version__}", program.state_dict, stages)


@contextmanager
def running(file: Path) -> Iterator[None]:
    """What a program of others says where it takes other images becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot compute features ({' '.join(str(error).split())[:200]}): export again"
        ) from None


def _without_code(data: bytes) -> io.BytesIO:
    """A copy of what was read and found harmless, for torch's own reader, which may find other members in the file. A
    ValueError for all that torch's loader would unpickle, evaluate or run beyond operators on tensors."""
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(checked, "w") as copy:
        names = [name.partition("/")[2] for name in archive.namelist()]
        strange = [name for name, count in Counter(names).items() if count > 1 or not MEMBERS.fullmatch(name)]
        if strange or len({name.partition("/")[0] for name in archive.namelist()}) > 1:
            raise ValueError(f"{(strange or ['two programs'])[0]} in it is nothing that a program of a backbone holds")
        for path, name in zip(archive.namelist(), names, strict=True):
            content = archive.read(path)  # zipfile compares its checksum
            if name.endswith(".json"):
                _refuse_words(json.loads(content))
            elif name.endswith(".pt"):
                foreign.load_plain(io.BytesIO(content))
            copy.writestr(path, content)
    checked.seek(0)
    return checked


def _refuse_words(content: Any, key: str = "") -> None:
    if isinstance(content, dict):
        for name, value in content.items():
            if not WORD.fullmatch(name) or (name in ("use_pickle", "guards_code") and value):
                raise ValueError(f"{name[:60]} in it may run code")
            _refuse_words(value, name)
    elif isinstance(content, list):
        for value in content:
            _refuse_words(value, key)
    elif isinstance(content, str):
        if key in ("in_spec", "out_spec"):
            return _refuse_words(json.loads(content))
        allowed = {"target": OPERATORS.fullmatch, "expr_str": lambda text: not FORMULA.sub("", text)}
        if not allowed.get(key, WORD.fullmatch)(content):
            raise ValueError(f"{key} in it is {content[:60]!r}, which may run code")
