"""Suites: the tables of the papers as YAML (configs/eval/suites/). Rows are methods, columns are protocols; every cell
is run over seeds, and stands beside the paper's number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mls.engine import Run
from mls.errors import CheckpointError, ConfigError, DataError, MissingLibrary, unknown_name
from mls.eval.cells import Evaluation, Measured, evaluation, over_seeds, validated, values_over_seeds
from mls.eval.protocol import load_protocol
from mls.eval.weights import check_weights, is_name, public_name
from mls.models import card, weights_file
from mls.recipes import Kind, build, find, read_yaml, shipped


@dataclass(frozen=True)
class Column:
    name: str = ""
    protocol: str = ""
    metric: str = "map"
    set: list[str] = field(default_factory=list)  # overrides
    table: str = ""  # its heading, where a paper shows the columns in several tables


@dataclass(frozen=True)
class Row:
    name: str = ""
    set: list[str] = field(default_factory=list)
    choose: dict[str, list[Any]] = field(default_factory=dict)  # values of a key, tried on the validation part
    weights: str | None = None  # default: the protocol's where methods are compared, none where backbones are
    network: str = ""  # of the suite's `networks`, which gives the weights; a part of the name
    ours: bool = True  # false: the paper's numbers alone
    tiny: str | None = None  # where backbones are compared: the weights of --tiny
    method: str = ""  # where backbones are compared: the run's, so that a run of the user finds the paper's numbers
    paper: list[float | None] = field(default_factory=list)  # one a column, in per cent
    made_of: str = ""  # the suite's row that it comes from, where the paper's network was replaced by another


@dataclass(frozen=True)
class Suite:
    title: str = ""
    source: str = ""  # of the paper's numbers
    compares: Literal["methods", "backbones"] = "methods"  # what --weights adds: other networks for all rows, or rows
    networks: dict[str, str] = field(default_factory=dict)  # of the paper: the weights of each
    columns: list[Column] = field(default_factory=list)
    tiny: list[Column] = field(default_factory=list)  # the same on the embedded scenes
    rows: list[Row] = field(default_factory=list)


@dataclass
class Comparison:
    """What a suite found: for each row and column the values of its seeds, as shares."""

    suite: Suite
    columns: Sequence[Column]
    rows: Sequence[Row]
    tiny: bool = False
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    chosen: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # what `choose` came to, as overrides
    missing: dict[str, str] = field(default_factory=dict)  # column to why it could not be run
    absent: dict[str, str] = field(default_factory=dict)  # row to why its weights cannot be had
    dates: list[str] = field(default_factory=list)  # of the runs that were not run again
    overrides: Sequence[str] = ()  # of every row


@dataclass(frozen=True)
class Part:
    """What of a suite is run, and how."""

    weights: Sequence[str] = ()
    tiny: bool = False
    seeds: int | None = None
    only: Sequence[str] = ()
    overrides: Sequence[str] = ()
    again: bool = False


EVERYTHING = Part()


def check(suite: Suite) -> None:
    for row in suite.rows:
        if row.paper and len(row.paper) != len(suite.columns):
            raise ConfigError(
                f"row '{row.name}' of the suite has {len(row.paper)} paper numbers for {len(suite.columns)} columns: "
                "give one for each, null where there is none"
            )
        if row.network and not (row.network in suite.networks and row.network in row.name):
            raise ConfigError(
                f"row '{row.name}' of the suite has network '{row.network}': it must be one of the suite's networks "
                f"({', '.join(suite.networks) or 'none'}) and stand in the row's name"
            )


SUITE = Kind(Suite, "eval/suites", "suite", check, "columns, rows and tiny hold lists")


def suites() -> list[str]:
    """The names of the suites that ship with mls."""
    return shipped(SUITE.folder)


def load_suite(name: str | Path) -> Suite:
    """
    >>> [row.name for row in load_suite("paper_spml").rows][:2]
    ['BCE, all labels', 'BCE, 1 positive and all negatives']
    """
    path = find(name, SUITE.folder, SUITE.word)
    values, origins = read_yaml(path, SUITE)
    return build(SUITE, values, origins, (), path.name).config


def run(suite: Suite, root: Path, part: Part = EVERYTHING, say: Callable[[str], None] = print) -> Comparison:
    """Run what is not finished. A column whose data set is not there is left out and named in `missing`."""
    suite = on_own_data(suite, part.tiny, part.overrides)
    columns = suite.tiny if part.tiny else suite.columns
    rows = chosen_rows(suite, part.weights, part.tiny, part.only, part.overrides)
    found = Comparison(suite, columns, rows, part.tiny, overrides=part.overrides)
    say_once = lru_cache(maxsize=None)(say)  # columns may share their runs
    done: dict[tuple[str | None, ...], list[Measured]] = {}
    for row in found.rows:
        try:
            if row.ours and row.weights:
                check_weights(row.weights)  # before others train for hours
        except MissingLibrary as error:
            found.absent[row.name] = str(error)
            say(f"{row.name}: left out. {error}")

    for column in columns:
        for row in found.rows:
            if row.name in found.absent or not row.ours:
                continue
            try:
                chosen = [] if part.tiny else choose(suite, row, column, root, part.overrides, say_once)
                runs = (row.name, row.weights, column.protocol, *column.set, *chosen)
                if runs not in done:
                    cells = {row.name: plan(suite, row, column, part.seeds, [*chosen, *part.overrides])}
                    done[runs] = over_seeds(cells, root, part.again)[row.name]
                measured = done[runs]
            except DataError as error:
                if str(error) not in found.missing.values():
                    say(f"{column.name}: left out. {error}")
                found.missing[column.name] = str(error)
                break
            except (CheckpointError, MissingLibrary) as error:
                found.absent[row.name] = str(error)
                say(f"{row.name}: left out. {error}")
                continue
            of_any_number, _, number = column.metric.rpartition("_")
            if column.metric not in measured[0].values and number.isdigit() and of_any_number in measured[0].values:
                found.missing[column.name] = f"the test images have fewer than {number} patches"
                say(f"{column.name}: left out. {found.missing[column.name]}")
                break
            if column.metric not in measured[0].values:
                raise unknown_name(f"metric of column {column.name}", column.metric, measured[0].values)
            values = values_over_seeds(measured)[column.metric]
            found.values.setdefault((row.name, column.name), []).extend(values)
            found.chosen[row.name, column.name] = chosen
            found.dates += [one.date for one in measured if one.stored_before]
    return found


CLASSIFY = ("multilabel", "finetune", "linear", "knn", "svm")
MAPS = ("dense_linear", "dense_knn", "dense_cluster")
OF_OWN = {"table": CLASSIFY, "folder": CLASSIFY, "masks": MAPS, "coco": ("objects",), "yolo": ("objects",)}  # tasks


def on_own_data(suite: Suite, tiny: bool, overrides: Sequence[str]) -> Suite:
    """With `data.name=` a paper's rows on the user's own images, without the paper's numbers: those are of others.
    Of columns that would measure the same with other settings the first is left, and is named as its settings are. A
    suite of no paper stays as it is written."""
    name = next((one.removeprefix("data.name=") for one in overrides if one.startswith("data.name=")), None)
    if tiny and name in OF_OWN:
        raise ConfigError(f"--tiny is the embedded scenes, and data.name={name} is not: leave out one of them")
    if name is None or not suite.source:
        return suite
    if name not in OF_OWN:
        known = ", ".join(OF_OWN)
        raise ConfigError(
            f"the suite's columns name their data sets: leave out data.name={name}, or name yours ({known})"
        )
    columns: dict[Any, Column] = {}
    tasks = {protocol: load_protocol(protocol).task for protocol in {column.protocol for column in suite.columns}}
    for column in (column for column in suite.columns if tasks[column.protocol] in OF_OWN[name]):
        key = (tasks[column.protocol], column.metric, *column.set)
        columns.setdefault(key, replace(column, name=f"{column.metric}, as {column.name}", table=""))
    kept = list(columns.values())
    if kept and OF_OWN[name] is CLASSIFY:  # which metrics there are depends on the labels
        from mls.eval.splits import load

        single = load(load_protocol(kept[0].protocol, [*kept[0].set, *overrides]).data).train.single_label
        kept = [column for column in kept if single == column.metric.startswith("top")]
    if not kept:
        raise ConfigError(_unsuited(suite, name, set(tasks.values())))
    rows = [replace(row, paper=[]) for row in suite.rows if row.ours]
    return replace(suite, title=f"{suite.title}: its settings on own images", source="", columns=kept, rows=rows)


def _unsuited(suite: Suite, name: str, tasks: set[str]) -> str:
    images, labels = OF_OWN[name] is CLASSIFY, bool(tasks & {*CLASSIFY})
    if images and labels:
        why = "measures several labels of an image, and these have one each"
        use = "the suite paper_classification, or the protocols linear, knn and finetune"
    elif images:
        why, use = "measures boxes and regions", "the suites own_labels and paper_classification"
    else:
        why = "measures labels of images" if labels else "trains as long as the published sets need"
        why = "has no column for boxes" if tasks & {*MAPS} else why
        use = "the protocols detection, segmentation, dense_linear and objects, once for each of the weights"
    return f"the suite '{suite.title}' {why}, so it cannot run on data.name={name}: use {use}"


def choose(
    suite: Suite, row: Row, column: Column, root: Path, overrides: Sequence[str], say: Callable[[str], None]
) -> list[str]:
    """The values of `row.choose` that are best on the validation part with the first seed, as the papers choose a rate
    or a share for each method and data set. The test is not looked at. Tiny columns say their options themselves."""
    keys = [key for key in row.choose if not any(one.startswith(f"{key}=") for one in [*row.set, *overrides])]
    candidates = [
        [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for values in product(*(row.choose[key] for key in keys))
    ]
    if len(candidates) == 1:
        return candidates[0]
    cells = [cell for candidate in candidates for cell in plan(suite, row, column, 1, [*candidate, *overrides])]
    values = [validated(cell, root) for cell in cells]
    best = candidates[values.index(max(values))]
    say(f"{row.name}, {column.protocol}: {', '.join(best)} is the best on the validation part")
    return best


def plan(suite: Suite, row: Row, column: Column, seeds: int | None, overrides: Sequence[str]) -> list[Evaluation]:
    """Of our own runs; none where a row is the paper's alone."""
    if not row.ours:
        return []
    if row.weights is None and (suite.compares == "backbones" or row.network):
        raise ConfigError(
            f"row '{row.name}' names a network and has no weights, and another network must not stand for it: give "
            f"--weights '{row.name}=RUN', or say `ours: false` in the suite"
        )
    protocol = load_protocol(column.protocol, [*column.set, *row.set, *overrides])
    return [evaluation(protocol, row.weights, seed) for seed in range(seeds or protocol.seeds)]


def chosen_rows(
    suite: Suite, weights: Sequence[str], tiny: bool, only: Sequence[str], overrides: Sequence[str] = ()
) -> list[Row]:
    """The suite's rows and what `--weights` makes of them."""
    for name in only:
        if name not in [row.name for row in suite.rows]:
            raise unknown_name("row of the suite", name, [row.name for row in suite.rows])
    if any(one.startswith("model.weights=") for one in overrides):
        raise ConfigError("model.weights would run rows on another network than they name: use --weights")
    rows = [row for row in suite.rows if not only or row.name in only]
    given = labelled(weights)
    if suite.compares == "backbones":
        if tiny:
            rows = [replace(row, weights=row.tiny, ours=True) for row in rows if row.tiny]
        rows = [replace(row, ours=row.ours and row.weights is not None) for row in rows]
        return [*rows, *(row_of_weights(label, one) for label, one in given)]
    if not given and not tiny:
        return [replace(row, weights=suite.networks.get(row.network, row.weights)) for row in rows]
    # Each method once, for each of the weights in the place of the paper's networks, whose numbers these are.
    methods = list({(*row.set, "" if row.ours else row.name): row for row in reversed(rows)}.values())[::-1]
    several = len(given) > 1
    if not given:
        models = [load_protocol(column.protocol, [*column.set, *overrides]).model for column in suite.tiny]
        given = list({public_name(model.weights, model.backbone): model.weights for model in models}.items())
    return [_in_place_of_the_papers(row, one, label, always=several) for label, one in given for row in methods]


def labelled(weights: Sequence[str]) -> list[tuple[str, str]]:
    """(label, weights) of `--weights WEIGHTS` or `--weights LABEL=WEIGHTS`. Without a label it is a network's name or
    the end of a path, all of the path where others end alike. Random weights are called random whatever their label.

    >>> labelled(["torchvision:resnet18", "MLS=random:resnet18"])
    [('torchvision:resnet18@IMAGENET1K_V1', 'torchvision:resnet18'), ('MLS (random:resnet18)', 'random:resnet18')]
    """
    found = []
    for one in dict.fromkeys(weights):
        label, separator, rest = one.partition("=")
        if not separator or Path(one).expanduser().exists() or ":" in label:
            label, rest = "", one
        found.append((label, rest))
    ends = [Path(rest).name for label, rest in found if not label]
    return [(_label(label, rest, ends), rest) for label, rest in found]


def _label(label: str, weights: str, ends: Sequence[str]) -> str:
    if not is_name(weights):
        return label or (weights if ends.count(Path(weights).name) > 1 else Path(weights).name)
    name = weights if weights == "random" else public_name(weights, "")
    return f"{label} ({name})" if label and name.startswith("random") else label or name


def _in_place_of_the_papers(row: Row, weights: str, label: str, always: bool = False) -> Row:
    """The row names the network that is run."""
    name = row.name
    if row.network:
        name = name.replace(row.network, label)
    elif always:
        name = f"{name} · {label}"
    return replace(row, name=name, weights=weights, made_of=row.name)


def row_of_weights(label: str, weights: str) -> Row:
    """A row of `--weights`; several with one label are runs of one row."""
    if (Path(weights) / "config.yaml").is_file() and not (Path(weights) / "backbone.safetensors").is_file():
        method = Run.open(weights).config.objective.method  # it trains before its evaluations
    else:
        check_weights(weights)
        file = None if is_name(weights) else weights_file(weights)
        method = "" if file is None else str(card(file).get("method", ""))
    return Row(name=f"ours: {label}", weights=weights, method=method or label)


def paper_row_of(row: Row, suite: Suite) -> Row | None:
    """The row of the paper that a row of ours is compared with: the same method, or the same name."""
    of_paper = [other for other in suite.rows if other.paper]
    label = row.name.removeprefix("ours: ")
    for other in of_paper:
        if other.name in (row.name, label) or (other.method and other.method == row.method):
            return other
    return None
