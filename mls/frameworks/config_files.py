"""Reads the frameworks' configuration files without running them: a YAML with its `_BASE_`, or the plain assignments of
a Python file. Files of others are read like our own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mls import yaml_files
from mls.errors import ConfigError

MOST_BASES = 16


def read_yaml(path: Path, above: int = 0) -> dict[str, Any]:
    """A detectron2 configuration, merged over the one that its `_BASE_` names."""
    content, _ = yaml_files.read(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no detectron2 configuration: it holds no sections")
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    if not isinstance(base, str) or above == MOST_BASES:
        raise ConfigError(f"{path}: _BASE_ is {base}, and must name another file, at most {MOST_BASES} in a row")
    return merged(read_yaml(path.parent / base, above + 1), content)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def read_python(path: Path) -> dict[str, Any]:
    """The assignments of a Python file whose values are plain: numbers, text, lists, dict(...), earlier names."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    values: dict[str, Any] = {}
    for line in tree.body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            try:
                values[line.targets[0].id] = _value(line.value, values)
            except ValueError:
                continue  # computed: none of the settings that features depend on
    return values


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _value(word.value, names) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key, names): _value(value, names) for key, value in pairs if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, names) for item in node.elts]
    return ast.literal_eval(node)
