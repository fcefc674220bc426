"""`mls config`: what a recipe and overrides resolve to, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mls.errors import ConfigError, command


def show(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG KEY=VALUE", help="A recipe or YAML file, and overrides."),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Compare two configurations or runs instead.")] = False,
) -> None:
    """Print the resolved configuration, with where each value came from.

    Examples:

        mls config

        mls config mls_coco_r50 objective.k=10

        mls config --diff mls_coco_r50 runs/my-run
    """
    from mls.recipes import is_override, recipes, resolve

    positional = list(arguments or [])
    if diff:
        if len(positional) != 2:
            raise ConfigError("--diff compares exactly two: `mls config --diff A B`")
        _print_differences(*positional)
        return
    if not positional:
        print("\n".join(recipes()))
        return
    if is_override(positional[0]):
        raise ConfigError(f"name the configuration before the overrides: {command('mls config CONFIG', positional[0])}")
    resolved = resolve(_of_run(positional[0]), positional[1:])
    from mls.config import flatten

    auto = resolved.config.run.auto  # chosen when a run starts
    shown = {key: "auto" if key in auto else text(value) for key, value in flatten(resolved.config)}
    rows = [(key, value, resolved.origins[key]) for key, value in shown.items() if key != "run.auto"]
    width = max(len(f"{key}: {value}") for key, value, _ in rows)
    for key, value, origin in rows:
        print(f"{f'{key}: {value}':<{width}}  # {origin}")


def _print_differences(first: str, second: str) -> None:
    from mls.config import differences
    from mls.recipes import load_config

    rows = differences(load_config(_of_run(first)), load_config(_of_run(second)))
    if not rows:
        print("no differences")
    for key, before, after in rows:
        print(f"{key}: {text(before)} -> {text(after)}")


def _of_run(name: str) -> str:
    inside = Path(name).expanduser() / "config.yaml"
    return str(inside) if inside.is_file() else name


def text(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
