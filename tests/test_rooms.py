"""The house: a package imports only from floors below it (docs/architecture.md), and functions stay short."""

import ast
import builtins
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_NOT = {
    "mls": ("mls.eval", "mls.slurm", "mls.tools"),
    "eval": ("mls.slurm", "mls.tools"),
    "slurm": ("mls.eval", "mls.tools"),
    "tools": (),
}
# Inside mls/, from the ground up: a module imports from its own floor and those below.
FLOORS: list[set[str]] = [
    {"errors", "chunks", "signals", "progress"},
    {"files", "card", "locks", "streams", "distributed", "results", "tables", "plugins", "yaml_files"},
    {"config", "recipes"},
    {"models", "data"},
    {"core"},
    {"dictionary", "losses", "matching", "methods"},  # public names of core
    {"frozen"},
    {"monitor"},
    {"engine"},
    {"frameworks"},
    {"exporting"},
]
MOST_LINES, MOST_PARAMETERS = 50, 8  # of a function
LONGER = {  # known functions over a limit
    "tools/pretrain.py pretrain",
    "tools/submit/evaluate.py evaluate",
    "tools/submit/pretrain.py pretrain",
}


def running(path: Path) -> ast.Module:
    """The syntax tree without what only type checkers read."""

    class WithoutTypes(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return WithoutTypes().visit(ast.parse(path.read_text()))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(running(path)):
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


def test_inside_mls_a_module_imports_only_from_floors_below() -> None:
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = set()
    for path in (ROOT / "mls").rglob("*.py"):
        own = path.relative_to(ROOT / "mls").with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in floor_of, f"{own} has no floor in FLOORS"
        for name in imported_modules(path):
            part = name.partition(".")[2].partition(".")[0]
            if floor_of.get(part, -1) > floor_of[own]:
                upward.add((str(path.relative_to(ROOT)), name))
    assert upward == set()


def imported_modules(path: Path) -> set[str]:
    """The modules of mls that a file imports, also inside functions."""
    tree = running(path)
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {node.module for node in froms if node.module != "mls"}
    names |= {f"mls.{alias.name}" for node in froms if node.module == "mls" for alias in node.names}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in names if name.startswith("mls.")}


def test_functions_are_short_and_have_few_parameters() -> None:
    over = {
        f"{path.relative_to(ROOT)} {function.name}"
        for path, function in functions()
        if function.end_lineno - function.lineno >= MOST_LINES or parameters(function) > MOST_PARAMETERS
    }
    assert over == LONGER


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for room in MAY_NOT:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield path, node


def parameters(function: ast.FunctionDef) -> int:
    """Without self, cls, *args and **kwargs."""
    parts = function.args
    return len([one for one in (*parts.posonlyargs, *parts.args, *parts.kwonlyargs) if one.arg not in ("self", "cls")])


@pytest.mark.parametrize("room", [*MAY_NOT, "examples", "tests"])
def test_every_name_that_a_function_uses_is_defined(room: str) -> None:
    """Neither the linter nor the type checker looks: to them jaxtyping's dimensions are names that nobody defines."""
    known = {*dir(builtins), "__file__", "__name__"}

    def undefined(table: symtable.SymbolTable, defined: set[str]) -> Iterator[str]:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and symbol.is_global() and symbol.get_name() not in defined:
                yield symbol.get_name()
        for child in table.get_children():
            yield from undefined(child, defined)

    found = []
    for file in (ROOT / room).rglob("*.py"):
        module = symtable.symtable(file.read_text(), str(file), "exec")
        defined = known | {one.get_name() for one in module.get_symbols() if one.is_assigned() or one.is_imported()}
        found += [f"{file.relative_to(ROOT)}: {name}" for name in undefined(module, defined)]
    assert found == []
