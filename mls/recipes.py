"""How a configuration comes about: a recipe (YAML, `base:` starts from another one), then `key=value` overrides.
Keeps track of where every value came from. Mistakes are one sentence with the nearest valid name. A pretraining recipe
becomes a Config; `Kind` says the same of the other YAML files that ship with mls (the protocols of eval/)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mls import plugins, yaml_files
from mls.config import SIZED, Config, check, check_limits, defaults, flatten, methods_with
from mls.errors import ConfigError, command, unknown_name

Schema = TypeVar("Schema")
FOR_FOLDERS = "mls_folder_r50"
MOST_REFERENCES = 16  # ${...} in a configuration: so many that refer to each other become at most 3 ** (16 / 3) parts
MOST_CHARACTERS = 1000  # of all texts that hold any: OmegaConf's parser takes seconds for longer ones


@dataclass(frozen=True)
class Kind(Generic[Schema]):
    """One kind of YAML file: what it becomes, where those that ship with mls lie, what people call it."""

    schema: type[Schema]
    folder: str
    word: str
    check: Callable[[Schema], None]
    keys: str  # completes an error: how to list the keys
    choose: Callable[[Mapping[str, Any]], Schema] | None = None  # the defaults, where a file's values decide on them

    def defaults(self, values: Mapping[str, Any]) -> Schema:
        return self.schema() if self.choose is None else self.choose(values)


RECIPE = Kind(Config, "pretrain", "recipe", check, "`mls config` lists the keys", defaults)


@dataclass(frozen=True)
class Resolved(Generic[Schema]):
    """A configuration and, for every key, where its value came from: "default", "FILE:LINE" or "override"."""

    config: Schema
    origins: dict[str, str]


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe (a YAML file, or the name of one that ships with mls) and `key=value` overrides.

    >>> load_config("mls_scenes_tiny", ["objective.k=5"]).objective.k
    5
    """
    return resolve(recipe, overrides).config


def resolve(recipe: str | Path, overrides: Sequence[str] = ()) -> Resolved[Config]:
    path = find_recipe(recipe)
    rest = [override for override in overrides if not override.startswith("run.plugins=")]
    changed = [override for override in overrides if override not in rest]
    named = _parsed(changed[-1])["run"]["plugins"] if changed else _plugins_of(path)
    imported = plugins.load(_plugin_names(named, changed[-1] if changed else path.name))
    values, origins = read_yaml(path, RECIPE)  # after the import, which adds to the values that are valid
    run = values.setdefault("run", {})
    run.setdefault("recipe", path.stem)
    if imported or plugins.loaded():
        run["plugins"] = list(dict.fromkeys([*imported, *plugins.loaded()]))
        origins["run.plugins"] = "override" if changed else origins.get("run.plugins", "--import")
    return build(RECIPE, values, origins, rest, path.name)


def applicable(recipe: str | Path, overrides: Sequence[str]) -> list[str]:
    """Of overrides that several methods share, as the rows of a table do: those that the chosen method has.

    >>> applicable("mls_scenes_tiny", ["objective.k=5", "optim.epochs=2", "objective.method=moco_v2"])
    ['optim.epochs=2', 'objective.method=moco_v2']
    """
    values, _ = read_yaml(find_recipe(recipe), RECIPE)
    method = RECIPE.defaults(_merged({}, values, *map(_parsed, overrides))).objective.method
    key = lambda override: override.partition("=")[0]
    return [one for one in overrides if method in methods_with(key(one)) or not methods_with(key(one))]


def _plugins_of(path: Path) -> list[str]:
    """`run.plugins` of a recipe or of its base. A relative path counts from the recipe's folder."""
    for file, values, _ in with_bases(path, RECIPE):
        run = values.get("run")
        if isinstance(run, dict) and "plugins" in run:
            return [plugins.absolute(name, file.parent) for name in _plugin_names(run["plugins"], file.name)]
    return []


def _plugin_names(value: Any, where: str) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: run.plugins is {value}: list files and modules, such as [my_loss.py]")
    return list(names)


def build(
    kind: Kind[Schema], values: dict[str, Any], origins: dict[str, str], overrides: Sequence[str], where: str
) -> Resolved[Schema]:
    """The values of a file, then the overrides, checked."""
    changes = {override: _parsed(override) for override in overrides}
    for change in changes.values():
        values = _of_method(values, change)
    if kind is RECIPE:
        values = _without_auto(values, changes)
    known = kind.defaults(_merged({}, values, *changes.values()))
    node = _merge(OmegaConf.structured(known), values, where)
    for override, change in changes.items():
        _check_keys(change, "the command line", known, kind)
        node = _merge(node, change, override)
        origins[override.partition("=")[0]] = "override"
    config = _checked(kind, node, where)
    return Resolved(config, {key: _origin(key, origins) for key, _ in flatten(config)})


def _without_auto(values: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values and, in place, the changes without sizes that are `auto`: those not changed later are listed in
    `run.auto`, and hold their defaults until the run knows its images."""
    values = deepcopy(values)
    stored = list((values.get("run") or {}).get("auto") or [])  # of a run that waits for its images
    auto = list(stored)
    for layer in (values, *changes.values()):
        for key in SIZED:
            *sections, name = key.split(".")
            place: Any = layer
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if not isinstance(place, dict) or name not in place:
                continue
            if layer is values and key in stored and place[name] != "auto":
                continue  # the default that is stored beside run.auto
            auto = [other for other in auto if other != key]
            if place[name] == "auto":
                auto.append(key)
                del place[name]
    if auto or stored:
        known = {key for key, _ in flatten(RECIPE.defaults(_merged({}, values, *changes.values())))}
        values.setdefault("run", {})["auto"] = [key for key in SIZED if key in auto and key in known]
    return values


def override(key: str, text: str | Path) -> str:
    """The override that gives a key this text as it is: KEY=VALUE is read as YAML.

    >>> override("run.name", "first"), override("run.name", "8"), override("data.root", "birds #1 📷")
    ('run.name=first', 'run.name="8"', 'data.root="birds #1 📷"')
    """
    text = str(text)
    try:
        plain = yaml_files.parse(text, "")[0] == text
    except ConfigError:
        plain = False
    return f"{key}={text if plain else json.dumps(text, ensure_ascii=False)}"


def is_override(word: str) -> bool:
    """A path may hold "=", too, as folders of sweeps do."""
    return "=" in word and not os.path.exists(Path(word).expanduser())


def _parsed(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override: write key=value, for example data.root=/images")
    names = key.split(".")
    if len(names) > yaml_files.MOST_DEPTH:
        raise ConfigError(f"unknown key '{key[:40]}…': no key has {len(names)} levels")
    value, _ = yaml_files.parse(text, f"'{override[:80]}'")
    for name in reversed(names):
        value = {name: value}
    return value


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`, for what was stored by earlier versions too."""
    values = _as_stored(_of_method(values, values))
    known = RECIPE.defaults(values)
    _check_keys(values, "the stored configuration", known, RECIPE)
    where = "the stored configuration"
    return _checked(RECIPE, _merge(OmegaConf.structured(known), values, where), where)


def _of_method(values: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under a `choice` of `objective.method`, if it is one: without the keys that this method does not have.
    They belonged to the method that was chosen before: a base recipe's keys, a recipe's under an override."""
    objective, chosen = values.get("objective"), choice.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(chosen, Mapping) or "method" not in chosen:
        return dict(values)
    known = {item.name for item in fields(RECIPE.defaults(choice).objective)}
    left = {key: value for key, value in objective.items() if key in known or not methods_with(f"objective.{key}")}
    return {**values, "objective": left}


def _as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own configuration with the keys that are younger than it at what it was trained with, which is not the
    default of today."""
    engine = values.get("engine")
    return {**values, "engine": {"augment": "device", **engine}} if isinstance(engine, Mapping) else dict(values)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    references = [text for text in _texts(layers) if "${" in text]
    if sum(text.count("${") for text in references) > MOST_REFERENCES or len("".join(references)) > MOST_CHARACTERS:
        raise ConfigError(
            f"more references ${{...}} than {MOST_REFERENCES}, or longer ones than {MOST_CHARACTERS} characters: write "
            "the values themselves"
        )
    with _telling("the configuration"):
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(*layers)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def recipes() -> list[str]:
    """The names of the pretraining recipes that ship with mls."""
    return shipped("pretrain")


def shipped(folder: str) -> list[str]:
    """The names of the YAML files in a folder of configs/."""
    return sorted(file.stem for file in Path(str(files("mls.configs")), folder).glob("*.yaml"))


def of_folder(arguments: Sequence[str]) -> list[str]:
    """A recipe and overrides; a folder of images in the recipe's place stands for the recipe that sizes itself."""
    first = arguments[0]
    if os.sep in first and not os.path.exists(Path(first).expanduser()):
        raise ConfigError(
            f"{first} does not exist: give a folder of images, a YAML file or one of {', '.join(recipes())}"
        )
    if not os.path.isdir(Path(first).expanduser()) or first in recipes():
        return list(arguments)
    if (Path(first).expanduser() / "config.yaml").is_file():
        raise ConfigError(f"{first} is a run, no folder of images: {command('mls pretrain --resume', first)} goes on")
    return [FOR_FOLDERS, override("data.root", first), *arguments[1:]]


def find_recipe(recipe: str | Path) -> Path:
    return find(recipe, RECIPE.folder, RECIPE.word)


def find(name: str | Path, folder: str, word: str) -> Path:
    """The YAML file a user means: a path, or the name of one that ships with mls."""
    path, known = Path(name).expanduser(), shipped(folder)
    advice = f"give a YAML file or a {word}'s name ({', '.join(known)})"
    if os.path.isfile(path):  # unlike Path.is_file it answers for any text
        return path
    if os.path.isdir(path) and str(name) not in known:
        raise ConfigError(f"{path} is a folder: {advice}")
    # A path with folders that is not there is a typing mistake, unless it is the file's own place in the checkout.
    if path.stem in known and path.parent in (Path("."), Path("configs", folder)):
        return Path(str(files("mls.configs")), folder, f"{path.stem}.yaml")
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"there is no file {path}: {advice}")
    raise unknown_name(word, str(name), known)


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file and the line of every key."""
    values, lines = yaml_files.read(path)
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path} must hold sections such as `data:` and `optim:`")
    return values or {}, {key: f"{path.name}:{line}" for key, line in lines.items()}


def with_bases(path: Path, kind: Kind[Any]) -> list[tuple[Path, dict[str, Any], dict[str, str]]]:
    """A file, the one that its `base: NAME` starts from, and so on, each with its values and their lines."""
    found: list[tuple[Path, dict[str, Any], dict[str, str]]] = []
    while True:
        values, origins = load_yaml(path)
        base = values.pop("base", None)
        origins.pop("base", None)
        found.append((path, values, origins))
        if base is None:
            return found
        path = _base_of(path, base, kind)
        if any(os.path.samefile(path, before) for before, _, _ in found):
            circle = " -> ".join([*(before.name for before, _, _ in found), path.name])
            raise ConfigError(f"the bases of {found[0][0]} go in a circle ({circle}): change one `base:`")


def read_yaml(path: Path, kind: Kind[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file of this kind over those of its bases, their keys checked, and where each came from."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file, values, lines in reversed(with_bases(path, kind)):
        if isinstance(values.get("run"), dict) and "recipe" in values["run"]:  # a run's own; 0.1 stored all methods'
            values = _as_stored(_of_method(values, values))
        merged, origins = _merged(_of_method(merged, values), values), origins | lines
        _check_keys(values, file.name, kind.defaults(merged), kind)
    return merged, origins


def _base_of(path: Path, base: Any, kind: Kind[Any]) -> Path:
    if not isinstance(base, str):
        raise ConfigError(f"base of {path.name} is {base}: give the name of one {kind.word}")
    beside = path.parent / f"{base}.yaml"
    # A file may be called like the one that ships with mls and that it starts from.
    return beside if os.path.isfile(beside) and beside != path else find(base, kind.folder, kind.word)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    inside = [origin for name, origin in origins.items() if name == key or name.startswith(f"{key}.")]
    return inside[-1] if inside else "default"


def _check_keys(values: Mapping[Any, Any], where: str, defaults: Any, kind: Kind[Any]) -> None:
    """One sentence with the nearest valid name for a key that does not exist."""
    known = [key for key, _ in flatten(defaults)]
    sections = {key.rpartition(".")[0] for key in known}

    def walk(node: Mapping[Any, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in known:
                continue
            if key not in sections:
                if others := methods_with(key) if isinstance(defaults, Config) else []:
                    raise ConfigError(
                        f"{defaults.objective.method} has no {key} ({where}): it is a key of {', '.join(others)}"
                    )
                raise ConfigError(f"unknown key '{key}' in {where}{_nearest(key, known, sections, kind)}")
            if isinstance(value, Mapping):
                walk(value, f"{key}.")
            elif value is not None:
                raise ConfigError(f"'{key}' in {where} is a section, not a value: set one of its keys")

    walk(values, "")


def _nearest(key: str, known: Sequence[str], sections: set[str], kind: Kind[Any]) -> str:
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    near = same_leaf or get_close_matches(key, [*known, *sorted(sections)], n=1, cutoff=0.6)
    if not near:
        section = key.partition(".")[0]
        near = [name for name in known if get_close_matches(leaf, [name.rpartition(".")[2]], cutoff=0.7)]
        near = [name for name in near if name.startswith(f"{section}.")] or near
    return f": did you mean '{near[0]}'?" if near else f": {kind.keys}"


def _merge(node: Any, values: Mapping[str, Any], where: str) -> Any:
    with _telling(where):
        return OmegaConf.merge(node, values)


def _checked(kind: Kind[Schema], node: Any, where: str) -> Schema:
    """The configuration of its tree, references replaced by what they refer to, within its limits."""
    with _telling(where):
        config = cast(Schema, OmegaConf.to_object(node))
    check_limits(config)
    kind.check(config)
    return config


@contextmanager
def _telling(where: str) -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{where}: {key + ': ' if key and key not in where else ''}{reason}") from None
