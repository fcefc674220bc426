"""Configurations that anybody may have written: a sentence, or what works; never a traceback, never for long."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mls.config import OBJECTIVES, Config
from mls.errors import ConfigError, Stopped, UserError
from mls.recipes import load_config
from mls.tools.bench.faults import fault
from mls.tools.bench.faults.kills import TINY

SECONDS = 1.0  # of this process' time, for the reading of one configuration
PIECES = """{ } [ ] , : - ? & * ! | > ' " # % @ ` ~ \t \\ \\0 \\ud800 << <<: *a &a [*a] &a{x: *a} !!set !!binary null
??? ${ ${a} ${run.name} ${oc.env:HOME} ${oc.create:${a}} .nan .inf -.inf 1e308 -1 0 010 1:30 2026-01-01 yes é 999999999
base: base:base base:[1] run.name: objective: data: optim.lr: --- ... \x00 \x85 \ufeff \U0001f600""".split(" ")


def told(load: Callable[[], Any]) -> str:
    """ "" where `load` works or raises one sentence, soon."""
    began = time.process_time()
    try:
        load()
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > 2500:
            return f"not one sentence: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - began
    return "" if seconds < SECONDS else f"{seconds:.1f} s"


@cache
def shipped() -> list[tuple[Callable[[Path], Any], bytes]]:
    """Every YAML file that comes with mls, and what reads it."""
    from mls.eval import load_protocol, load_suite
    from mls.exporting.to_detectron2 import read_yaml
    from mls.slurm.profile import load_profile

    readers: dict[str, Callable[[Path], Any]] = {"pretrain": load_config, "eval": load_protocol, "suites": load_suite}
    readers |= {"slurm": load_profile, "export": read_yaml}
    found = sorted(Path(str(files("mls.configs"))).rglob("*.yaml"))
    return [(readers[path.parent.name], path.read_bytes()) for path in found]


def nested(draws: random.Random) -> str:
    """Depth, breadth, or what aliases make of a few lines."""
    count = draws.choice([5, 30, 300, 30_000])
    opening, closing = draws.choice([("[", "]"), ("{a: ", "}"), ("- ", ""), ("a: ", ""), ("? ", ""), ("&a ", "")])
    bomb = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]" for n in range(min(count, 300))]
    deep, long = opening * count + "1" + closing * draws.choice([0, count]), "x" * count * 10
    values = [deep, "\n".join(bomb), f"objective: {{options: {{x: {deep}}}}}", f"a: &a [*a, {long}]", long * 2]
    values += ["objective:\n  options:\n" + "".join(f"    {line}\n" for line in bomb), f"run: {{name: {long}}}"]
    last = lambda n: f"${{objective.options.a{n - 1}}}" * 3 if n else "1"
    references = [f"    a{n}: {last(n)}\n" for n in range(count % 40)]
    return draws.choice([*values, "objective:\n  options:\n" + "".join(references), "base: " + long])


@fault("a file that ships with mls, broken at random, as a recipe, protocol, suite, profile or export", 600, quick=8)
def broken_files(folder: Path, number: int) -> str:
    draws = random.Random(number)
    read, content = draws.choice(shipped())
    lines = content.splitlines(keepends=True)
    for _ in range(draws.randint(1, 4)):
        place = draws.randrange(len(lines))
        piece = draws.choice(PIECES).encode(errors="surrogatepass")
        change = draws.randrange(5)
        if change == 0:
            lines[place] = lines[place][: draws.randrange(80)] + piece + lines[place][draws.randrange(80) :]
        elif change == 1:
            lines[place] = lines[place].partition(b":")[0] + b": " + piece + b"\n"
        elif change == 2:
            lines.insert(place, draws.choice(lines))
        elif change == 3:
            lines[place] = b"  " + lines[place]
        else:
            lines[place] = bytes(draws.randrange(256) if draws.random() < 0.1 else byte for byte in lines[place])
    path = folder / draws.choice(["mls_scenes_tiny.yaml", "linear.yaml", "x.yaml", "-.yaml"])
    path.write_bytes(nested(draws).encode() if number % 4 == 0 else b"".join(lines))
    return told(lambda: read(path))


@fault("a key twice in a file that ships with mls", 300, quick=6)
def doubled_keys(folder: Path, number: int) -> str:
    draws = random.Random(number)
    read, content = draws.choice(shipped())
    lines = content.decode().splitlines()
    keys = [n for n, line in enumerate(lines) if line.rstrip().endswith(":") or ": " in line.partition("#")[0]]
    place = draws.choice([n for n in keys if not lines[n].lstrip().startswith(("-", "#"))])
    key = lines[place].partition(":")[0]
    same = [n for n in range(place + 1, len(lines) + 1) if _ends_block(lines, n, key)]
    lines.insert(again := draws.choice(same[:1]), f"{key}: 1")
    path = folder / "x.yaml"
    path.write_text("\n".join(lines) + "\n")
    try:
        read(path)
    except ConfigError as error:
        both = f"(lines {place + 1} and {again + 1})"
        return "" if both in str(error) and "\n" not in str(error) else f"does not name {both}: {error}"
    return f"{key.strip()} in lines {place + 1} and {again + 1} was read"


def _ends_block(lines: list[str], place: int, key: str) -> bool:
    """Whether a line before `place` would stand in the same section as `key`, behind its value."""
    indent = len(key) - len(key.lstrip())
    line = f"{lines[place]}x" if place < len(lines) else "x"
    return place == len(lines) or (line != "x" and len(line) - len(line.lstrip()) <= indent)


@fault("hostile overrides on the command line", 600, quick=12)
def hostile_overrides(folder: Path, number: int) -> str:
    draws = random.Random(number)
    keys = ["optim.lr", "run.name", "objective.options", "objective.options.x", "data", "augment.scale", "x", "", "."]
    keys += ["a" + ".a" * 3000, "objective[k]", "run.root", "data.root", "objective.method", "run.plugins", "data..x"]
    overrides = []
    for _ in range(draws.randint(1, 3)):
        value = nested(draws) if draws.random() < 0.3 else "".join(draws.choices(PIECES, k=draws.randint(1, 4)))
        overrides.append(f"{draws.choice(keys)}{draws.choice(['=', '=', '=', ''])}{value}")
    return told(lambda: load_config("mls_scenes_tiny", overrides))


@fault("run.name that leads out of the runs folder, is an option, or no name", 200, quick=6)
def hostile_names(folder: Path, number: int) -> str:
    from mls.engine import Run

    draws = random.Random(number)
    parts = ["..", ".", "/", "-", "x", "", "~", "\n", "\0", " ", "é", "x" * 300, "\x1b[2J", "*", "$HOME", "010"]
    name = "".join(draws.choices(parts, k=draws.randint(1, 4)))
    root = folder / "a" / "runs"
    made: list[Path] = []
    place = [f"run.root={root}", f"run.name={json.dumps(name)}"]
    words = told(lambda: made.append(Run.create(load_config("mls_scenes_tiny", place)).path))
    outside = [path for path in folder.rglob("*") if path != root and path.is_dir() and root not in path.parents]
    if words or [path for path in outside if path != folder / "a"]:
        return words or f"{name!r} made {outside}"
    return "" if not made or (made[0].name == name and made[0].parent == root) else f"{name!r} became {made[0].name!r}"


# ---------------------------------------------------------------------------------------------- every number

VALUES = (".nan", ".inf", "-1", "0", "1e308", str(2**70), str(-(2**70)), "-1e-3")
FEW = ["data.scenes.count=48", "data.scenes.test_count=16", "data.workers=0"]
STEPS = ["training.steps=2", "training.batch_size=4", "training.precise_bn=1"]
PROTOCOLS = {  # and what makes them quick
    "spml_scenes": ["training.epochs=1"],
    "finetune_scenes": ["training.epochs=1", "data.shots=1"],
    "linear_scenes": ["probe.l2=[0.1]"],
    "knn_scenes": [],
    "svm_scenes": ["probe.costs=[0.1]", "probe.folds=2"],
    "detection_scenes": [*STEPS, "training.warmup_steps=1", "training.falls=[1]"],
    "segmentation_scenes": STEPS,
}


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The keys of a configuration that hold numbers, and how many."""
    for item in fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from numbers(value, f"{key}.")
        elif not str(item.type).startswith("Literal") and ("int" in str(item.type) or "float" in str(item.type)):
            yield key, len(value) if isinstance(value, tuple) else -1 if isinstance(value, list) else 0


def overrides_of(keys: Iterator[tuple[str, int]]) -> list[str]:
    """Each with each of VALUES."""
    value_of = lambda value, many: f"[{', '.join([value] * abs(many))}]" if many else value
    return [f"{key}={value_of(value, many)}" for key, many in keys for value in VALUES]


@cache
def of_pretraining() -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in OBJECTIVES.names():
        for override in overrides_of(numbers(Config(objective=OBJECTIVES[name]()))):
            chosen = [] if not override.startswith("objective.") else [f"objective.method={name}"]
            found.setdefault(f"{override}{name if chosen else ''}", [*chosen, override])
    return random.Random(0).sample(list(found.values()), len(found))


@cache
def of_evaluation() -> list[tuple[str, str]]:
    from mls.eval import load_protocol

    found = [(name, one) for name in PROTOCOLS for one in overrides_of(numbers(load_protocol(name)))]
    return random.Random(0).sample(found, len(found))


def works(run: Callable[[], Any]) -> str:
    try:
        run()
    except Stopped:
        return ""
    except UserError as error:
        return "" if "\n" not in str(error) else f"not one sentence: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@fault("each number of pretraining at nan, inf, -1, 0, 1e308, 2**70: refused, or it trains", 904, quick=6)
def pretraining_numbers(folder: Path, number: int) -> str:
    from mls import engine

    changes = of_pretraining()[number % len(of_pretraining())]
    tiny = [one for one in TINY[1:] if not one.startswith("run.name")]
    tiny += [*FEW, f"run.root={folder}", "engine.max_steps=2", "monitor.log_every=1"]
    method = [one for one in changes if one.startswith("objective.method")]
    from mls.recipes import applicable

    def run() -> None:
        overrides = applicable("mls_scenes_tiny", [*tiny, *method])
        engine.pretrain(load_config("mls_scenes_tiny", [*overrides, changes[-1]]), quiet=True)

    what = works(run)
    return what and f"{' '.join(changes)}: {what}"


@fault("each number of a downstream protocol at nan, inf, -1, 0, 1e308, 2**70: refused, or it runs", 2256, quick=6)
def protocol_numbers(folder: Path, number: int) -> str:
    from mls.eval import load_protocol
    from mls.eval.cells import evaluation

    name, change = of_evaluation()[number % len(of_evaluation())]
    small = [*FEW, *PROTOCOLS[name], change]
    what = works(lambda: evaluation(load_protocol(name, small)).finish(folder, keep=False, quiet=True))
    return what and f"{name} {change}: {what}"
