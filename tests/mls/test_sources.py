"""Sources read real files in the exact layouts people have: folders, lists, COCO, VOC, tar shards.
What crops do with the bytes is tested in test_crops.py."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mls.config import DataConfig, ScenesConfig
from mls.data.listing import Names, locate
from mls.data.sources import build_source
from mls.data.tar import IndexingBar, TarSource, load_index
from mls.errors import DataError


def picture(colour: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 80, 160)).save(buffer, kind)
    return buffer.getvalue()


def put(file: Path, content: bytes = b"") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def source(root: Path | str | None, kind: str = "auto", **options):
    return build_source(DataConfig(source=kind, root=None if root is None else str(root), **options))


def names(made) -> list[str]:
    return [Path(made.describe(i)).name for i in range(len(made))]


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


# ---------------------------------------------------------------- folders


def test_a_flat_folder_gives_its_files_sorted_and_unlabelled(tmp_path):
    content = {f"{i}.{kind.lower()}": picture(i, kind) for i, kind in enumerate(["PNG", "JPEG", "WEBP", "TIFF", "BMP"])}
    for name, data in content.items():
        put(tmp_path / name, data)
    put(tmp_path / "notes.txt", b"no image")
    made = source(tmp_path)
    assert names(made) == sorted(content)
    assert [made.read(i) for i in range(len(made))] == list(content.values())
    assert made.labels is None
    assert made.class_names is None


def test_upper_case_extensions_count_and_hidden_names_do_not(tmp_path):
    for name in ["B.JPG", "a.Png", ".hidden.jpg", ".cache/x.jpg", "deep/.git/y.jpg", "jpg", "c.jpg.part"]:
        put(tmp_path / name)
    assert names(source(tmp_path)) == ["B.JPG", "a.Png"]


def test_class_folders_offer_one_hot_labels(tmp_path):
    for name in ["dog/1.jpg", "cat/2.jpg", "cat/1.jpg", "emu/9.png"]:
        put(tmp_path / name)
    made = source(tmp_path)
    assert made.class_names == ["cat", "dog", "emu"]
    assert made.labels.dtype == torch.float32
    assert made.labels.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("extra", ["loose.jpg", "cat/deeper/1.jpg"])
def test_a_tree_that_is_not_one_folder_a_class_has_no_labels(tmp_path, extra):
    for name in ["dog/1.jpg", "cat/2.jpg", extra]:
        put(tmp_path / name)
    made = source(tmp_path)
    assert len(made) == 3
    assert made.labels is None


def test_a_single_sub_folder_is_no_class(tmp_path):
    put(tmp_path / "images/1.jpg")
    assert source(tmp_path).class_names is None


def test_a_link_loop_ends_and_a_file_reached_twice_is_listed_once(tmp_path):
    root = tmp_path / "root"
    put(root / "real/a.jpg")
    put(tmp_path / "elsewhere/sub/b.jpg")
    (root / "real/loop").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "copy.jpg").symlink_to(root / "real/a.jpg")
    (root / "one").symlink_to(tmp_path / "elsewhere")
    (root / "two").symlink_to(tmp_path / "elsewhere")
    (root / "self.jpg").symlink_to("self.jpg")
    made = source(root)
    assert [made.describe(i).removeprefix(f"{root}/") for i in range(len(made))] == [
        "one/sub/b.jpg",
        "real/a.jpg",
        "self.jpg",
    ]
    with pytest.raises(OSError, match="symbolic links"):
        made.read(2)


def test_a_broken_link_is_listed_and_found_when_it_is_read(tmp_path):
    put(tmp_path / "a.jpg", b"a")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    made = source(tmp_path)
    assert made.read(0) == b"a"
    with pytest.raises(FileNotFoundError):
        made.read(1)


def test_a_pipe_named_like_an_image_is_not_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    put(tmp_path / "a.jpg")
    assert names(source(tmp_path)) == ["a.jpg"]


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9\n.jpg", "wb") as file:
        file.write(picture())
    made = source(tmp_path)
    assert made.read(0) == picture()
    text = made.describe(0)
    assert text.encode().isascii()
    assert text.isprintable()
    assert text.endswith(r"caf\xe9\n.jpg")


def test_ten_thousand_files_are_listed_without_opening_any(tmp_path):
    for folder in range(10):
        (tmp_path / f"{folder}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"{folder}/{i:04}.jpg", os.O_CREAT | os.O_WRONLY))
    made = source(tmp_path)
    assert len(made) == 10_000
    assert made.describe(9_999) == str(tmp_path / "9/0999.jpg")
    assert made.labels.sum(0).tolist() == [1000] * 10


def test_a_million_paths_are_held_in_little_more_than_their_text():
    paths = [b"folder/%012d.jpg" % i for i in range(1_000_000)]
    tracemalloc.start()
    try:
        held = Names.of(paths)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = sum(map(len, paths))
    assert size < text + 9 * len(paths)
    assert held[123_456] == b"folder/000000123456.jpg"


@given(st.lists(st.binary(max_size=5), max_size=20), st.data())
def test_packed_names_behave_like_the_list_they_came_from(items, data):
    first = data.draw(st.integers(0, len(items)))
    last = data.draw(st.integers(first, len(items)))
    held = Names.of(items)
    assert list(held) == items
    assert list(held.part(first, last)) == items[first:last]
    assert list(Names.join([held.part(0, first), held.part(first, len(items))])) == items


def test_limit_takes_the_first_images_and_keeps_the_classes(tmp_path):
    for name in ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]:
        put(tmp_path / name)
    made = source(tmp_path, limit=2)
    assert made.labels.tolist() == [[1, 0], [1, 0]]
    assert sorted(made.order(0, 1)) == [0, 1]
    assert len(source(tmp_path, limit=99)) == 3


# ---------------------------------------------------------------- order


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """Sources of many lengths: every limit of a folder and of tar shards (one of them without images)."""
    root = tmp_path_factory.mktemp("ordered")
    for i in range(40):
        put(root / f"files/{i:02}.jpg")
    for number in range(20):
        shard(root / f"tars/{number:02}.tar", {f"{number:02}-{i}.jpg": b"x" for i in range(number % 4)})
    return root


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["files", "tars"]),
    length=st.integers(1, 30),
    seed=st.integers(0, 2**63),
    epoch=st.integers(1, 10_000),
)
def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(ordered, kind, length, seed, epoch):
    made = source(ordered / kind, limit=length)
    order = made.order(seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(length))
    assert order.tolist() == source(ordered / kind, limit=length).order(seed, epoch).tolist()


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_epochs_and_seeds_have_different_orders(ordered, kind):
    made = source(ordered / kind)
    orders = {tuple(made.order(seed, epoch)) for seed in range(3) for epoch in range(1, 4)}
    assert len(orders) == 9


# ---------------------------------------------------------------- lists


def test_a_list_is_relative_to_its_own_folder(tmp_path):
    put(tmp_path / "sub/a.jpg", b"a")
    outside = put(tmp_path / "other/b.jpg", b"b")
    file = put(tmp_path / "train.txt", f"\ufeff# images\n\nsub/a.jpg\r\n{outside}\n".encode())
    made = source(file)
    assert [made.read(i) for i in range(len(made))] == [b"a", b"b"]
    assert made.labels is None


def test_a_list_in_annotations_is_relative_to_root(tmp_path):
    put(tmp_path / "images/a.jpg", b"a")
    file = put(tmp_path / "lists/train.txt", b"a.jpg\n")
    assert source(tmp_path / "images", annotations=str(file)).read(0) == b"a"
    assert source(tmp_path / "images", "list", annotations=str(file)).read(0) == b"a"


def test_a_list_in_annotations_needs_no_root(tmp_path):
    put(tmp_path / "a.jpg", b"a")
    file = put(tmp_path / "train.txt", b"a.jpg\n")
    assert source(None, annotations=str(file)).read(0) == b"a"
    assert source(None, "list", annotations=str(file)).read(0) == b"a"


def test_missing_files_of_a_list_are_named_with_their_lines(tmp_path):
    put(tmp_path / "a.jpg")
    file = put(tmp_path / "train.txt", b"# head\na.jpg\nb.jpg\nc.jpg\nd.jpg\ne.jpg\n")
    with fails(r"line 3 b\.jpg, line 4 c\.jpg, line 5 d\.jpg and 1 more; correct these lines"):
        source(file)


def test_a_list_without_paths_says_so(tmp_path):
    with fails("no paths in .*train.txt: write one image path a line"):
        source(put(tmp_path / "train.txt", b"# nothing\n\n"))
    with fails("is a folder where a text list was expected: name the .txt file itself"):
        source(tmp_path, "list")


# ---------------------------------------------------------------- COCO

COCO = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "width": 100, "height": 50},
        {"id": 4, "file_name": "a.jpg", "width": 10, "height": 10},
        {"id": 7, "file_name": "c.jpg", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 18, "bbox": [10, 5, 50, 25], "iscrowd": 0},
        {"id": 2, "image_id": 4, "category_id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [90, 40, 20, 20], "iscrowd": 1},
        {"id": 4, "image_id": 12345, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 0},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}],
}


def coco(root: Path, content: object = COCO, images: str = "train2017") -> Path:
    for name in "abc":
        put(root / f"{images}/{name}.jpg", name.encode())
    return put(root / f"annotations/instances_{images}.json", json.dumps(content).encode())


def test_coco_gives_multi_hot_labels_over_categories_sorted_by_id(tmp_path):
    coco(tmp_path)
    made = source(tmp_path)
    assert made.class_names == ["car", "dog", "toothbrush"]
    assert names(made) == ["a.jpg", "b.jpg", "c.jpg"]
    assert made.labels.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert made.read(1) == b"b"


def test_coco_boxes_are_shares_of_the_image_with_classes(tmp_path):
    coco(tmp_path)
    made = source(tmp_path)
    boxes, classes = made.boxes(1)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.9, 0.8, 1.0, 1.0]]))
    assert classes.tolist() == [1, 0]
    assert made.boxes(2)[0].shape == (0, 4)
    assert made.boxes(2)[1].shape == (0,)


def test_coco_takes_an_image_folder_with_annotations(tmp_path):
    file = coco(tmp_path / "coco", images="photos")
    for root, annotations in [
        (tmp_path / "coco/photos", str(file)),
        (tmp_path / "coco", str(file)),
        (tmp_path / "coco", "annotations/instances_photos.json"),
    ]:
        made = source(root, annotations=annotations)
        assert made.read(0) == b"a"
        assert len(made.class_names) == 3


def test_coco_prefers_train2017_and_asks_where_it_cannot_choose(tmp_path):
    coco(tmp_path, {**COCO, "images": COCO["images"][:1]})
    coco(tmp_path, images="val2017")
    assert len(source(tmp_path)) == 1
    put(tmp_path / "other/annotations/unrelated.json")
    with fails("and found none: set data.annotations to the json file and data.root to its image folder"):
        source(tmp_path / "other", "coco")
    coco(tmp_path / "two", images="a")
    coco(tmp_path / "two", images="b")
    with fails(r"found several \(instances_a.json, instances_b.json\)"):
        source(tmp_path / "two", "coco")


def test_a_missing_coco_file_is_found_when_it_is_read(tmp_path):
    coco(tmp_path)
    (tmp_path / "train2017/b.jpg").unlink()
    made = source(tmp_path)
    assert len(made) == 3
    with pytest.raises(FileNotFoundError):
        made.read(1)


def test_coco_images_that_are_elsewhere_are_missed_at_once(tmp_path):
    file = coco(tmp_path)
    put(tmp_path / "empty/x.jpg")
    with fails(r"none of the first 3 images that .* names is in .*empty \(first: a.jpg\): point data.root to"):
        source(tmp_path / "empty", annotations=str(file))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"images": []}, r"is not a COCO instances file \(KeyError: 'categories'\): it needs images"),
        ([1, 2], "is not a COCO instances file"),
        ({**COCO, "annotations": [{"image_id": 9, "category_id": 77, "bbox": [0] * 4}]}, r"KeyError: 77"),
        ({**COCO, "annotations": [{"image_id": 9, "category_id": 3, "bbox": [1, 2]}]}, "is not a COCO instances file"),
        ({**COCO, "images": []}, "lists no images: point data.annotations to another file"),
    ],
)
def test_a_json_that_is_no_instances_file_says_so(tmp_path, content, sentence):
    coco(tmp_path, content)
    with fails(sentence):
        source(tmp_path)


def test_broken_json_says_so(tmp_path):
    coco(tmp_path).write_bytes(b'{"images": [')
    with fails("cannot be read as JSON .*: name an instances file"):
        source(tmp_path)


def test_coco_without_image_sizes_has_labels_and_asks_for_them_for_boxes(tmp_path):
    coco(tmp_path, {**COCO, "images": [{"id": 9, "file_name": "b.jpg"}]})
    made = source(tmp_path)
    assert made.labels.tolist() == [[1, 1, 0]]
    with fails("gives no width and height for .*b.jpg: add them"):
        made.boxes(0)


# ---------------------------------------------------------------- VOC


def voc(year: Path, content: dict[str, list[str]], split: str | None = "trainval") -> Path:
    for stem, objects in content.items():
        put(year / f"JPEGImages/{stem}.jpg", stem.encode())
        found = "".join(
            f"<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part></object>"
            for name in objects
        )
        put(year / f"Annotations/{stem}.xml", f"<annotation>{found}</annotation>".encode())
    if split:
        put(year / f"ImageSets/Main/{split}.txt", "".join(f"{stem}\n" for stem in content).encode())
        put(year / f"ImageSets/Main/cat_{split}.txt", b"000001 -1\n")
    return year


def test_voc_reads_the_split_and_counts_difficult_objects(tmp_path):
    year = voc(tmp_path / "VOCdevkit/VOC2007", {"000005": ["person", "dog", "dog"], "000001": []})
    voc(year, {"000009": ["cat"]}, "test")
    for root in [tmp_path, tmp_path / "VOCdevkit", year]:
        made = source(root)
        assert names(made) == ["000005.jpg", "000001.jpg"]
        assert len(made.class_names) == 20
        assert [made.class_names[j] for j in made.labels[0].nonzero()] == ["dog", "person"]
        assert made.labels[1].sum() == 0
        assert made.read(0) == b"000005"
    assert names(source(tmp_path, annotations="test")) == ["000009.jpg"]


def test_voc_years_in_one_tree_are_taken_together(tmp_path):
    voc(tmp_path / "VOC2012", {"2008_1": ["cat"]})
    voc(tmp_path / "VOC2007", {"000001": ["dog"]})
    made = source(tmp_path)
    assert names(made) == ["000001.jpg", "2008_1.jpg"]
    assert made.name == "voc:VOC2007+VOC2012"


def test_own_classes_in_vocs_layout_are_taken_from_the_xmls(tmp_path):
    voc(tmp_path, {"b": ["shelf", "person"], "a": ["can"]}, split=None)
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/b.PNG")
    made = source(tmp_path)
    assert made.class_names == ["can", "person", "shelf"]
    assert names(made) == ["a.jpg", "b.PNG"]
    assert made.labels.tolist() == [[1, 0, 0], [0, 1, 1]]


def test_voc_without_any_object_has_no_labels(tmp_path):
    year = voc(tmp_path / "VOC2012", {"x": []}, "test")
    (year / "Annotations/x.xml").unlink()
    assert source(tmp_path, annotations="test").labels is None


def test_a_split_that_voc_lacks_is_answered_with_those_it_has(tmp_path):
    voc(tmp_path, {"a": []}, "train")
    with fails(r"no split .*trainval.txt: set data.annotations to one of those there \(train\)"):
        source(tmp_path)


def test_voc_mistakes_are_sentences(tmp_path):
    year = voc(tmp_path / "VOC2007", {"a": ["cat"]})
    put(tmp_path / "plain/x.jpg")
    with fails("no VOC tree in .*plain: data.root must be VOCdevkit, or a folder with JPEGImages and Annotations"):
        source(tmp_path / "plain", "voc")
    put(year / "Annotations/a.xml", b"<annotation>")
    with fails(r"a.xml is not valid XML .*: repair it or delete it"):
        source(year)
    put(year / "Annotations/a.xml", b"<annotation/>")
    (year / "JPEGImages/a.jpg").unlink()
    with fails("none of the first 1 images that .*VOC2007 names is in"):
        source(year)
    put(year / "ImageSets/Main/trainval.txt", b"\n")
    with fails("no images in .*VOC2007 .*: choose another split with data.annotations"):
        source(year)


# ---------------------------------------------------------------- tar shards


def shard(file: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


class Calls:
    """A progress callback that remembers how it was called."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def shards(root: Path, count: int = 3, images: int = 4) -> list[Path]:
    return [
        shard(root / f"shard-{n:03}.tar", {f"{n}/{i:04}.jpg": picture(n * 16 + i) for i in range(images)})
        for n in range(count)
    ]


def test_tar_shards_give_the_bytes_of_every_image(tmp_path):
    shards(tmp_path)
    made = source(tmp_path)
    assert len(made) == 12
    assert [made.read(i) for i in range(12)] == [picture(n * 16 + i) for n in range(3) for i in range(4)]
    assert made.describe(5) == f"{tmp_path}/shard-001.tar:1/0001.jpg"
    assert made.labels is None


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path, kind):
    long = "d" * 90 + "/" + "é" * 40 + ".jpg"
    made = source(shard(tmp_path / "x.tar", {long: b"long", "b.jpg": b"b"}, kind))
    assert made.describe(0).endswith(long)
    assert [made.read(0), made.read(1)] == [b"long", b"b"]


def test_a_brace_pattern_names_its_shards_and_misses_the_missing(tmp_path):
    shards(tmp_path, 4)
    made = source(tmp_path / "shard-{001..002}.tar")
    assert made.describe(0).endswith("shard-001.tar:1/0000.jpg")
    assert len(made) == 8
    with fails(r"shard-00[45].tar does not exist: did you mean .*/shard-00\d.tar\?"):
        source(tmp_path / "shard-{000..005}.tar")


def test_a_key_ends_at_the_first_dot_and_has_one_image(tmp_path):
    members = {
        "a.mask.png": b"mask",
        "a.jpg": b"image",
        "a.cls": b"1",
        "v1.5/b.jpg": b"b",
        "v1.5/b.cls": b"0\n",
        "v1.5/b.seg.png": b"seg",
        "v1.5/._b.jpg": b"hidden",
        "only.text.txt": b"?",
    }
    made = source(shard(tmp_path / "x.tar", members))
    assert [made.read(i) for i in range(len(made))] == [b"image", b"b"]
    assert made.class_names == ["0", "1"]
    assert made.labels.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("b.json", b'{"label": 2}', 3),
        ("b.json", b'{"labels": 1, "caption": "a dog"}', 2),
        ("b.json", b'{"label": [1, 2]}', None),
        ("b.json", b'{"label": true}', None),
        ("b.json", b"[3]", None),
        ("b.json", b'{"label": ', None),
        ("b.cls", b"dog", None),
        ("b.cls", b"-1", None),
        ("b.cls", b"123456789", None),
        ("c.cls", b"1", None),
    ],
)
def test_tar_labels_are_taken_only_if_every_image_has_a_plain_number(tmp_path, name, content, expected):
    made = source(shard(tmp_path / "x.tar", {"a.cls": b"0", "a.jpg": b"a", "b.jpg": b"b", name: content}))
    assert len(made) == 2
    assert (made.labels is None) == (expected is None)
    assert (made.class_names and len(made.class_names)) == expected


def test_the_index_is_kept_beside_the_shards_and_used_again(tmp_path):
    files = shards(tmp_path)
    first, second = Calls(), Calls()
    made = TarSource(files, progress=first)
    again = TarSource(files, progress=second)
    total = sum(file.stat().st_size for file in files)
    assert first.seen[-1] == (total, total)
    assert [done for done, _ in first.seen] == sorted(done for done, _ in first.seen)
    assert second.seen == []
    assert len(list(tmp_path.glob(".mls-index-*.npz"))) == 1
    assert [again.describe(i) for i in range(12)] == [made.describe(i) for i in range(12)]
    assert [again.read(i) for i in range(12)] == [made.read(i) for i in range(12)]


@pytest.mark.parametrize(("after", "shown"), [(0.0, True), (60.0, False)])
def test_only_slow_indexing_shows_a_bar(capsys, after, shown):
    bar = IndexingBar(after)
    bar.report(50, 100)
    bar.report(100, 100)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert ("indexing tar shards" in err and "100%" in err) == shown


def test_only_a_changed_shard_is_indexed_again(tmp_path):
    files = shards(tmp_path)
    load_index(files)
    shard(files[1], {"new.jpg": b"new", "newer.jpg": b"newer"})
    calls = Calls()
    made = TarSource(files, progress=calls)
    assert {total for _, total in calls.seen} == {files[1].stat().st_size}
    assert len(made) == 10
    assert made.read(4) == b"new"
    assert made.read(6) == picture(32)


def test_same_size_and_newer_time_is_a_change(tmp_path):
    file = shard(tmp_path / "x.tar", {"a.jpg": b"old", "skip.txt": b""})
    load_index([file])
    shard(file, {"skip.txt": b"", "a.jpg": b"new"})
    os.utime(file, ns=(0, 12345))
    assert TarSource([file]).read(0) == b"new"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not an index"])
def test_a_damaged_index_file_is_made_anew(tmp_path, content):
    files = shards(tmp_path)
    load_index(files)
    (index,) = tmp_path.glob(".mls-index-*.npz")
    good = index.stat().st_size
    index.write_bytes(content)
    assert TarSource(files).read(11) == picture(35)
    assert index.stat().st_size == good


def test_the_index_goes_to_the_cache_folder_where_shards_cannot_have_it_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = shards(tmp_path / "data")
    load_index(files)
    (index,) = (tmp_path / "data").glob(".mls-index-*.npz")
    index.unlink()
    index.mkdir()  # what is there cannot be replaced by a file, whoever asks
    load_index(files)
    assert len(list((tmp_path / "cache/mls").glob("index-*.npz"))) == 1
    calls = Calls()
    assert len(TarSource(files, progress=calls)) == 12
    assert calls.seen == []
    assert not list((tmp_path / "data").glob(".mls-*.npz/*"))


def test_without_any_place_for_the_index_the_shards_still_work(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(put(tmp_path / "a_file")))
    files = shards(tmp_path / "data")
    load_index(files)
    (index,) = (tmp_path / "data").glob(".mls-index-*.npz")
    index.unlink()
    index.mkdir()
    assert len(TarSource(files)) == 12


def test_traversal_names_are_only_read_and_links_and_devices_passed_over(tmp_path):
    secret = put(tmp_path / "secret.jpg", b"secret")
    file = tmp_path / "data/x.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as tar:
        for name, kind in [("dev.jpg", tarfile.CHRTYPE), ("fifo.jpg", tarfile.FIFOTYPE), ("dir.jpg", tarfile.DIRTYPE)]:
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
        for name, kind in [("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../secret.jpg"
            tar.addfile(member)
        for name in ["../../secret.jpg", str(secret)]:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"mine"))
    made = source(file)
    assert [made.read(i) for i in range(len(made))] == [b"mine", b"mine"]
    assert secret.read_bytes() == b"secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret.jpg"]


def test_a_truncated_shard_is_used_as_far_as_it_goes_and_says_so_each_time(tmp_path, caplog):
    file = shard(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(4)})
    os.truncate(file, 2 * (512 + 2048) + 512 + 100)  # in the contents of the third image
    for _ in range(2):  # from the headers, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = source(file)
        assert len(made) == 2
        assert made.read(1) == b"\x01" * 2000
        assert "x.tar is damaged (unexpected end of data): using its first 2 images" in caplog.text


@pytest.mark.parametrize("cut", [2 * 2560, 2 * 2560 + 100])
def test_a_shard_cut_between_or_inside_headers_says_so(tmp_path, caplog, cut):
    file = shard(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(4)}, tarfile.USTAR_FORMAT)
    os.truncate(file, cut)
    assert len(source(file)) == 2
    assert "x.tar is damaged" in caplog.text


def test_overwritten_headers_say_so(tmp_path, caplog):
    file = shard(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(4)}, tarfile.USTAR_FORMAT)
    with open(file, "r+b") as opened:
        opened.seek(2560)
        opened.write(b"\xff" * 512)
    assert len(source(file)) == 1
    assert "x.tar is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"nonsense" * 200])
def test_a_shard_of_which_nothing_is_usable_is_an_error(tmp_path, content):
    with fails(r"x.tar is not a readable tar \(.*\): write it again, without compression"):
        source(put(tmp_path / "x.tar", content))


def test_a_compressed_tar_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with fails("x.tar is not a readable tar"):
        source(tmp_path)


def test_a_shard_that_shrinks_after_indexing_is_an_os_error(tmp_path):
    (file,) = shards(tmp_path, 1)
    made = source(file)
    os.truncate(file, 600)
    with pytest.raises(OSError, match=r"shard-000\.tar became shorter after it was indexed"):
        made.read(3)


def test_tars_without_images_are_an_error(tmp_path):
    shard(tmp_path / "x.tar", {"a.txt": b"?"})
    with fails(r"no images in 1 shards from .*x.tar on \(looked for jpg, jpeg, png"):
        source(tmp_path)
    (tmp_path / "none").mkdir()
    with fails(r"no .tar shards in .*none: point data.root to their folder or to shard-\{000..012\}.tar"):
        source(tmp_path / "none", "tar")


def test_a_folder_of_images_beside_a_tar_is_a_folder(tmp_path):
    shards(tmp_path, 1)
    put(tmp_path / "deep/er/a.jpg")
    assert names(source(tmp_path)) == ["a.jpg"]


def test_tar_order_keeps_to_few_shards_at_a_time(tmp_path):
    made = TarSource(shards(tmp_path, 24, 5))
    order = made.order(0, 1)
    windows = [set((order[i : i + 40] // 5).tolist()) for i in range(0, 120, 40)]
    assert [len(window) for window in windows] == [8, 8, 8]
    assert set.union(*windows) == set(range(24))
    assert windows[0] != set(range(8))
    assert (np.diff(order[:40] // 5) != 0).sum() > 20  # inside a window images of all its shards are mixed


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_descriptors_are_few_and_closed_with_the_source(tmp_path):
    files = shards(tmp_path, 80, 1)
    before = open_files()
    made = TarSource(files)
    assert open_files() == before
    assert [made.read(i) for i in range(80)] == [picture(n * 16) for n in range(80)]
    assert open_files() == before + 64
    del made
    assert open_files() == before


def _read_all(made, ids: list[int], answer) -> None:
    answer.send([made.read(i) for i in ids])
    answer.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of forking itself, since Python 3.12
def test_two_processes_read_the_same_shards_at_once(tmp_path):
    made = TarSource(shards(tmp_path, 3, 40))
    expected = [made.read(i) for i in range(120)]  # the descriptors are open before the fork
    context = multiprocessing.get_context("fork")
    ids = [made.order(0, epoch).tolist() * 20 for epoch in (1, 2)]
    jobs = []
    for some in ids:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_read_all, args=(made, some, theirs))
        process.start()
        theirs.close()
        jobs.append((process, ours, some))
    assert [made.read(i) for i in range(120)] == expected
    for process, ours, some in jobs:
        assert ours.recv() == [expected[i] for i in some]
        ours.close()
        process.join()
        assert process.exitcode == 0
        process.close()
    assert made.read(0) == expected[0]


def test_every_source_survives_pickling(tmp_path):
    coco(tmp_path / "coco")
    shards(tmp_path / "tar")
    for made in [source(tmp_path / "coco"), source(tmp_path / "tar")]:
        expected = made.read(2)
        assert pickle.loads(pickle.dumps(made)).read(2) == expected


# ---------------------------------------------------------------- where things are, and what is not there


def test_paths_may_use_home_and_the_data_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(put(tmp_path / "work/note.txt").parent)
    put(tmp_path / "data/street/a.jpg")
    shards(tmp_path / "data/tars", 2)
    for text in ["~/data/street", "$MLS_DATA/street", "${MLS_DATA}/street", "street", "../data/street"]:
        assert names(source(text)) == ["a.jpg"]
    assert len(source("tars/shard-{000..001}.tar")) == 8
    put(tmp_path / "work/street/b.jpg")
    assert names(source("street")) == ["b.jpg"]


def test_an_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("MLS_DATA", raising=False)
    with fails(r"data.root \$MLS_DATA/street uses \$MLS_DATA, which is not set: export MLS_DATA, or write"):
        source("$MLS_DATA/street")


def test_a_missing_path_is_answered_with_the_nearest(tmp_path):
    put(tmp_path / "street/a.jpg")
    with fails(f"data.root {tmp_path}/steret/x does not exist: did you mean {tmp_path}/street"):
        source(tmp_path / "steret/x")
    with fails(f"data.root {tmp_path}/zzz/x does not exist: the nearest folder that does is {tmp_path}$"):
        source(tmp_path / "zzz/x")
    with fails(f"data.annotations {tmp_path}/no.json does not exist"):
        source(tmp_path / "street", annotations=f"{tmp_path}/no.json")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_whatever_a_missing_path_is_called_the_answer_is_a_sentence(text):
    with fails("."):
        locate(f"/nowhere-at-all/{text}/x")


def test_no_root_says_how_to_set_one():
    for kind in ["auto", "folder", "coco", "voc", "tar", "list"]:
        with fails("set data.root=FOLDER .*, or try data.source=scenes, which needs no data"):
            source(None, kind)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    put(tmp_path / "read.me")
    with fails(r"no images under .* \(looked for jpg, jpeg, png, webp, bmp, tif, tiff, gif, ppm\): point data.root"):
        source(tmp_path)


@pytest.mark.parametrize("kind", ["auto", "folder", "coco", "voc"])
def test_a_file_where_a_folder_was_expected_says_so(tmp_path, kind):
    with fails("a.jpg is a file where a folder of .* was expected: name the folder"):
        source(put(tmp_path / "a.jpg"), kind)


def test_annotations_that_a_folder_cannot_use_are_not_ignored(tmp_path):
    put(tmp_path / "a.jpg")
    with fails("data.annotations trainval does not belong to a folder of images .*: remove it, or set data.source"):
        source(tmp_path, annotations="trainval")


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    put(tmp_path / "a.jpg")
    with fails(f"data.limit is {limit}: it must be 1 or more, or null for all images"):
        source(tmp_path, limit=limit)


def test_a_split_is_refused_where_there_is_none(tmp_path):
    put(tmp_path / "a.jpg")
    with fails("only data.source=scenes has a split 'test': point data.root to the images of that split"):
        build_source(DataConfig(root=str(tmp_path)), "test")


def test_an_unknown_source_is_answered_with_the_nearest():
    with fails("unknown data.source 'foldr': did you mean 'folder'"):
        source("/", "foldr")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    put(tmp_path / "a.jpg")
    put(tmp_path / "closed/b.jpg").parent.chmod(0)
    try:
        with fails(r"cannot list .*closed \(Permission denied\): make it readable, or hide it"):
            source(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_the_embedded_scenes_need_no_root_and_take_a_limit():
    pytest.importorskip("mls.data.scenes")
    scenes = ScenesConfig(count=50, test_count=20)
    whole = build_source(DataConfig(source="scenes", scenes=scenes))
    some = build_source(DataConfig(source="scenes", scenes=scenes, limit=30))
    held_out = build_source(DataConfig(source="scenes", scenes=scenes, limit=30), "test")
    assert (len(whole), len(some), len(held_out)) == (50, 30, 20)
    assert torch.equal(whole.read(29), some.read(29))
