"""Exports backbones for other programs: files in their layout, a recipe that uses them, and a certificate that they
give the same features there. (The public names are `mls.export` and `mls.verify_export`; a package called `export`
would hide the function.)"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from mls.config import AugmentConfig
from mls.errors import CheckpointError, UserError
from mls.exporting import (
    to_detectron2,
    to_huggingface,
    to_mmseg,
    to_onnx,
    to_pt2,
    to_safetensors,
    to_timm,
    to_torchvision,
)
from mls.exporting.certify import Loaded, certificate, certify
from mls.exporting.source import DISK_FULL, NoCounterpart, Source
from mls.files import read_json, runs_folder, sha256, sync_folder, telling_disk_errors
from mls.locks import locked
from mls.models import weights_file
from mls.plugins import Registry, load_installed


@runtime_checkable
class Target(Protocol):
    """What a to_*.py file, or a class of a plug-in, has to have."""

    @property
    def FILE(self) -> str:
        """The name of the file that holds the weights."""
        ...

    def write(self, source: Source, folder: Path, final: Path) -> list[str]:
        """Write FILE and, beside it, its recipes into `folder`, which becomes `final`; gives back their names."""
        ...

    def load(self, source: Source, file: Path, recipe: Path | None) -> Loaded:
        """The network that the recipe builds, filled from the file."""
        ...


TargetClass = TypeVar("TargetClass", bound=Callable[[], Target])

TARGETS = Registry[Target]("export target")
PROGRAMS = (".pt2", ".onnx")  # files that hold a network's layers beside its tensors
RECIPES: dict[str, str] = {}  # a recipe's name, by which a file's target is known


def register(name: str, recipes: Sequence[str] = ()) -> Callable[[TargetClass], TargetClass]:
    """Decorator of a class that is a Target and writes recipes of these names."""

    def enter(target: TargetClass) -> TargetClass:
        add(name, target(), recipes)
        return target

    return enter


def add(name: str, target: Target, recipes: Sequence[str]) -> None:
    TARGETS.add(name, target)
    RECIPES.update(dict.fromkeys(recipes, name))


add("torchvision", to_torchvision, [to_torchvision.RECIPE])
add("timm", to_timm, [to_timm.RECIPE])
add("detectron2", to_detectron2, [to_detectron2.FPN, to_detectron2.C4])
add("mmseg", to_mmseg, [to_mmseg.RECIPE])
add("safetensors", to_safetensors, [to_safetensors.RECIPE])
add("huggingface", to_huggingface, [to_huggingface.RECIPE])
add("pt2", to_pt2, [to_pt2.RECIPE])
add("onnx", to_onnx, [to_onnx.RECIPE])


@dataclass(frozen=True)
class Checked:
    """One file that its target loaded with one recipe, and that equals the source."""

    target: str
    file: Path
    facts: dict[str, Any]  # certify.py

    @property
    def worst(self) -> float:
        """The largest difference of all stages, relative to the stage's largest value."""
        stages = self.facts["stages"].values()
        return max(one["max_abs_difference"] / (one["largest_value"] or 1.0) for one in stages)


def export(
    weights: str | Path,
    to: Sequence[str] | None = None,
    out: str | Path | None = None,
    architecture: str | None = None,
    prefix: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Checked]:
    """Write the backbone of a run, a checkpoint or a name for other programs, by default for all that have such a
    network, into `RUN/export` (of a name: $MLS_RUNS/export). All files are checked; after an error none is written."""
    load_installed()
    for name in to or ():
        TARGETS[name]  # a wrong name is told before anything is read
    if ":" not in str(weights) and weights_file(weights) is None:  # its random weights are asked for as random:NAME
        raise CheckpointError(
            f"{weights} is neither a run folder nor a file: give one, or a name as torchvision:resnet50"
        )
    source = Source.open(weights, architecture, prefix)
    if "origin" in source.card and source.path.is_file():
        usual = source.card["mean"] == list(AugmentConfig().mean)
        statistics = "; mean and std are taken to be ImageNet's" if usual else ""
        say(f"{source.path} holds {source.card['origin']}{statistics}")
    beside = source.path.parent if source.path.exists() else runs_folder()  # of a name
    final = Path(out).expanduser() if out else beside / "export"
    checked = []
    with _all_or_nothing(final) as folder:
        for name in to or TARGETS:
            try:
                checked += _write(name, source, folder, final, say)
            except NoCounterpart as reason:
                if to is not None:
                    raise
                say(f"not for {name}: {reason}")
    return checked


@contextmanager
def _all_or_nothing(final: Path) -> Iterator[Path]:
    """A folder whose files are moved to `final` when the block ends without an error."""
    existed = final.is_dir()
    try:
        with telling_disk_errors(final, DISK_FULL):
            final.mkdir(parents=True, exist_ok=True)
            with locked(final / ".lock", f"{final} is being exported to") as lock:
                for rest in final.glob(".export-*"):  # of a process that was killed
                    shutil.rmtree(rest)
                with tempfile.TemporaryDirectory(prefix=".export-", dir=final) as folder:
                    yield Path(folder)
                    lock.check()
                    for written in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                        place = final / written.relative_to(folder)
                        place.parent.mkdir(exist_ok=True)
                        os.replace(written, place)
                        sync_folder(place.parent)
    except BaseException:
        if not existed:
            with suppress(OSError):
                final.rmdir()
        raise


def _write(name: str, source: Source, folder: Path, final: Path, say: Callable[[str], None]) -> list[Checked]:
    target = TARGETS[name]
    recipes = target.write(source, folder, final)
    file = folder / target.FILE
    checked = []
    for recipe in recipes:
        say(f"{name}: comparing features as {recipe} makes them")
        loaded = target.load(source, file, file.with_name(recipe))
        checked.append(Checked(name, final / target.FILE, certify(source, loaded)))
    text = certificate(name, source, file, [one.facts for one in checked])
    file.with_name(certificate_name(name)).write_text(text)
    return checked


def certificate_name(target: str) -> str:
    return f"{target}.certificate.json"


def verify_export(
    file: str | Path,
    recipe: str | Path | None = None,
    against: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Checked]:
    """Check a file of any origin with each recipe beside it; nothing in it is executed. It is compared with `against`,
    a run or a checkpoint, or else with its own tensors in torchvision's network on RGB images, with the mean and std of
    the certificate beside it, or else of ImageNet."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file: give a backbone.pkl, a .pth, .safetensors, .pt2 or .onnx file")
    source = _source_of(file) if against is None else Source.open(against)
    pairs = [(Path(recipe).expanduser(), _target_of(Path(recipe)))] if recipe else _beside(file)
    checked = []
    for path, name in pairs:
        say(f"{name}: comparing features as {path.name if path else 'its defaults'} makes them")
        checked.append(Checked(name, file, certify(source, TARGETS[name].load(source, file, path))))
    return checked


def _target_of(recipe: Path) -> str:
    if recipe.name in RECIPES:
        return RECIPES[recipe.name]
    if recipe.suffix in (".yaml", ".yml"):
        return "detectron2"
    if recipe.suffix == ".py":
        return "mmseg"
    raise UserError(f"{recipe} is no recipe: give detectron2's .yaml or mmsegmentation's .py")


def _beside(file: Path) -> list[tuple[Path | None, str]]:
    """The recipes of a file, by its suffix and their names; None if there is none."""
    fitting = [name for name, target in TARGETS.items() if Path(target.FILE).suffix == file.suffix]
    if file.suffix == ".pkl":
        found = [(path, "detectron2") for path in sorted(file.parent.glob("*.yaml"))]
    else:
        found = [(file.with_name(name), target) for name, target in RECIPES.items() if target in fitting]
    return [pair for pair in found if pair[0].is_file()] or [(None, fitting[0] if fitting else "torchvision")]


def _source_of(file: Path) -> Source:
    """What a file is compared with by itself: its own tensors, or of a program what its certificate names."""
    facts = _certified(file)
    if file.suffix not in PROGRAMS:
        source = Source.open(file)
        source.card.update({key: facts[key] for key in ("mean", "std") if key in facts})
        return source
    if not facts:
        raise CheckpointError(
            f"{file} has no certificate beside it: name what it was made from, --against RUN|FILE|NAME"
        )
    path = Path(facts["path"])  # older certificates hold what was typed
    if path.is_absolute() and not path.is_file():
        raise CheckpointError(f"{path}, from which {file} was made, is gone: name it with --against RUN|FILE|NAME")
    source = Source.open(path, facts["architecture"], facts["prefix"])
    if source.facts()["sha256"] != facts["sha256"]:
        raise CheckpointError(
            f"{path}, from which {file} was made, is another one now: export again, or name yours with --against"
        )
    return source


def _certified(file: Path) -> dict[str, Any]:
    """The source by the certificate beside a file, if it belongs to this file."""
    for path in sorted(file.parent.glob("*.certificate.json")):
        facts = read_json(path, "export again, or delete it", CheckpointError)
        try:
            if facts["file"] == file.name:
                if facts["sha256"] != sha256(file):
                    raise CheckpointError(f"{path} was made for another {file.name}: export again, or delete it")
                source = facts["source"]
                found = {key: [float(value) for value in source[key]] for key in ("mean", "std")}
                found |= {key: str(source[key]) for key in ("path", "sha256", "architecture")}
                prefix = source.get("prefix")  # older certificates have none
                return {**found, "prefix": None if prefix is None else str(prefix)}
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} is no certificate of an export: export again, or delete it") from None
    return {}
