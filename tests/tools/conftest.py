"""Shared by the tests of the papers' analyses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mls.tools.analyses import Finding, Study

TINY = ("data.scenes.count=128", "data.scenes.test_count=64", "training.epochs=2")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study("spml_scenes", TINY, None, 0, tmp_path_factory.mktemp("analyses"))


@pytest.fixture
def picture_bytes(tmp_path: Path) -> Callable[[Finding], int]:
    """The size of the file of a finding's picture."""

    def save(finding: Finding) -> int:
        finding.figure.savefig(tmp_path / "picture.png")
        return (tmp_path / "picture.png").stat().st_size

    return save
