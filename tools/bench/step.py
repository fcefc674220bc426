"""`mls bench step`: a whole training step, ours (eager and compiled) beside the encoders alone, the official MoCo's
step restated and lightly's parts; its parts, dispatches, waits, memory; what the augmentation dispatches; and a run
from JPEG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mls.tools.bench.training_steps import Setting


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backbone: Annotated[str, typer.Option(help="A ResNet of torchvision.")] = "resnet50",
    batch: Annotated[int | None, typer.Option(min=2, help="Images a step; default 8, on a GPU 256.")] = None,
    size: Annotated[int | None, typer.Option(min=32, help="Pixels a side; default 64, on a GPU 224.")] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Of the dictionary, again for another; 4096 and 65536.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Every step once a round, in turns; medians are printed.")] = 7,
    compiled: Annotated[bool, typer.Option(help="Also under torch.compile, which takes minutes to begin.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also keep all numbers, as JSON.")] = None,
) -> None:
    """Measure a training step beside others', all in turns in one process with one batch of random images.

    Examples:

        mls bench step --backbone resnet18 --batch 16 --rows 4096 --no-compiled

        mls bench step --device cuda --out step.json
    """
    import torch

    from mls.errors import ConfigError
    from mls.tools.bench import training_steps
    from mls.tools.bench.results import write_results
    from mls.tools.bench.training_steps import Setting

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {device} is not here: use cpu" + (" or cuda" * torch.cuda.is_available()))
    on_gpu, found = device == "cuda", []
    for count in rows or [4096, 65536]:
        setting = Setting(device, backbone, batch or (256 if on_gpu else 8), size or (224 if on_gpu else 64), count)
        found.append(training_steps.measure(setting, rounds, compiled))
        _show(setting, found[-1])
    augmentation = training_steps.augmentation(device, compiled)
    print("dispatches of the augmentation of a batch: " + ", ".join(f"{k} {v}" for k, v in augmentation.items()))
    files = {name: from_files(name, setting) for name in ("moco_v2", "mls")}
    for name, one in files.items():
        print(
            f"a run of {name} from JPEG files: {one['images/s']:.0f} images/s, {one['data wait']:.0%} waiting for data"
        )
    if out is not None:
        write_results(out, {"steps": found, "augmentation": augmentation, "from JPEG files": files})


def from_files(name: str, setting: Setting) -> dict[str, float]:
    """By `mls pretrain`, from JPEG files of 640 × 480 pixels, in a process of its own: medians of its second half."""
    import subprocess
    import sys
    from statistics import median
    from tempfile import TemporaryDirectory

    from mls.engine import Run
    from mls.tools.bench.input import write_photographs

    with TemporaryDirectory() as folder:
        root = write_photographs(Path(folder, "photographs"), 4 * setting.batch, (640, 480))
        keys = {"data.source": "folder", "data.root": root, "data.batch_size": setting.batch, "optim.epochs": 8}
        keys |= {"objective.method": name, "model.backbone": setting.backbone, "augment.size": setting.size}
        keys |= {"dictionary.size": setting.rows, "model.key_norm": "none", "engine.device": setting.device}
        keys |= {"monitor.log_every": 2, "monitor.moments": 0, "run.root": folder, "run.name": "run"}
        words = [f"{key}={value}" for key, value in keys.items()]
        subprocess.run(
            [sys.executable, "-m", "mls.tools", "pretrain", "mls_coco_r50", *words], check=True, capture_output=True
        )
        rows = Run(Path(folder, "run")).metrics()[8:]
        named = {"images/s": "images_per_second", "data wait": "data_wait"}
        return {shown: median(row[key] for row in rows) for shown, key in named.items()}


def _show(setting: Setting, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    what = f"{setting.backbone}, {setting.batch} × {setting.size} px, {setting.rows:,} rows, {setting.device}"
    steps = Table("step", "ms", "images/s", "÷ encoders", "dispatches", "waits", "GiB", title=what)
    for name, row in found["steps"].items():
        cells = [f"{1e3 * row['seconds']:.1f}", f"{setting.batch / row['seconds']:.0f}", f"{row['ratio']:.3f}"]
        cells += ["—" if row[key] is None else f"{row[key]:{form}}" for key, form in LAST]
        steps.add_row(name, *cells)
    parts = Table("part of ours, mls", "ms", title="not one after the other: each measured by itself")
    for name, seconds in found["parts"].items():
        parts.add_row(name, f"{1e3 * seconds:.1f}")
    console.print(steps, parts)
    flops, copied = found["bound"]["flops"] / 1e12, found["bound"]["bytes"] / 1e9
    print(f"measured bounds: {flops:.2f} TFLOP/s in a matrix product, {copied:.0f} GB/s copied")


LAST = (("dispatches", "d"), ("waits", "d"), ("memory", ".2f"))
