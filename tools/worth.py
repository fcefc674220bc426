"""`mls worth`: is pretraining worth it on my images? A table with intervals, its cost, and one picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mls.eval.worth import Answer, Question

COLOURS = ("#6b6b6b", "#2a78d6", "#d62728", "#1b7f3b", "#f2b701", "#8c54c4")


def worth(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Images in class folders, or `scenes`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of the protocol `worth`.")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="A table of labels, .csv or .parquet.")] = None,
    starts: Annotated[str, typer.Option(help="random, imagenet, runs, weights; with commas.")] = "random,imagenet",
    fractions: Annotated[str, typer.Option(help="Shares of the labels, with commas.")] = "0.01,0.1,1",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the labels and first weights of the head.")] = 3,
    plan: Annotated[bool, typer.Option("--plan", help="Say how long it takes, and train nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Holds results.jsonl and worth.*; default: $MLS_RUNS/worth.")] = None,
) -> None:
    """Fine-tune every start on every share of your labels, with several seeds, and compare them with no pretraining.

    All starts learn from the same images with the same seed, and are tested on the same ones. Images of the test that
    a run was pretrained on are looked for first. What is finished is stored, and the same command goes on.

    Examples:

        mls worth /data/birds --starts random,imagenet,runs/my-run

        mls worth /data/photos --labels labels.csv --starts random,runs/my-run --fractions 0.1,1 --plan

        mls worth scenes --starts "random,pretrain:moco_v2_scenes_tiny optim.epochs=6" data.scenes.count=2000
    """
    from mls.eval import worth as asking
    from mls.files import runs_folder
    from mls.tables import show

    named = [one.strip() for one in starts.split(",") if one.strip()]
    where, backbone = _settings(data, labels, named)
    question = asking.question([*where, *(overrides or [])], named, _numbers(fractions), seeds, backbone)
    root = out or runs_folder() / "worth"
    root.mkdir(parents=True, exist_ok=True)
    _look_for_leaks(question, root)
    print(asking.plan(question, root), flush=True)
    if plan:
        return
    answer = asking.answer(question, root)
    print()
    show(answer.table(), root / "worth.md")
    for sentence in answer.verdicts():
        print(sentence)
    _figure(answer).savefig(root / "worth.png", dpi=120)
    print(f"{root / 'worth.md'}, worth.png, results.jsonl")


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions {text}: give shares with commas, such as 0.01,0.1,1") from None


def _settings(data: str, labels: str | None, starts: list[str]) -> tuple[list[str], str]:
    """Overrides of the protocol that follow from the images and the starts, and the network of all starts."""
    from mls.engine import sizing
    from mls.eval.weights import check_weights, is_name
    from mls.frozen.neighbours import source_from
    from mls.models import card_of
    from mls.recipes import load_config, override

    if data == "scenes":
        where = ["data.name=scenes", "augment.flip=0.0"]
        size, backbone = 32, "resnet_tiny"
    else:
        named = ["data.name=table", override("data.labels_file", labels)] if labels else ["data.name=folder"]
        where = [*named, override("data.root", data)]
        from mls import distributed

        facts = sizing.facts_of(source_from(data), distributed.start())
        sized, _ = sizing.choose(load_config("mls_folder_r50", [override("data.root", data)]), facts)
        size, backbone = sized.augment.size, sized.model.backbone
    for start in starts:
        if start != "imagenet":
            check_weights(start)  # before anything is said or made
    known = [card_of(start) for start in starts if not is_name(start) and not start.startswith("pretrain:")]
    if card := next((card for card in known if card is not None), None):
        size, backbone = int(card["input_size"]), str(card["architecture"])
    elif "imagenet" in starts and backbone == "resnet_tiny":
        backbone = "resnet18"
    if "imagenet" in starts and backbone == "resnet_tiny":
        raise ConfigError("nobody publishes ImageNet weights of resnet_tiny: leave imagenet out of --starts")
    return [*where, f"augment.size={size}"], backbone


def _look_for_leaks(question: Question, root: Path) -> None:
    from mls.data.sources import build_source
    from mls.engine import Run
    from mls.errors import UserError
    from mls.eval.cells import pretraining_config
    from mls.eval.worth import leaks

    test = len(question.data.test)
    for name, weights in question.starts.items():
        if name in ("random", "imagenet"):
            continue
        try:
            made = weights.startswith("pretrain:")
            config = pretraining_config(weights, 0, root, quiet=True) if made else Run.open(weights).config
            source = build_source(config.data)
        except UserError:
            print(f"{name}: its pretraining images are not here, so whether test images are among them is not known")
            continue
        found, alarms = leaks(source, question.data)
        told = f"{found:,} of {test:,} test images look like one of its {len(source):,} pretraining images"
        print(f"{name}: {told} ({alarms:.1%} of these look like another of them)")
    if len(question.networks()) > 1:
        networks = ", ".join(sorted(question.networks()))
        print(f"the starts are different networks ({networks}): what differs is not pretraining alone", file=sys.stderr)


def _figure(answer: Answer) -> Figure:
    from matplotlib.figure import Figure

    from mls.eval.paired import half_width

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    images = [answer.asked.images(fraction) for fraction in answer.asked.fractions]
    for number, name in enumerate(answer.asked.starts):
        values = [answer.values[name, fraction] for fraction in answer.asked.fractions]
        means = [sum(one) / len(one) for one in values]
        halves = [half_width(one) or 0.0 for one in values]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(images, means, halves, marker="o", capsize=3, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{one:,}" for one in images])
    axes.minorticks_off()
    axes.set_xlabel("labelled images learnt from")
    axes.set_ylabel(f"{answer.metric} on test images, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    return figure
