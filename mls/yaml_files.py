"""The one reader of YAML: recipes, protocols, suites, profiles, overrides' values, other programs' configurations.
What a text holds is bounded before anything is made of it, no key hides another, and a mistake is one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mls.errors import ConfigError, reason

MOST_BYTES = 1 << 18
MOST_DEPTH = 24
MOST_NODES = 2000  # with each alias counted as what it stands for: eight anchors of eight aliases are 16 million

_FLOAT = r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[0-9][0-9_]*e[-+]?[0-9]+|\.inf)|\.nan"
_NUMBERS = {
    "float": re.compile(f"^(?:{_FLOAT})$", re.IGNORECASE),
    "int": re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0b[01_]+)$"),
}


class _Numbers:
    """1e-4 is a number. YAML 1.1 makes eight of 010, ninety of 1:30 and a date of 2026-01-01: here they stay text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as yaml names it)


for _first in "-+0123456789.~nNtTfFyYoO=<":
    _kept = yaml.SafeLoader.yaml_implicit_resolvers.get(_first, [])
    _others = [(tag, pattern) for tag, pattern in _kept if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
    _new = [(f"tag:yaml.org,2002:{name}", pattern) for name, pattern in _NUMBERS.items() if _first in "-+0123456789."]
    _Numbers.yaml_implicit_resolvers[_first] = _others + _new
_Numbers.yaml_implicit_resolvers[""] = yaml.SafeLoader.yaml_implicit_resolvers[""]


_Fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Numbers, _Fastest):
    pass


class _Dumper(_Numbers, yaml.SafeDumper):
    pass


def dump(values: Any) -> str:
    """Text that `parse` gives back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read(path: Path, numbered: bool = False) -> tuple[Any, dict[str, int]]:
    """What a file holds, and the line of every dotted key. `numbered`: a key may be a whole number, such as a class."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not UTF-8 text (line {line}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}") from None
    return parse(text, str(path), numbered)


def parse(text: str, where: str, numbered: bool = False) -> tuple[Any, dict[str, int]]:
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{where} is longer than {MOST_BYTES:,} characters: no configuration is")
    lines: dict[str, int] = {}
    try:
        _check_size(text, where)
        loader: Any = _Loader(text)  # type: ignore[call-arg]
        try:
            node = loader.get_single_node()
            _note_lines(loader, node, where, "", lines, str | int if numbered else str)
            return None if node is None else loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{where} is not valid YAML (line {mark.line + 1 if mark else 1}): {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}") from None


def _check_size(text: str, where: str) -> None:
    """Refuse what would be too deep or too large once every alias stands for its anchor's content, by the parser's
    events alone."""
    sizes: dict[str | None, int] = {}  # of anchors that are complete
    open_nodes: list[tuple[str | None, int]] = []  # the anchor and, before it, the count
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        here = f"{where} (line {event.start_mark.line + 1})"
        if isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _ in open_nodes):
                    raise ConfigError(f"{here}: *{event.anchor} stands within &{event.anchor}, which would never end")
                count += sizes.get(event.anchor, 0)
            elif (tag := getattr(event, "tag", None)) not in (None, "tag:yaml.org,2002:str"):
                raise ConfigError(f"{here}: the tag {tag} is not read: leave it out")
            elif isinstance(event, yaml.ScalarEvent):
                if event.value == "???" or "\0" in event.value:
                    raise ConfigError(f"{here}: {event.value[:40]!r} is no value: leave the key out, or give one")
                sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = count - before
        if count > MOST_NODES or len(open_nodes) > MOST_DEPTH:
            most = f"{MOST_NODES:,} values" if count > MOST_NODES else f"{MOST_DEPTH} levels"
            raise ConfigError(f"{here}: more than {most}: no configuration has so many")


def _note_lines(
    loader: Any, node: yaml.Node | None, where: str, prefix: str, lines: dict[str, int], kinds: Any
) -> None:
    """The line of every key that holds a value; a key twice in one place would hide the first."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _note_lines(
                loader, item, where, f"{prefix}[].", {}, kinds
            )  # a list is one value, its mappings have keys too
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        merges = key.tag == "tag:yaml.org,2002:merge"
        name = "<<" if merges else loader.construct_object(key) if isinstance(key, yaml.ScalarNode) else None
        if not isinstance(name, kinds) or isinstance(name, bool):
            raise ConfigError(f"{where} (line {line}): a key is a word; put one such as yes, null or 1 in quotes")
        if name in seen:
            raise ConfigError(f"{where} has {prefix}{name} twice (lines {seen[name]} and {line}): keep one of them")
        seen[name] = line
        if merges:  # what is merged has the lines of where it was written
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _note_lines(loader, merged, where, prefix, inner := {}, kinds)
                lines |= {one: at for one, at in inner.items() if one not in lines}
        elif isinstance(value, yaml.MappingNode):
            _note_lines(loader, value, where, f"{prefix}{name}.", lines, kinds)
        else:
            lines[f"{prefix}{name}"] = line
            _note_lines(loader, value, where, f"{prefix}{name}", {}, kinds)
