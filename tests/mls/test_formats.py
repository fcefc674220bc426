"""Pictures that are read only where their library is installed, or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mls.config import DataConfig
from mls.data.check import check
from mls.data.decode import decode
from mls.data.sources import build_source

WITHOUT = """
import sys
sys.modules["pillow_heif"] = None
import importlib.util as u
found = u.find_spec
u.find_spec = lambda n, *a: None if n == "pillow_heif" else found(n, *a)
from mls.config import DataConfig
from mls.data.sources import build_source
from mls.data.check import check
source = build_source(DataConfig(root=sys.argv[1]))
from mls.data.formats import missed
print(len(source), missed(source.ignored), len(check(source).found["ignored"]))
"""


def test_pictures_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.HEIC", "sub/c.heic", "d.psd", "notes.txt", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    told = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == (
        '1 ignored: 2 .heic (pip install "mls[heif]"), 1 .psd (convert them to JPEG or PNG) 3'
    )


def test_heic_is_read_where_its_library_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (32, 24), (200, 10, 10)).save(tmp_path / "a.heic", format="HEIF")
    (tmp_path / "b.heic").write_bytes(b"broken")
    source = build_source(DataConfig(root=str(tmp_path)))
    assert len(source) == 2
    assert not source.ignored  # type: ignore[attr-defined]
    assert decode(source.read(0)).shape == (3, 24, 32)
    assert list(check(source).found) == ["no image"]
