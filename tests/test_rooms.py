"""The house: a room imports only from floors below it (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_NOT = {
    "mls": ("mls.eval", "mls.slurm", "mls.tools"),
    "eval": ("mls.slurm", "mls.tools"),
    "slurm": ("mls.eval", "mls.tools"),
    "tools": (),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", MAY_NOT)
def test_room_imports_only_from_floors_below(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        for room_above in MAY_NOT[room]
        if name == room_above or name.startswith(f"{room_above}.")
    ]
    assert wrong == []


def test_every_file_opens_with_what_lives_there() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for room in MAY_NOT
        for path in (ROOT / room).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_file_is_called_utils() -> None:
    vague = {"utils.py", "common.py", "misc.py", "helpers.py"}
    assert [path for room in MAY_NOT for path in (ROOT / room).rglob("*.py") if path.name in vague] == []
