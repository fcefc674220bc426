"""Own labels: tables and lists, what cells mean, parts, hostile files, and images that cannot be read."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mls.errors import ConfigError, DataError
from mls.eval import load_protocol
from mls.eval.cells import evaluation
from mls.eval.data.table import BLANK, OwnLabels, by_hash, read, read_table
from mls.eval.frozen import run as run_probe
from mls.eval.protocol import fingerprint
from mls.eval.splits import load

HEADER = "image,cat,dog\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for number in range(10):
        file = root / ("ab"[number % 2]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (25 * number, 90, 30)).save(file)
    return root


def paths(number: int) -> str:
    return f"{'ab'[number % 2]}/{number}.png"


def write(folder: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def truth_of(file: Path, **how: object) -> dict[str, list[int]]:
    data, _ = read(None, OwnLabels(str(file), **how))  # pyright: ignore[reportArgumentType]
    return {
        images.describe(row).rpartition("images/")[2]: images.truth[row].tolist()
        for images in (data.train, data.test, data.val)
        if images is not None
        for row in range(len(images))
    }


SPLIT = "image,split,cat,dog\na/0.png,train,1,0\nb/1.png,test,0,1\na/2.png,test,1,\n"


def test_a_zero_is_absent_unless_minus_one_says_that_and_a_blank_is_unknown(folder: Path) -> None:
    file = write(folder, SPLIT)
    assert truth_of(file) == {"a/0.png": [1, -1], "b/1.png": [-1, 1], "a/2.png": [1, 0]}
    assert truth_of(file, blank="absent")["a/2.png"] == [1, -1]
    assert "0 is read as absent, since no -1 stands" in read(None, OwnLabels(str(file)))[1]
    signed = write(folder, SPLIT.replace("test,0,1", "test,-1,1").replace("test,1,", "test,1,0"))
    assert truth_of(signed) == {"a/0.png": [1, 0], "b/1.png": [-1, 1], "a/2.png": [1, 0]}
    assert truth_of(signed, zero="absent")["a/2.png"] == [1, -1]


def test_wide_long_and_parquet_tables_say_the_same(folder: Path) -> None:
    long = "class,image,split,value\ncat,a/0.png,train,1\ndog,a/0.png,train,0\ncat,b/1.png,test,0\n"
    long += "dog,b/1.png,test,1.0\ncat,./a/2.png,test,True\n"
    wide, same = write(folder, SPLIT), write(folder, long, "long.csv")
    assert truth_of(same) == truth_of(wide)
    spaced = write(folder, b"\xef\xbb\xbf" + SPLIT.replace(",", ";").replace("\n", "\r\n").encode(), "excel.csv")
    assert truth_of(spaced) == truth_of(wide)
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {"file": ["a/0.png", "b/1.png", "a/2.png"], "split": ["train", "test", "test"]}
    columns |= {"cat": [1.0, 0.0, 1.0], "dog": [0.0, 1.0, None]}
    parquet.write_table(pa.table(columns), folder / "labels.parquet")
    assert truth_of(folder / "labels.parquet") == truth_of(wide)


def test_a_class_for_each_image_is_top1_and_several_are_tags(folder: Path) -> None:
    one = write(folder, "image,class\n" + "".join(f"{paths(n)},{'ab'[n % 2]}\n" for n in range(10)))
    data, _ = read(None, OwnLabels(str(one)))
    assert data.train.single_label
    assert data.train.class_names == ["a", "b"]
    for part in (data.train, data.test):
        assert [part.class_names[n] for n in part.truth] == [
            Path(part.describe(n)).parent.name for n in range(len(part))
        ]
    tags = read_table(write(folder, "image,class\na/0.png,x\na/0.png,y\nb/1.png,x\n"), folder)
    assert tags.cells.tolist() == [[1, 1], [1, BLANK]]
    lines = (f"{paths(n)},{name}\n" for n in range(10) for name in (("x", "y") if n % 2 else ("z",)))
    chosen, _ = read(None, OwnLabels(str(write(folder, "image,class\n" + "".join(lines))), classes=["x", "y"]))
    assert not chosen.train.single_label, "as many labels as images, two of some and none of others"


def test_the_parts_follow_seed_and_name_and_stay_when_images_are_added() -> None:
    names = [b"%d.png" % number for number in range(1000)]
    parts = by_hash(names, 0)
    assert parts.count("test") == pytest.approx(200, abs=40)
    assert all(by_hash(names[:count], 0) == parts[:count] for count in (50, 500))
    assert by_hash(names, 1) != parts
    assert all(set(by_hash(names[:2], seed)) == {"train", "test"} for seed in range(20))


def _measurable(read_parts: object) -> bool:
    try:
        read_parts()  # type: ignore[operator]
    except DataError:
        return False
    return True


def test_answers_stand_above_the_table_and_blank_ones_change_nothing(folder: Path) -> None:
    file = write(folder, SPLIT)
    answers = "image,class,value\na/0.png,dog,1\na/2.png,dog,0\nb/1.png,cat,\n"
    found = truth_of(file, answers=str(write(folder, answers, "answers.csv")))
    assert found == {"a/0.png": [1, 1], "b/1.png": [-1, 1], "a/2.png": [1, -1]}  # and 0 of the table stays absent
    with pytest.raises(DataError, match=r"answers.csv line 2 answers cow, no class of"):
        truth_of(file, answers=str(write(folder, "image,class,value\na/0.png,cow,1\n", "answers.csv")))
    with pytest.raises(DataError, match=r"answers.csv line 2 answers b/3.png, which is not in"):
        truth_of(file, answers=str(write(folder, "image,class,value\nb/3.png,cat,1\n", "answers.csv")))


LONG = "x" * 10_240
HOSTILE = {
    "a row twice": (HEADER + "a/0.png,1,0\na/0.png,1,0\n", "line 3 names a/0.png again, first in line 2: keep one"),
    "a label twice": ("image,class\na/0.png,x\na/0.png,x\n", "line 3 labels x of a/0.png again, first in line 2"),
    "missing images": (HEADER + "a/0.png,1,0\nno.png,1,0\nnor.png,0,1\n", "line 3 no.png, line 4 nor.png; correct"),
    "an unknown value": (HEADER + "a/0.png,1,0\nb/1.png,maybe,0\n", "line 3 has 'maybe' in the column cat, which is"),
    "a formula": (HEADER + "a/0.png,=1+0,0\n", "line 2 has '=1.0' in the column cat, which is a formula: save values"),
    "a class that is a formula": ("image,=cmd()\na/0.png,1\n", r"line 1 has the class '=cmd\(\)', which is a formula"),
    "an image of 10 kB": (HEADER + f"{LONG},1,0\n", "line 2 names an image with 10,240 characters"),
    "a class of 10 kB": (f"image,{LONG}\na/0.png,1\n", "line 1 has the class 'x{40}…x{15}', which is no class's name"),
    "another encoding": (HEADER.encode() + "é.png,1,0\n".encode("latin-1"), "line 2 is not UTF-8 text: save the table"),
    "UTF-16": (HEADER.encode("utf-16"), "line 1 is not UTF-8 text"),
    "a path that leaves": (HEADER + "../secret.png,1,0\n", "line 2 names ../secret.png, which lies outside"),
    "an absolute path": (HEADER + "/etc/hosts,1,0\n", "line 2 names /etc/hosts, which lies outside"),
    "no image": (HEADER + ",1,0\n", "line 2 names no image"),
    "too few cells": (HEADER + "a/0.png,1\n", "line 2 has 2 cells where the header has 3"),
    "two parts": ("image,class,split\na/0.png,x,train\na/0.png,y,test\n", "line 3 puts a/0.png into test, line 2"),
    "an unknown part": ("image,cat,split\na/0.png,1,dev2\n", "line 2 is for 'dev2' in the column split"),
    "a column twice": ("image,cat,cat\na/0.png,1,1\n", "line 1 names the column cat twice"),
    "an open quote": (HEADER + 'a/0.png,"1,0\n', "line [23] is no CSV"),
    "no rows": (HEADER, "has a header and no rows"),
    "nothing": ("", "has no columns"),
    "an empty part": ("image,cat,split\na/0.png,1,train\n", "has no row for test in its column split"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_with_a_table_is_one_sentence_with_its_line(folder: Path, name: str) -> None:
    text, sentence = HOSTILE[name]
    with pytest.raises(DataError, match=sentence) as error:
        read(None, OwnLabels(str(write(folder, text))))
    assert "labels.csv" in str(error.value)
    assert len(str(error.value)) < 500


def test_positives_alone_cannot_be_tested_on(folder: Path) -> None:
    file = write(folder, HEADER + "".join(f"{paths(number)},1,\n" for number in range(10)))
    for name in ("knn", "own_labels"):
        protocol = load_protocol(name, ["data.name=table", f"data.labels_file={file}"])
        with pytest.raises(DataError, match="so nothing can be measured: write 0 where a class is absent"):
            evaluation(protocol, "random:resnet_tiny").measure(folder / name, quiet=True)


def test_a_file_that_is_no_parquet_and_keys_of_other_data_are_refused(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="is no parquet file"):
        read(None, OwnLabels(str(write(folder, "image", "labels.parquet"))))
    with pytest.raises(ConfigError, match="data.labels_file is not for scenes"):
        load(load_protocol("spml_scenes", [f"data.labels_file={folder / 'labels.parquet'}"]).data)
    with pytest.raises(DataError, match="needs its file: data.labels_file="):
        load(load_protocol("own_labels").data)


@pytest.mark.parametrize("line", ["{path} {name}", "{path}\t{name}", "{path}"])
def test_a_list_gives_each_image_a_class(folder: Path, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    rows = (line.format(path=paths(number), name="ab"[number % 2]) for number in range(10))
    file = write(folder, "# mine\n" + "\n".join(rows), "list.txt")
    data = load(load_protocol("knn", [f"data.root={file}"]).data)
    assert (len(data.train), len(data.test), data.train.class_names) == (8, 2, ["a", "b"])
    assert "folder: 2 classes; images: 8 train, 2 test" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"list.txt line 1 is not PATH CLASS"):
        load(load_protocol("knn", [f"data.root={write(folder, 'cat dog', 'list.txt')}"]).data)


def test_own_images_that_cannot_be_read_are_named_and_left_out_up_to_a_limit(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, "image,cat,split\n" + "".join(
        f"{paths(n)},{n % 3 % 2},{'test' if n > 5 else 'train'}\n" for n in range(10)
    ))  # fmt: skip
    settings = [f"data.labels_file={file}", "data.name=table", "augment.size=16", "probe.k=[1]"]
    protocol = load_protocol("knn", settings)
    whole = evaluation(protocol, "random:resnet_tiny").content
    (folder / paths(0)).write_bytes(b"broken")
    os.utime(file)  # what was read of it is not shown again
    assert evaluation(protocol, "random:resnet_tiny").content != whole
    assert len(load(protocol.data).train) == 5
    assert "skipped an image that cannot be read" in capfd.readouterr().err
    found = run_probe(protocol, "random:resnet_tiny", 0, None, quiet=True)
    assert found.values["map_k1"] > 0
    (folder / paths(2)).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 6 images cannot be read .*repair them, or raise data.max_unreadable"):
        load(load_protocol("knn", [*settings, "data.workers=0", "data.seed=7"]).data)
    assert fingerprint(protocol) == fingerprint(load_protocol("knn", ["data.name=table", *settings[2:]]))
    file = write(folder, f"image,cat,split\n{paths(0)},1,test\n{paths(1)},0,train\n")
    with pytest.raises(DataError, match=r"none of the images can be read, of which there are 1 .*: repair them"):
        load(load_protocol("knn", settings).data)


def test_labels_of_a_table_reach_training_with_what_is_unknown(folder: Path) -> None:
    from mls.eval.supervised import prepare, prepare_training

    rows = "".join(f"{paths(n)},{'' if n % 4 == 0 else n % 3 % 2},{n // 5}\n" for n in range(10))
    file = write(folder, HEADER + rows)
    settings = [f"data.labels_file={file}", "data.validation=0", "training.select=last", "augment.size=16"]
    seed = next(s for s in range(40) if _measurable(lambda s=s: read(None, OwnLabels(str(file), seed=s))))
    protocol = load_protocol("own_labels", [*settings, f"data.seed={seed}"])
    prepared = prepare(protocol.data)
    assert torch.equal(prepared.observed, prepared.train.truth)
    assert (prepared.observed == 0).any()
    training = prepare_training(protocol, "random:resnet_tiny", 0, None)
    assert training.observed.shape == prepared.train.truth.shape
    wrong = load_protocol("own_labels", [f"data.labels_file={file}", f"data.seed={seed}", "metric=top1"])
    with pytest.raises(ConfigError, match="metric=top1 is not of images with several classes each.*: set metric=map"):
        prepare_training(wrong, "random:resnet_tiny", 0, None)
