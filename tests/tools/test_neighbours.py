"""`mls neighbours` and `mls leakcheck` on photographs and scenes, as a user calls them."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps

import mls
from mls.errors import DataError
from mls.files import place_for
from mls.frozen.neighbours import EmbeddedSource, Embedder, InMemorySource, source_from
from mls.tools.bench.input import write_photographs

Call = Callable[..., subprocess.CompletedProcess[str]]
LEAKED = (3, 11, 20)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("data") / "a", 30, (320, 240))


@pytest.fixture
def evaluation(tmp_path: Path, photographs: Path) -> Path:
    """Three copies, scaled, compressed and brightened, among pictures that only look like photographs."""
    folder = tmp_path / "b"
    folder.mkdir()
    files = sorted(photographs.iterdir())
    for i in LEAKED:
        ImageOps.autocontrast(Image.open(files[i]).resize((200, 150))).save(folder / f"copy{i}.jpg", quality=60)
    for i in range(8):
        Image.effect_noise((80, 60), 40 + i).convert("RGB").save(folder / f"noise{i}.png")
    return folder


def test_leakcheck_finds_the_copies_and_nothing_else(
    photographs: Path, evaluation: Path, tmp_path: Path, mls_command: Call
) -> None:
    arguments = [str(photographs), str(evaluation), "scenes:test", "--out", str(tmp_path / "out")]
    done = mls_command("leakcheck", *arguments, MLS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "leakcheck.json").read_text())
    pairs = report["second"][str(evaluation)]["pairs"]
    assert sorted(pair["first"] for pair in pairs) == list(LEAKED)
    for pair in pairs:
        assert pair["names"][1].endswith(f"copy{pair['first']}.jpg")
        assert pair["cosine"] >= report["threshold"]
    assert report["second"]["scenes:test"] == {"images": 2000, "pairs": []}
    assert re.search(r"9\d% of altered copies lie above it", done.stdout)
    (picture,) = (tmp_path / "out").glob("*.png")
    with Image.open(picture) as drawn:
        assert drawn.height > 3 * 96


def test_features_are_taken_from_the_cache_until_an_image_changes(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    embedded = lambda: EmbeddedSource(source_from(str(evaluation)), Embedder.of(None))
    first = embedded().cached.folder
    written = (first / "features.npy").stat().st_mtime_ns
    assert embedded().cached.folder == first
    assert (first / "features.npy").stat().st_mtime_ns == written
    Image.new("RGB", (80, 60)).save(evaluation / "noise0.png")
    assert embedded().cached.folder != first


def test_neighbours_of_a_file_and_of_the_runs_own_images(
    photographs: Path, evaluation: Path, tmp_path: Path, mls_command: Call, tiny: list[str]
) -> None:
    run = mls.pretrain(
        mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1", "data.scenes.count=64"]), quiet=True
    )
    cache, picture = {"MLS_CACHE": str(tmp_path / "cache")}, str(tmp_path / "found.png")
    query = str(evaluation / "copy11.jpg")
    more = ["--dataset", str(photographs), "--query", query, "-k", "4", "--out", picture]
    done = mls_command("neighbours", str(run.path), *more, **cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == query
    assert len(lines) == 6
    cosines = [float(re.match(r"  (\d\.\d{3})  /", line)[1]) for line in lines[1:5]]
    assert cosines == sorted(cosines, reverse=True)
    assert lines[1].endswith("00011.jpg")
    done = mls_command("neighbours", str(run.path), "-k", "3", "--out", picture, **cache)
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stdout.splitlines() if line.startswith("scene ")]
    assert len(asked) == 6
    for block in done.stdout.split("scene ")[1:]:
        assert len(set(re.findall(r"\d+ of the train", block))) == len(re.findall(r"\d+ of the train", block))

    done = mls_command("neighbours", str(run.path), "--figure", "--out", picture, **cache)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as whole, Image.open(tmp_path / "found-crops.png") as crops:
        assert whole.height > 60 * 160 and 60 * 96 < crops.height < whole.height
    done = mls_command("neighbours", str(run.path), "--figure", "--query", query)
    assert done.returncode == 2 and "--figure shows crops of the run's own images: leave out --query" in done.stderr


def test_files_go_into_the_run_or_the_folder_of_runs_and_elsewhere_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert place_for("x.png", None, tmp_path / "run") == tmp_path / "run" / "x.png"
    assert place_for("x.png", None, "resnet_tiny") == place_for("x.png", None) == tmp_path / "runs" / "x.png"
    assert place_for("x.png", Path("deep/y.png"), tmp_path / "run") == Path("deep/y.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "run", "runs"]


def test_mistakes_are_one_sentence(mls_command: Call) -> None:
    done = mls_command("neighbours", "resnet_tiny")
    assert done.returncode == 2
    assert "resnet_tiny is no run folder, so it does not say where to look: name the images" in done.stderr
    with pytest.raises(DataError, match=r"nowhere.jpg cannot be read \(No such file or directory\): give the path"):
        InMemorySource.of_files([Path("nowhere.jpg")])
