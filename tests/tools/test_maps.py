"""`mls maps`: components of the features of all places as colours, for one network and for two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mls.errors import ConfigError, DataError
from mls.frozen.map_picture import SIDE, coloured
from mls.tools.maps import maps


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Green below, grey noise above, in two formats."""
    (tmp_path / "photographs").mkdir()
    draws = np.random.default_rng(0)
    for number, (height, width) in enumerate([(64, 96), (96, 64), (64, 96)]):
        pixels = draws.integers(0, 60, (height, width, 1)).repeat(3, 2).astype(np.uint8)
        pixels[height // 2 :] = (20, 200, 20)
        Image.fromarray(pixels).save(tmp_path / "photographs" / f"{number}.png")
    (tmp_path / "photographs" / "broken.png").write_bytes(b"")
    return tmp_path / "photographs"


def test_two_networks_are_drawn_side_by_side(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "maps.png"
    maps(["resnet_tiny", "resnet_tiny"], str(photographs), count=4, size=64, out=file)
    said = capsys.readouterr()
    assert "skipped" in said.err and "broken.png" in said.err
    assert "three components have" in said.out and "of the first's" in said.out and str(file) in said.out
    picture = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert picture.shape[1] > 3 * SIDE
    map_of_first = picture[34 : 34 + SIDE * 64 // 96, 6 + SIDE + 6 : 6 + 2 * SIDE + 6]
    above, below = map_of_first[20:50, 40:160], map_of_first[90:120, 40:160]
    assert np.abs(above.mean((0, 1)) - below.mean((0, 1))).max() > 50  # what differs has another colour


def test_a_colour_means_the_same_in_all_images_and_in_networks_that_differ_by_a_rotation() -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 5, 7, generator=draws) * torch.linspace(2, 0.1, 16)[:, None, None]
    first = coloured(features)
    turned = torch.linalg.qr(torch.randn(16, 16, generator=draws)).Q
    second = coloured(torch.einsum("ndhw,de->nehw", features, turned), like=first)
    assert second.agreement == pytest.approx(1, abs=1e-6)
    assert int((second.pixels().int() - first.pixels().int()).abs().max()) <= 1
    other = coloured(torch.randn(3, 16, 9, 4, generator=draws), like=first)  # another grid, and nothing in common
    assert other.agreement is not None and other.agreement < 0.3
    same = torch.cat([features[:1], features[:1]])
    assert coloured(torch.randn(1, 16, 1, 2)).pixels().shape == (1, 1, 2, 3)
    assert torch.equal(coloured(same).pixels()[0], coloured(same).pixels()[1])


def test_mistakes_are_one_sentence(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="x.gif names no format of a picture"):
        maps(["resnet_tiny"], str(photographs), out=tmp_path / "x.gif")
    with pytest.raises(ConfigError, match="3 networks were named"):
        maps(["resnet_tiny"] * 3, str(photographs), out=tmp_path / "x.png")
    with pytest.raises(ConfigError, match="name the images with --images"):
        maps(["resnet_tiny"], out=tmp_path / "x.png")
    for file in photographs.glob("[0-9].png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="2 of 4 images cannot be read"):
        maps(["resnet_tiny"], str(photographs), out=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
