"""`mls bench evidence`: do pseudo-labels help? The arms of a recipe that labels itself by regions, with equal networks,
resolution, steps and images: plain MoCo-v2, windows without labels (the fair baseline), its own labels, as many random
and true ones. Tables, the paired differences, and the gain against the labels' overlap."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.errors import ConfigError, command, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mls.config import Config
    from mls.engine import Run
    from mls.eval.cells import Measured
    from mls.eval.pretraining import Pretraining
    from mls.tables import Table

    Found = Mapping[str, Mapping[int, Measured]]  # arm -> seed -> its numbers

UNTRAINED, MOCO, WINDOWS = "untrained", "MoCo-v2", "+ windows"
OWN, RANDOM, ORACLE = "+ own region labels", "+ random labels", "+ oracle labels"
WORDS, OTHER_WORDS = "+ own words", "+ words of other images"
MLS_WORDS = ("objective.method=mls_words", "objective.weight=10")  # as mls_words_scenes_tiny
PLAIN = ("objective.windows.count=0",)  # an arm without windows has nothing to share with the others
SMALL_CROPS = ("augment.small_crops=2", "augment.small_size=16", "augment.small_scale=[0.14,0.39]")  # as the windows
FINER = ("objective.regions.grid=5", "objective.regions.side=0.35")
CONTROL = ("objective.labels_from=backbone",)  # as many rows as the lists give, without making lists
# Each question's arms; those of ALWAYS are in all of them.
ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "labels": {
        UNTRAINED: ("objective.method=moco_v2", *PLAIN),
        MOCO: ("objective.method=moco_v2", *PLAIN),
        WINDOWS: ("objective.method=moco_v2",),
        OWN: (),
        RANDOM: ("objective.pseudo_labels=random", *CONTROL),
        "+ oracle, 1 in 4 of the labels": ("objective.pseudo_labels=oracle", "objective.oracle_share=0.25", *CONTROL),
        "+ oracle, half of the labels": ("objective.pseudo_labels=oracle", "objective.oracle_share=0.5", *CONTROL),
        ORACLE: ("objective.pseudo_labels=oracle", *CONTROL),
        "supervised": ("objective.method=supervised", *PLAIN),
    },
    "better": {
        "own, 5 × 5 of 0.35": FINER,
        "own, k 10": ("objective.k=10",),
        "own, k 20": ("objective.k=20",),
        "own, less its own similarity": ("objective.regions.novelty=0.5",),
        "own, one threshold": ("objective.regions.choose=threshold",),
        "own, soft": ("objective.regions.soft=0.1",),
        "own, lists every 2 epochs": ("objective.regions.every_epochs=2",),
        "own, λ 1": ("objective.weight=1",),
        "own, λ 4": ("objective.weight=4",),
        "own, LL-R": ("objective.loss=ll_r",),
        "own, EM": ("objective.loss=em",),
        "own, two-way": ("objective.loss=two_way", "objective.normalise=mean"),
        "own, windows labelled too": ("objective.label_windows=true",),
    },
    "words": {
        WORDS: MLS_WORDS,
        OTHER_WORDS: (*MLS_WORDS, "objective.pseudo_labels=random"),
        "own words, 5 × 5 of 0.35": (*MLS_WORDS, *FINER),
        "+ true labels as words": (*MLS_WORDS, "objective.pseudo_labels=oracle"),
    },
    "windows": {
        "windows, their image's no negatives": ("objective.method=moco_v2", "objective.windows.same_image=false"),
        "local to global": ("objective.method=moco_v2", *PLAIN, *SMALL_CROPS),
        "windows, four": ("objective.method=moco_v2", "objective.windows.count=4"),
        "own, their image's no negatives": ("objective.windows.same_image=false",),
    },
    "dense": {
        "DenseCL": ("objective.method=densecl", *PLAIN),
        "SlotCon": ("objective.method=slotcon", "objective.prototypes=32", "objective.hidden=256"),
    },
}
ALWAYS = (WINDOWS, OWN, ORACLE)
# Keys of objective.* that act once labels do; all others act from the first step on.
LATE = {"k", "weight", "loss", "options", "normalise", "labels_from", "classify_with", "regions"}
LATE |= {"pseudo_labels", "oracle_share", "label_windows"}
QUIET = ("monitor.knn_every_epochs=0", "monitor.linear_every_epochs=0", "monitor.moments=0", "engine.threads=1")
QUICK = ("data.scenes.count=1536", "data.scenes.test_count=500", "optim.epochs=4", "dictionary.size=1024")
QUICK += ("objective.warmup_epochs=2", "objective.regions.every_epochs=1")


def evidence(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE KEY=VALUE", help="An MLS recipe, and overrides.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(ARMS)} (default: labels). May be repeated.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this arm. May be repeated.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(metavar="NAME: KEY=VALUE", help="Own labels made otherwise. May be repeated.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N|FIRST-LAST", help="Choose a recipe on other seeds than you report.")
    ] = "3",
    quick: Annotated[bool, typer.Option("--quick", help="A look: few epochs on few scenes.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print what is finished as markdown; train nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Default: $MLS_RUNS/evidence-RECIPE.")] = None,
) -> None:
    """Do pseudo-labels help? Arms × seeds of a recipe with region labels, each with its controls.

    Every seed is another network, and other scenes. All arms that differ in their labels alone go on from one
    checkpoint, of the end of the warm-up, so that a difference of one seed is the labels' alone. Each cell is a run
    folder and rows in results.jsonl; interrupt it and call it again.

    Examples:

        mls bench evidence --quick

        mls bench evidence mls_regions_scenes_tiny --seeds 5 --out runs/evidence

        mls bench evidence --question better --seeds 100-101

        mls bench evidence --show --out runs/evidence
    """
    from mls.config import runs_root
    from mls.files import file_name
    from mls.recipes import is_override, load_config

    recipe, *overrides = arguments or ["mls_regions_scenes_tiny"]
    if is_override(recipe):
        raise ConfigError(
            f"name the recipe before the overrides: {command('mls bench evidence mls_regions_scenes_tiny', recipe)}"
        )
    overrides = [*QUIET, *(QUICK if quick else ()), *overrides]
    base = load_config(recipe, overrides)
    folder = out or runs_root(base) / file_name(f"evidence-{base.run.recipe}{'-quick' * quick}", "the folder's name")
    cells = arms_of(recipe, overrides, chosen(question or ["labels"], arm or (), variant or ()))
    _tell((finished if show else measured)(cells, numbers(seeds), folder), base, folder, quick, show)


def numbers(seeds: str) -> range:
    """
    >>> numbers("3"), numbers("10-14")
    (range(0, 3), range(10, 15))
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", seeds)
    first, last = (0, -1) if found is None else (0, int(found[1]) - 1) if not found[2] else map(int, found.groups())
    wanted = range(first, last + 1)
    if not wanted:
        raise ConfigError(f"--seeds is {seeds!r}: give how many, such as 5, or the first and the last, such as 10-14")
    return wanted


def chosen(
    questions: Sequence[str], only: Sequence[str] = (), variants: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """The arms of the questions with those that they are compared with, or `only` some; variants of the arm with own
    labels come last.

    >>> list(chosen(["dense"], variants=["k 3: objective.k=3"]))
    ['+ windows', '+ own region labels', '+ oracle labels', 'DenseCL', 'SlotCon', 'k 3']
    """
    for question in questions:
        if question not in ARMS:
            raise unknown_name("question", question, ARMS)
    arms = {name: ARMS["labels"][name] for name in ARMS["labels"] if "labels" in questions or name in ALWAYS}
    arms |= {name: changes for question in questions for name, changes in ARMS[question].items()}
    for variant in variants:
        name, separator, changes = variant.partition(": ")
        if not separator or "=" not in changes:
            raise ConfigError(f"--variant is {variant!r}: write a name, a colon and overrides, 'k 3: objective.k=3'")
        arms[name] = tuple(changes.split())
    for name in only:
        if name not in arms:
            raise unknown_name("arm", name, arms)
    return {name: arms[name] for name in arms if not only or name in only}


def arms_of(recipe: str, overrides: Sequence[str], arms: Mapping[str, Sequence[str]]) -> dict[str, Pretraining]:
    """The cells of one seed. All that train alike until the warm-up ends go on from one run's checkpoint."""
    from mls.config import MLSOptions
    from mls.data.loader import whole_batches
    from mls.eval.pretraining import Pretraining
    from mls.recipes import load_config

    base = load_config(recipe, overrides)
    if not isinstance(base.objective, MLSOptions) or base.objective.labels_from != "regions":
        raise ConfigError(
            f"{recipe} has no labels from regions, which this study is about: name a recipe such as "
            "mls_regions_scenes_tiny, or add objective.labels_from=regions"
        )
    if base.data.source != "scenes":
        raise ConfigError(
            f"{recipe} trains on data.source={base.data.source}, which the study does not probe: compose scenes of "
            "photographs with mls_regions_photographs_tiny data.scenes.objects=FOLDER"
        )
    images, listed = min(base.data.scenes.count, base.data.limit or base.data.scenes.count), base.objective.regions
    steps = int(base.objective.warmup_epochs * whole_batches(images, base))
    # Where each image has k rows or more among its neighbours, controls of as many rows need no lists.
    plenty = listed.neighbours * base.dictionary.size > 4 * base.objective.k * images and listed.choose == "nearest"
    trunk = Pretraining("until labels", recipe, overrides, own_scenes=True)

    def cell(name: str, changes: Sequence[str]) -> Pretraining:
        overridden = [*overrides, *(one for one in changes if plenty or one not in CONTROL)]
        arm = Pretraining(name, recipe, overridden, trained=name != UNTRAINED, own_scenes=True)
        shares = steps > 0 and alike_until_labels(trunk.config, arm.config)
        return replace(arm, trunk=trunk, trunk_steps=steps) if shares else arm

    return {name: cell(name, changes) for name, changes in arms.items()}


def alike_until_labels(base: Config, arm: Config) -> bool:
    """Do both train alike until the warm-up ends? A loss with a state of its own has it from the first step on."""
    from mls.config import NOT_A_KEY, MLSOptions, differences
    from mls.core.multi_label import build_loss

    for key, _, value in differences(base, arm):
        section, name, *_ = key.split(".")
        late = section == "objective" and name in LATE and key != "objective.regions.lists"  # checkpoints name theirs
        if not (late or (key, value) in (("objective.method", "moco_v2"), ("objective.warmup_epochs", NOT_A_KEY))):
            return False
    labelled = [one.objective for one in (base, arm) if isinstance(one.objective, MLSOptions)]
    return not any(build_loss(options, sharded=False).state_dict() for options in labelled)


# ------------------------------------------------------------------------------------------------------- what they say


def measured(cells: Mapping[str, Pretraining], seeds: Sequence[int], folder: Path) -> Found:
    from mls.eval.cells import over_seeds

    found = over_seeds({name: [cell.with_seed(seed) for seed in seeds] for name, cell in cells.items()}, folder)
    return {name: dict(zip(seeds, several, strict=True)) for name, several in found.items()}


def finished(cells: Mapping[str, Pretraining], seeds: Sequence[int], folder: Path) -> Found:
    """Those that the folder has; nothing is trained."""
    stored = {name: {seed: cell.with_seed(seed).stored(folder) for seed in seeds} for name, cell in cells.items()}
    there = {name: {seed: one for seed, one in several.items() if one} for name, several in stored.items()}
    return {name: several for name, several in there.items() if several}


def of(found: Found, arm: str, metric: str) -> dict[int, float]:
    """By seed."""
    return {seed: one.values[metric] for seed, one in found.get(arm, {}).items() if metric in one.values}


def cpu_seconds(run: Run) -> float | None:
    """Of a step, what neighbours of all images cost included; None of a run whose log does not say."""
    from mls.engine import events

    rows = [row["cpu_seconds"] for row in run.metrics() if row.get("cpu_seconds") is not None]
    found = (one for one in events.read(run.path / "events.jsonl") if one["event"] == "refresh")
    lists = {one["step"]: one.get("cpu_seconds", 0.0) for one in found}  # once a step: a resume repeats some
    return statistics.fmean(rows) + sum(lists.values()) / run.metrics()[-1]["step"] if rows else None


def tables(found: Found, folder: Path, heading: str, note: str) -> list[Table]:
    """What each arm reaches, and what it is above another with the same seed."""
    from mls.engine import Run
    from mls.eval.pretraining import OVERLAP, PROBES
    from mls.tables import Column, Row, Table

    costs = {
        (arm, seed): cost
        for arm, several in found.items()
        for seed, one in several.items()
        if (cost := cpu_seconds(Run(folder / one.row["run"]))) is not None
    }
    rows = []
    for arm, several in found.items():
        values: dict[str, Any] = {"n": str(len(several))}
        values |= {one.name: list(of(found, arm, one.name).values()) for one in (*PROBES, *OVERLAP)}
        values["cpu"] = [costs[arm, seed] for seed in several if (arm, seed) in costs]
        values["ratio"] = [
            costs[arm, seed] / costs[MOCO, seed] for seed in several if {(arm, seed), (MOCO, seed)} <= costs.keys()
        ]
        rows.append(Row([arm], values))
    cost = (Column("CPU s a step", "cpu", 2, scale=1), Column("to MoCo's", "ratio", 2, scale=1))
    columns = (Column("seeds", "n"), *PROBES, *OVERLAP, *cost)
    pairs = differences(found, note)
    return [Table([heading], columns, rows), pairs] if pairs.rows else [Table([heading], columns, rows, note)]


def differences(found: Found, note: str) -> Table:
    """Of pairs with the same seed, network, scenes and, up to the warm-up's end, the same steps."""
    from mls.eval.paired import Paired
    from mls.eval.pretraining import PROBES
    from mls.tables import Column, Row, Table

    pairs = [
        (MOCO, UNTRAINED),
        (WINDOWS, MOCO),
        *((arm, WINDOWS) for arm in found if arm not in (UNTRAINED, MOCO, WINDOWS)),
        (OWN, RANDOM),
        (WORDS, OTHER_WORDS),
    ]
    columns, rows = [Column("seeds", "n")], []
    for probe in PROBES:
        columns += [Column(probe.heading, f"{probe.name} difference"), Column("p", f"{probe.name} p")]
        columns += [Column("of the oracle's", f"{probe.name} share")]
    for first, second in pairs:
        values: dict[str, Any] = {}
        for probe in PROBES:
            pair = Paired.of(of(found, first, probe.name), of(found, second, probe.name))
            if pair is None:
                continue
            values |= {"n": str(len(pair.differences)), f"{probe.name} difference": pair.text()}
            values[f"{probe.name} p"] = "" if pair.p is None else f"{pair.p:.4f}" if pair.p >= 1e-4 else "< 0.0001"
            share = share_of_gap(found, first, probe.name) if second == WINDOWS else None
            values[f"{probe.name} share"] = "" if share is None else f"{share:.0%}"
        if values:
            rows.append(Row([f"{first.removeprefix('+ ')} − {second.removeprefix('+ ')}"], values))
    return Table(["difference"], columns, rows, note)


def share_of_gap(found: Found, arm: str, metric: str) -> float | None:
    """The arm's mean gain over windows alone, as a share of the oracle's with the same seeds."""
    base, top, own = (of(found, name, metric) for name in (WINDOWS, ORACLE, arm))
    seeds = base.keys() & top.keys() & own.keys()
    gap = sum(top[seed] - base[seed] for seed in seeds)
    return sum(own[seed] - base[seed] for seed in seeds) / gap if gap > 0 and arm != ORACLE else None


def figure(found: Found) -> Figure:
    """The gain in linear mAP against how often labels are right. Mixtures of true and random labels are a line: what
    labels of an overlap give whose errors are chance."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    base = of(found, WINDOWS, "linear")
    mixtures: list[tuple[float, float]] = []
    for arm in found:
        overlap, linear = of(found, arm, "overlap"), of(found, arm, "linear")
        seeds = sorted(overlap.keys() & linear.keys() & base.keys())
        if not seeds:
            continue
        across = [overlap[seed] for seed in seeds]
        up = [100 * (linear[seed] - base[seed]) for seed in seeds]
        x, y = statistics.fmean(across), statistics.fmean(up)
        mixed = arm == RANDOM or "oracle" in arm
        mixtures += [(x, y)] * mixed
        dots = axes.scatter(across, up, s=14, alpha=0.6, color="0.5" if mixed else None)
        axes.scatter([x], [y], s=60, marker="_" if mixed else "D", color=dots.get_facecolor()[0])
        side, apart = ("right", -8) if x > 0.75 else ("left", 6)
        text = arm.removeprefix("+ ")
        axes.annotate(text, (x, y), xytext=(apart, 4), textcoords="offset points", fontsize=8, ha=side)
    if mixtures:
        axes.plot(*zip(*sorted(mixtures), strict=True), color="0.7", zorder=0)
    axes.axhline(0, color="0.85", zorder=0)
    axes.set_xlabel("overlap of the pseudo-labels with the true labels")
    axes.set_ylabel("gain in linear mAP over the same windows without labels")
    return drawn


def _tell(found: Found, base: Config, folder: Path, quick: bool, show: bool) -> None:
    from mls.files import write_atomically
    from mls.tables import Format, render, terminal_width

    seeds = sorted({seed for several in found.values() for seed in several})
    if not found:
        raise ConfigError(f"{folder} has no finished arm of these: leave --show out to train them")
    note = f"{base.run.recipe}, {base.optim.epochs} epochs; mAP in per cent on unseen scenes, mean ± std over seeds "
    note += f"{', '.join(map(str, seeds))}; differences of pairs with the same seed: mean ± half of a 95 % interval, "
    note += "two-sided t-test; CPU time of the training process, one thread, with the search of neighbours"
    both = tables(found, folder, "arm (--quick: too short to show anything)" if quick else "arm", note)
    text, records = "\n\n".join(map(render, both)) + "\n", ",\n".join(render(one, Format.json) for one in both)
    write_atomically(folder / "evidence.md", text.encode())
    write_atomically(folder / "evidence.json", f"[{records}]\n".encode())
    figure(found).savefig(folder / "gain_against_overlap.png", dpi=150)
    print(text if show else "\n\n".join(render(one, width=terminal_width()) for one in both))
    if not show:
        print(f"\n{folder}: runs, evidence.md, evidence.json, gain_against_overlap.png, results.jsonl")
