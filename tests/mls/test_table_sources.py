"""Parquet files and data sets of Hugging Face's library: what is read, in which order, in how much memory; and that a
run on them resumes exactly."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mls
from mls.config import DataConfig
from mls.data.decode import decode
from mls.data.sources import build_source, hash_of_images
from mls.errors import DataError, Stopped
from mls.recipes import load_config

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT, SIDE = 70, 16


def encoded(number: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, group: int = 10) -> Path:
    """Two files, as `datasets` writes them: a struct of bytes and path, and the names of the classes in the schema."""
    folder.mkdir()
    names = b'{"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}'
    for file, numbers in (("a", range(40)), ("b", range(40, COUNT))):
        images = pa.array([{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers])
        table = pa.table({"id": pa.array(list(numbers)), "image": images, "label": [number % 2 for number in numbers]})
        table = table.replace_schema_metadata({b"huggingface": names})
        parquet.write_table(table, folder / f"{file}.parquet", row_group_size=group)
    return folder


def source(root: Path, **more: Any) -> Any:
    return build_source(DataConfig(root=str(root), **more))


def test_every_row_is_an_image_in_the_order_of_the_files(tmp_path: Path) -> None:
    found = source(write(tmp_path / "data"))
    assert len(found) == COUNT and found.class_names == ["ant", "bee"] and found.name == "parquet:a.parquet+1"
    assert [found.read(number) for number in (0, 39, 40, 69)] == [encoded(number) for number in (0, 39, 40, 69)]
    assert found.describe(41) == f"{tmp_path}/data/b.parquet:1"
    assert found.labels.argmax(1).tolist() == [number % 2 for number in range(COUNT)]
    whole = hash_of_images(found, torch.arange(10))
    file = tmp_path / "data" / "b.parquet"  # of which no image is sampled here
    rows = parquet.read_table(file).to_pydict() | {"label": [0] * 30}
    parquet.write_table(pa.table(rows), file, row_group_size=10)
    assert hash_of_images(source(tmp_path / "data"), torch.arange(10)) == whole
    rows["image"][5]["bytes"] += b" "
    parquet.write_table(pa.table(rows), file, row_group_size=10)
    assert hash_of_images(source(tmp_path / "data"), torch.arange(10)) != whole
    few = source(tmp_path / "data" / "a.parquet", limit=25)
    assert len(few) == 25 and sorted(few.order(0, 1)) == list(range(25)) and len(few.labels) == 25


def test_an_epoch_reads_each_row_group_once_and_keeps_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data")
    size = 10 * len(encoded(0))
    monkeypatch.setattr("mls.data.parquet.HELD", int(2.5 * size))
    found = source(tmp_path / "data")
    order = found.order(seed=3, epoch=2)
    assert sorted(order) == list(range(COUNT)) and order.tolist() == source(tmp_path / "data").order(3, 2).tolist()
    assert order.tolist() != found.order(3, 3).tolist() != found.order(4, 3).tolist()
    read, reads, held = found._opened(0).__class__.read_row_group, list[int](), list[int]()
    monkeypatch.setattr(
        found._opened(0).__class__, "read_row_group", lambda *a, **k: (reads.append(1), read(*a, **k))[1]
    )
    for number in order.tolist():
        assert found.read(number) == encoded(number)
        held.append(sum(rows.nbytes for rows in found._held.values()))
    assert len(reads) == 7 and max(held) <= 2.5 * size
    again = pickle.loads(pickle.dumps(found))  # as a worker gets it: without what is open or held
    assert not again._held and again.read(5) == encoded(5)


def test_damaged_files_rows_and_columns_are_one_sentence_each(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="bad.parquet is no whole .parquet file .*: write it again"):
        source(tmp_path / "bad.parquet")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"has no column of image bytes \(columns: text\): write encoded images"):
        source(tmp_path / "text.parquet")
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="has no rows: name files with images"):
        source(tmp_path / "none.parquet")
    parquet.write_table(pa.table({"image": pa.array([None, encoded(1)], pa.binary())}), tmp_path / "gap.parquet")
    gap = source(tmp_path / "gap.parquet")
    with pytest.raises(OSError, match="the row has no bytes"):
        gap.read(0)
    assert decode(gap.read(1)).shape == (3, SIDE, SIDE) and gap.class_names is None
    parquet.write_table(pa.table({"image": [encoded(1)], "label": [2_000_000_000]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="has 2000000000 in its column label, which is no class number: rename that"):
        source(tmp_path / "ids.parquet")
    with pytest.raises(DataError, match=r"no .parquet files under .*: point data.root"):
        (tmp_path / "empty").mkdir()
        source(tmp_path / "empty", source="parquet")


def test_a_run_on_parquet_resumes_exactly(tmp_path: Path, tiny: list[str]) -> None:
    overrides = [
        *tiny,
        f"data.root={write(tmp_path / 'data')}",
        "data.source=auto",
        "optim.epochs=2",
        "augment.size=16",
    ]
    overrides += ["monitor.knn_every_epochs=0", "monitor.linear_every_epochs=0", "monitor.moments=0"]
    overrides += ["data.batch_size=16", "monitor.log_every=1"]
    whole = mls.pretrain(load_config("mls_scenes_tiny", [*overrides, "run.name=whole"]), quiet=True)
    with pytest.raises(Stopped):
        mls.pretrain(load_config("mls_scenes_tiny", [*overrides, "run.name=cut", "engine.max_steps=5"]), quiet=True)
    cut = mls.resume(whole.path.with_name("cut"), ["engine.max_steps=null"], quiet=True)
    losses = [[row["loss"] for row in run.metrics()] for run in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_saved_data_set_of_hugging_face_is_read_in_place(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"img": [{"bytes": encoded(number), "path": None} for number in range(12)], "label": [0, 1] * 6}
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    saved.save_to_disk(str(tmp_path / "saved"))
    found = source(tmp_path / "saved")
    assert len(found) == 12 and found.class_names == ["ant", "bee"]
    assert decode(found.read(7)).tolist() == decode(encoded(7)).tolist()
    assert sorted(found.order(0, 1)) == list(range(12)) and found.labels[:, 1].tolist() == [0, 1] * 6
    assert len(source(tmp_path / "saved", limit=5)) == 5
    rows["img"][0]["bytes"] = encoded(99)
    datasets.Dataset.from_dict(rows, features=features, split="train").save_to_disk(str(tmp_path / "more" / "saved"))
    assert source(tmp_path / "more" / "saved").name == found.name
    one = torch.tensor([1])
    assert hash_of_images(source(tmp_path / "more" / "saved"), one) != hash_of_images(found, one)
    assert hash_of_images(source(tmp_path / "saved"), one) == hash_of_images(found, one)
    rows["label"][3] = None
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "gaps"))
    assert source(tmp_path / "gaps").labels is None
    with pytest.raises(DataError, match=r"has no split test: set data.annotations to one of those there \(train\)"):
        source(tmp_path / "saved", annotations="test")
    with pytest.raises(DataError, match="holds one table of the split train: leave out data.annotations=test"):
        source(tmp_path / "more" / "saved", annotations="test")
    with pytest.raises(DataError, match="cannot be loaded by datasets .*: name a folder that save_to_disk wrote"):
        source(tmp_path / "nothing", source="huggingface")


def test_a_published_repository_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = {"img": [{"bytes": encoded(number), "path": None} for number in numbers]}
        rows["label"] = [number % 2 for number in numbers]
        file = tmp_path / "somebody" / "insects" / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    train, test = (source(Path("somebody/insects"), source="huggingface", annotations=one) for one in (None, "test"))
    assert (len(train), len(test), train.name, train.class_names) == (8, 4, "huggingface:insects", ["ant", "bee"])
    for image, number in ((train.read(7), 7), (test.read(0), 8)):
        assert torch.equal(decode(image), decode(encoded(number)))
