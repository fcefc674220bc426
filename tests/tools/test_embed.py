"""`mls embed`: one row for each image that can be read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mls.data.decode import UnreadableImage
from mls.errors import ConfigError, DataError
from mls.frozen import features, index
from mls.frozen.neighbours import EmbeddedSource, Embedder, source_from, stored_features
from mls.tools.embed import embed

IMAGES = 120


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (20, 16), (2 * number, 90, 30)).save(folder / f"{number:03d}.png")
    return folder


def test_an_unreadable_image_is_named_and_left_out(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photographs / "007.png").write_bytes(b"broken")
    out = photographs.parent / "x.npz"
    embed("resnet_tiny", str(photographs), out, workers=0)
    told = capsys.readouterr()
    assert "skipped" in told.err
    assert "007.png" in told.err
    assert "119 images, 128 features each (1 that cannot be read are left out)" in told.out
    found = np.load(out)
    assert found["id"].tolist() == [number for number in range(IMAGES) if number != 7]
    assert found["path"][7].endswith("008.png")
    assert found["features"].shape == (119, 128)
    embed("resnet_tiny", str(photographs), out, workers=0)
    assert "007.png" in capsys.readouterr().err  # from the cache, too
    embedded = EmbeddedSource(source_from(str(photographs)), Embedder.of("resnet_tiny"))
    (near,) = embedded.nearest_others([6], IMAGES)  # it is nobody's neighbour
    assert sorted(image for image, _ in near) == [number for number in range(IMAGES) if number not in (6, 7)]


@pytest.fixture
def broken(photographs: Path) -> Callable[[bytes], torch.Tensor]:
    """Decodes as always, but for image 5, which is out of reach."""
    reach, gone = features.decode, (photographs / "005.png").read_bytes()

    def decode(data: bytes) -> torch.Tensor:
        if data == gone:
            raise UnreadableImage("the disk is gone")
        return reach(data)

    return decode


def test_an_image_that_was_out_of_reach_is_read_again(
    photographs: Path, broken: Callable[[bytes], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, embedder, reach = source_from(str(photographs)), Embedder.of("resnet_tiny"), features.decode
    monkeypatch.setattr(features, "decode", broken)
    before, readable = stored_features(source, embedder, workers=0)
    assert readable == [*range(5), *range(6, IMAGES)] and not before.features[5].any()
    monkeypatch.setattr(features, "decode", reach)
    after, readable = stored_features(source, embedder, workers=0)
    assert after.folder == before.folder and readable == [*range(IMAGES)] and after.features[5].any()
    assert torch.equal(after.features[4], before.features[4])


def test_the_kept_index_finds_an_image_that_was_out_of_reach(
    photographs: Path, broken: Callable[[bytes], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "EXACT_UP_TO", 100)
    source, embedder = source_from(str(photographs)), Embedder.of("resnet_tiny", 32)
    embedded = lambda: EmbeddedSource(source, embedder)
    with monkeypatch.context() as patch:
        patch.setattr(features, "decode", broken)
        assert embedded().broken == {5}
        patch.setattr(index, "_trained", lambda *_: pytest.fail("the index is built again"))
        assert embedded().broken == {5}
    after = embedded()
    (found,) = after.nearest(after.cached.features[5:6], 1)
    assert found[0][0] == 5


def test_many_unreadable_images_and_unknown_formats_are_refused(photographs: Path) -> None:
    for number in (1, 2):
        (photographs / f"00{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 120 images cannot be read"):
        embed("resnet_tiny", str(photographs), photographs.parent / "x.npz", workers=0)
    assert not (photographs.parent / "x.npz").exists()
    with pytest.raises(ConfigError, match=r"name it x.parquet or x.npz"):
        embed("resnet_tiny", str(photographs), Path("x.csv"), workers=0)


@pytest.mark.parametrize("dense", [False, True])
def test_parquet_holds_what_npz_holds(photographs: Path, dense: bool) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from mls.config import AugmentConfig
    from mls.models import save_backbone
    from mls.models.backbones import build

    save_backbone(photographs.parent, build("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    weights = str(photographs.parent / "backbone.safetensors")
    for name in ("x.npz", "x.parquet"):
        embed(weights, str(photographs), photographs.parent / name, dense, workers=0)
    table, arrays = parquet.read_table(photographs.parent / "x.parquet"), np.load(photographs.parent / "x.npz")
    assert table["path"].to_pylist() == arrays["path"].tolist()
    kind, shape = (np.float16, (4, 4, 128)) if dense else (np.float32, (128,))
    assert arrays["features"].shape == (IMAGES, *shape)
    assert table.schema.metadata[b"shape"].decode() == ",".join(map(str, shape))
    assert np.array_equal(np.array(table["features"].to_pylist(), kind), arrays["features"].reshape(IMAGES, -1))
    if dense:  # the mean over places is the pooled feature
        embed(weights, str(photographs), photographs.parent / "pooled.npz", workers=0)
        pooled = np.load(photographs.parent / "pooled.npz")["features"]
        assert np.allclose(arrays["features"].astype(np.float32).mean((1, 2)), pooled, atol=2e-3)
