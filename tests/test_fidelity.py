"""docs/fidelity.md: what it names is there, and it names every loss and every suite."""

import re
from pathlib import Path

from mls.core import losses
from mls.eval import suites

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "fidelity.md").read_text()
NAMED = re.findall(r"`([^`]+)`", TEXT)
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| ")]


def test_every_file_and_test_that_the_page_names_exists() -> None:
    paths = [name for name in NAMED if re.search(r"/\S+\.(py|yaml|md)\b", name)]
    gone = [name for name in paths if not (ROOT / name.partition("::")[0]).is_file()]
    tests = [name.split("::") for name in paths if "::" in name]
    gone += [f"{file}::{test}" for file, test in tests if f"def {test}(" not in (ROOT / file).read_text()]
    assert gone == [] and len(paths) > 100


def test_every_row_has_a_file_and_says_how_it_was_checked() -> None:
    wrong = [row[0] for row in ROWS if len(row) != 4 or (row[0] != "what" and not ("/" in row[1] and row[2]))]
    assert wrong == [] and len(ROWS) > 60


def test_every_loss_and_every_suite_has_a_row() -> None:
    cells = set(re.findall(r"`([^`]+)`", " ".join(" ".join(row[:2]) for row in ROWS)))
    assert [name for name in [*losses.names(), *suites()] if name not in cells] == []
