"""Hugging Face: a folder that timm loads (`config.json`, `model.safetensors`), with a model card of what the run says
about itself. `model.json` is our own card, so that `mls.load_backbone` reads the folder's weights too."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from mls import card
from mls.config import Config
from mls.engine.run import Run
from mls.errors import CheckpointError, reason
from mls.exporting.certify import TOLERANCE, Loaded
from mls.exporting.source import NoCounterpart, Source, stages_of
from mls.exporting.to_safetensors import save_with_card
from mls.exporting.to_timm import network_of, options_of
from mls.exporting.to_torchvision import prepared
from mls.files import read_json, sha256
from mls.frameworks import installed as frameworks
from mls.models import foreign
from mls.models.backbones import ANY_SIZE, TINY
from mls.recipes import from_dict

FILE, RECIPE = "huggingface/model.safetensors", "config.json"
LARGEST = 4096  # img_size: a larger one is none that was meant
PROBES = ("knn/", "linear/")  # in the log of a run


def write(source: Source, folder: Path, final: Path) -> list[str]:
    name = network_of(source)
    if frameworks.missing("timm"):
        raise NoCounterpart(f"huggingface is checked by timm: {frameworks.FRAMEWORKS['timm'].commands[0]}")
    file = folder / FILE
    file.parent.mkdir()
    save_with_card(source, file)
    (file.parent / RECIPE).write_text(json.dumps(_config(source, name), indent=2) + "\n")
    (file.parent / "README.md").write_text(model_card(source, file))
    return [RECIPE]


def _config(source: Source, name: str) -> dict[str, Any]:
    size, mean, std = (source.card[key] for key in ("input_size", "mean", "std"))
    patches = (
        getattr(source.backbone, "patch_embed", None) if getattr(source.backbone, "dynamic_img_size", False) else None
    )
    arguments = {} if patches is None else {"model_args": {"img_size": max(patches.img_size), **options_of(source)}}
    pretrained = {"input_size": [3, size, size], "fixed_input_size": False, "mean": mean, "std": std, "crop_pct": 0.875}
    pretrained |= {"interpolation": "bilinear", "num_classes": 0, "tag": "mls"}
    facts = {"architecture": name, "num_classes": 0, "num_features": source.backbone.feature_dim}
    return facts | arguments | {"pretrained_cfg": pretrained}


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """As anybody loads such a folder; strictly, so that no tensor is missing or left over."""
    timm = frameworks.load("timm")
    recipe = recipe or file.with_name(RECIPE)
    settings = _settings(recipe, timm)
    if (recipe.name, file.name) != (RECIPE, Path(FILE).name) or recipe.parent != file.parent:
        raise CheckpointError(f"{file}: timm reads {Path(FILE).name} and {RECIPE} of one folder: call them so")
    foreign.read(file)  # one sentence for what is no such file
    try:
        with frameworks.quiet():
            network = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
    except Exception as error:  # of a constructor, of torch where shapes differ
        raise CheckpointError(f"timm cannot load {file.parent} ({reason(error)[:200]}): export again") from None
    stages = lambda pixels: stages_of(network, prepared(pixels, source, settings))
    return Loaded(file, recipe, f"timm {frameworks.version('timm')}", network.state_dict(), stages)


def _settings(recipe: Path, timm: Any) -> dict[str, Any]:
    """MEAN and STD of a config.json that asks for a network of timm and for nothing else."""
    found = read_json(recipe, "export again", CheckpointError, card.MOST)
    try:
        name, pretrained, arguments = found["architecture"], found["pretrained_cfg"], found.get("model_args", {})
        numbers = {key.upper(): [float(value) for value in pretrained[key]] for key in ("mean", "std")}
        if not timm.is_model(name) or any(len(values) != 3 for values in numbers.values()):
            raise ValueError
        others = {key: value for key, value in arguments.items() if value is not ANY_SIZE.get(key)}
        side = others.pop("img_size", 1)  # of the images whose positions were learnt
        others = {} if {**others, "img_size": side} == TINY else others  # of vit_tiny
        if others or found["num_classes"] != 0 or type(side) is not int or not 0 < side <= LARGEST:
            raise CheckpointError(
                f"{recipe} asks for more than a backbone as mls exports it: num_classes is 0, and model_args hold "
                f"{', '.join(ANY_SIZE)} (true) and img_size alone"
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{recipe} is no config.json of a network of timm: export again") from None
    return numbers


def model_card(source: Source, file: Path) -> str:
    """From the backbone's card, and the log of its run where it lies beside."""
    facts, size = source.facts(), source.card["input_size"]
    data = recipe = f"Not known to mls: {facts['origin']}."
    probes, limits = (
        "None is known to mls.",
        [f"Trained on images of {size} × {size} pixels; others were not measured."],
    )
    if "config" in source.card:
        config = from_dict(source.card["config"])
        images = f", at most {config.data.limit:,} images" if config.data.limit else ""
        data = f"`{config.data.source}`{f' in {Path(config.data.root).name}' if config.data.root else ''}{images}."
        recipe, probes = _recipe(source, config), _probes(Run(source.path.parent))
        if source.card["epochs"] < config.optim.epochs:
            limits.append("Training had not ended.")
    limits.append("No classes: a probe or fine-tuning on labelled images comes after it.")
    limits.append("What the images that it was trained on lack or show too often shapes its features.")
    texts = {"title": source.card.get("run", source.architecture), "dim": source.backbone.feature_dim}
    texts |= {"data": data, "recipe": recipe, "probes": probes, "limits": "\n".join(f"- {text}" for text in limits)}
    texts |= {"tolerance": TOLERANCE, "source": source.path.name, "source_sha256": facts["sha256"]}
    return (files("mls.configs") / "export" / "model_card.md").read_text().format(**texts, sha256=sha256(file))


def _recipe(source: Source, config: Config) -> str:
    optim, known = config.optim, source.card
    rows = {
        "recipe": config.run.recipe or "none",
        "method": config.objective.method,
        "network": source.architecture,
        "epochs": f"{known['epochs']:.4g} of {optim.epochs:g}, step {known['step']:,}",
        "batch": config.data.batch_size,
        "optimizer": f"{optim.name}, rate {optim.lr:g} per 256 images, weight decay {optim.weight_decay:g}",
        "seed": config.run.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in known["versions"].items()),
    }
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _probes(run: Run) -> str:
    """The last values in the log; what an untrained network reaches is not measured during a run."""
    last = {key: (row[key], row["step"]) for row in run.metrics() for key in row if key.startswith(PROBES)}
    rows = [f"| {key} | {value:.4f} | {step:,} |" for key, (value, step) in sorted(last.items()) if value is not None]
    if not rows:
        return "The run measured none."
    head = [
        "Online, on images held out; untrained weights beside them: `mls eval run PROTOCOL --weights random:NAME`.",
        "",
    ]
    return "\n".join([*head, "| probe | value | step |", "|---|---|---|", *rows])
