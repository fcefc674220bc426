"""The files around the code: they agree with each other, and their links lead somewhere."""

import ast
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import mls
import mls.eval
from mls.core.methods import names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_version_is_the_same_everywhere(mls_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (released, *_) = re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    cited = re.search(r"^version: (.*)$", citation, re.M), re.search(r"^date-released: (.*)$", citation, re.M)
    assert [found.group(1) for found in cited if found] == list(released)
    assert released[0] == mls.__version__
    assert mls_command("--version").stdout == f"mls {mls.__version__}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        page.name for page in ROOT.glob("docs/*.md") if f"({page.name})" not in index and page.name != "README.md"
    ] == []


@pytest.mark.parametrize("package", [mls, mls.eval], ids=["mls", "mls.eval"])
def test_an_editor_sees_the_names_that_are_fetched_later(package: object) -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(package._HOME) | set(getattr(package, "_PARTS", ()))
    for name in seen:
        assert getattr(package, name) is not None
    assert seen <= set(package.__all__)


def test_the_package_holds_its_rooms_and_its_types() -> None:
    for room in ("eval", "slurm", "tools", "configs"):
        assert (ROOT / "mls" / room).resolve() == ROOT / room
    assert (ROOT / "mls" / "py.typed").is_file()
    assert {entry.value for entry in entry_points(group="console_scripts") if entry.name == "mls"} == {
        "mls.tools.cli:main"
    }


def test_the_page_of_methods_has_them_all() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == names()
