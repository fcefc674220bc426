"""Sources of images for pretraining against one contract, each on real files in the layout that people have: folders,
lists, COCO, VOC, tar shards here and behind a URL, the embedded scenes. What only one source has to do is below the
contract; what crops do with the bytes is tested in test_crops.py, servers that fail in test_remote.py."""

import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import tarfile
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mls.config import DataConfig, ScenesConfig
from mls.data import Source
from mls.data.listing import Names, locate
from mls.data.sources import build_source
from mls.data.tar import IndexingBar, TarSource, load_index
from mls.errors import DataError

Files = Mapping[str, bytes | str]

# ------------------------------------------------------------------------------------------------------- writing trees


def picture(colour: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 80, 160)).save(buffer, kind)
    return buffer.getvalue()


def put(root: Path, files: Files) -> Path:
    """Bytes are written as they are; in text ROOT becomes the folder; a name with / at its end is an empty folder."""
    for name, content in files.items():
        file = root / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_bytes(content if isinstance(content, bytes) else content.replace("ROOT", str(root)).encode())
    return root


def empty(*names: str) -> dict[str, bytes]:
    return dict.fromkeys(names, b"")


def source(root: Path | str | None, kind: str = "auto", **options):
    return build_source(DataConfig(source=kind, root=None if root is None else str(root), **options))


def build(folder: Path, options: Mapping[str, object], **others: object) -> Source:
    """ROOT in an option is the folder."""
    replaced = {k: v.replace("ROOT", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
    return build_source(DataConfig(**replaced, **others))


def names(made) -> list[str]:
    return [Path(made.describe(i)).name for i in range(len(made))]


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


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


def coco(content: object = COCO, images: str = "train2017") -> dict[str, bytes]:
    pictures = {f"{images}/{name}.jpg": name.encode() for name in "abc"}
    return {**pictures, f"annotations/instances_{images}.json": json.dumps(content).encode()}


def voc(content: dict[str, list[str]], split: str | None = "trainval", year: str = "VOC2007") -> dict[str, bytes]:
    files = {}
    for stem, objects in content.items():
        files[f"{year}/JPEGImages/{stem}.jpg"] = stem.encode()
        found = "".join(
            f"<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part></object>"
            for name in objects
        )
        files[f"{year}/Annotations/{stem}.xml"] = f"<annotation>{found}</annotation>".encode()
    if split:
        files[f"{year}/ImageSets/Main/{split}.txt"] = "".join(f"{stem}\n" for stem in content).encode()
        files[f"{year}/ImageSets/Main/cat_{split}.txt"] = b"000001 -1\n"
    return files


def tar(members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as written:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def shard(file: Path, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    return put(file.parent, {file.name: tar(members, kind)}) / file.name


def shard_files(count: int = 3, images: int = 4) -> dict[str, bytes]:
    return {
        f"shard-{n:03}.tar": tar({f"{n}/{i:04}.jpg": picture(n * 16 + i) for i in range(images)}) for n in range(count)
    }


def shards(root: Path, count: int = 3, images: int = 4) -> list[Path]:
    files = shard_files(count, images)
    return [put(root, files) / name for name in files]


# --------------------------------------------------------------------------------------------------------- the contract


@dataclass(frozen=True)
class Layout:
    kind: str  # data.source where it is not auto
    files: Files
    reads: Mapping[str, bytes]  # what each image's description ends with, and its bytes, in order
    classes: Sequence[str] | None = None
    labels: Sequence[set[str]] = ()  # the classes of each image
    options: Mapping[str, object] = field(default_factory=lambda: {"root": "ROOT"})


FLAT = {f"{i}.{kind.lower()}": picture(i, kind) for i, kind in enumerate(["BMP", "JPEG", "PNG", "TIFF", "WEBP"])}
PETS = {name: name.encode() for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "emu/9.png")}
LISTED = {"sub/a.jpg": b"a", "other/b.jpg": b"b"}
LIST = {**LISTED, "train.txt": "\ufeff# images\n\nsub/a.jpg\r\nROOT/other/b.jpg\n"}
ELSEWHERE = {"images/a.jpg": b"a", "lists/train.txt": "a.jpg\n"}
COCO_CLASSES = {"classes": ["car", "dog", "toothbrush"], "labels": [{"car"}, {"car", "dog"}, set()]}
COCO_READS = {f"train2017/{name}.jpg": name.encode() for name in "abc"}
PHOTOS = coco(images="photos")
PHOTO_READS = {f"photos/{name}.jpg": name.encode() for name in "abc"}
VOC = voc({"000005": ["person", "dog", "dog"], "000001": []}, year="VOCdevkit/VOC2007")
VOC |= voc({"000009": ["cat"]}, "test", "VOCdevkit/VOC2007")
VOC_NAMES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor""".split()
VOC_READS = {"000005.jpg": b"000005", "000001.jpg": b"000001"}
VOC_CLASSES = {"classes": VOC_NAMES, "labels": [{"dog", "person"}, set()]}
SHELVES = {
    name.replace("b.jpg", "b.PNG"): data
    for name, data in voc({"b": ["shelf", "person"], "a": ["can"]}, None, ".").items()
}
SHARDS = shard_files()
SHARD_READS = {f"shard-{n:03}.tar:{n}/{i:04}.jpg": picture(n * 16 + i) for n in range(3) for i in range(4)}
MEMBERS = {
    "a.mask.png": b"mask",
    "a.jpg": b"image",
    "a.cls": b"0",
    "v1.5/b.jpg": b"b",
    "v1.5/b.cls": b"1\n",
    "v1.5/b.seg.png": b"seg",
    "v1.5/._b.jpg": b"hidden",
    "only.text.txt": b"?",
}

LAYOUTS = {
    "a flat folder": Layout("folder", {**FLAT, "notes.txt": b"no image"}, FLAT),
    "a folder for each class": Layout(
        "folder", PETS, PETS, ["cat", "dog", "emu"], [{"cat"}, {"cat"}, {"dog"}, {"emu"}]
    ),
    "a list": Layout("list", LIST, LISTED, options={"root": "ROOT/train.txt"}),
    "a list of a root": Layout(
        "list",
        ELSEWHERE,
        {"images/a.jpg": b"a"},
        options={"root": "ROOT/images", "annotations": "ROOT/lists/train.txt"},
    ),
    "a list alone": Layout("list", LIST, LISTED, options={"annotations": "ROOT/train.txt"}),
    "COCO": Layout("coco", coco(), COCO_READS, **COCO_CLASSES),
    "COCO, train2017 of several": Layout("coco", {**coco(), **coco(images="val2017")}, COCO_READS, **COCO_CLASSES),
    **{
        f"COCO, {root} and {annotations}": Layout(
            "coco", PHOTOS, PHOTO_READS, **COCO_CLASSES, options={"root": root, "annotations": annotations}
        )
        for root, annotations in [
            ("ROOT/photos", "ROOT/annotations/instances_photos.json"),
            ("ROOT", "ROOT/annotations/instances_photos.json"),
            ("ROOT", "annotations/instances_photos.json"),
        ]
    },
    **{
        f"VOC, {root}": Layout("voc", VOC, VOC_READS, **VOC_CLASSES, options={"root": root})
        for root in ("ROOT", "ROOT/VOCdevkit", "ROOT/VOCdevkit/VOC2007")
    },
    "VOC's test": Layout(
        "voc", VOC, {"000009.jpg": b"000009"}, VOC_NAMES, [{"cat"}], options={"root": "ROOT", "annotations": "test"}
    ),
    "VOC, two years": Layout(
        "voc",
        {**voc({"2008_1": ["cat"]}, year="VOC2012"), **voc({"000001": ["dog"]})},
        {"VOC2007/JPEGImages/000001.jpg": b"000001", "VOC2012/JPEGImages/2008_1.jpg": b"2008_1"},
        VOC_NAMES,
        [{"dog"}, {"cat"}],
    ),
    "VOC with own classes and no split": Layout(
        "voc",
        SHELVES,
        {"JPEGImages/a.jpg": b"a", "JPEGImages/b.PNG": b"b"},
        ["can", "person", "shelf"],
        [{"can"}, {"person", "shelf"}],
    ),
    "tar shards": Layout("tar", SHARDS, SHARD_READS),
    "tar shards by number": Layout(
        "tar",
        SHARDS,
        {name: data for name, data in SHARD_READS.items() if not name.startswith("shard-000")},
        options={"root": "ROOT/shard-{001..002}.tar"},
    ),
    "a tar whose keys end at the first dot and have one image": Layout(
        "tar",
        {"x.tar": tar(MEMBERS)},
        {"x.tar:a.jpg": b"image", "x.tar:v1.5/b.jpg": b"b"},
        ["0", "1"],
        [{"0"}, {"1"}],
        options={"root": "ROOT/x.tar"},
    ),
    "tar shards behind a URL": Layout("tar", SHARDS, SHARD_READS, options={"root": "file://ROOT/shard-{000..002}.tar"}),
}
SCENES = Layout("scenes", {}, {}, options={"source": "scenes", "scenes": ScenesConfig(count=8, test_count=4)})
EVERY = pytest.mark.parametrize("layout", [*LAYOUTS.values(), SCENES], ids=[*LAYOUTS, "scenes"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path_factory.mktemp("cache")))


def contents(made: Source) -> list[object]:
    read = [made.read(i) for i in range(len(made))]
    return [data if isinstance(data, bytes) else data.tolist() for data in read]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_recognised_and_read_as_it_is_when_named(tmp_path, layout):
    put(tmp_path, layout.files)
    for kind in ("auto", layout.kind):
        made = build(tmp_path, layout.options, source=kind)
        assert isinstance(made, Source)
        assert contents(made) == list(layout.reads.values())
        for i, name in enumerate(layout.reads):
            described = made.describe(i)
            assert described.endswith(f"/{name}")
            if "://" not in str(layout.options.get("root")):
                assert described.startswith(f"{tmp_path}/")
        assert made.class_names == layout.classes
        if layout.classes is None:
            assert made.labels is None
        else:
            assert made.labels.dtype == torch.float32
            assert made.labels.tolist() == [[name in found for name in layout.classes] for found in layout.labels]


@EVERY
def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(tmp_path, layout):
    put(tmp_path, layout.files)
    made, again = (build(tmp_path, layout.options) for _ in range(2))
    for seed, epoch in [(0, 1), (0, 2), (2**63, 1)]:
        order = made.order(seed, epoch)
        assert order.dtype == np.int64
        assert sorted(order) == list(range(len(made)))
        assert order.tolist() == again.order(seed, epoch).tolist()


@EVERY
def test_a_limit_takes_the_first_images_and_keeps_the_classes(tmp_path, layout):
    put(tmp_path, layout.files)
    whole = build(tmp_path, layout.options)
    for limit in (1, len(whole) - 1 or 1, len(whole), 99):
        some, count = build(tmp_path, layout.options, limit=limit), min(limit, len(whole))
        assert contents(some) == contents(whole)[:count]
        assert [some.describe(i) for i in range(count)] == [whole.describe(i) for i in range(count)]
        assert some.class_names == whole.class_names
        assert (some.labels is None) == (whole.labels is None)
        assert whole.labels is None or torch.equal(some.labels, whole.labels[:count])
        assert sorted(some.order(0, 1)) == list(range(count))


@EVERY
def test_a_source_survives_pickling(tmp_path, layout):
    put(tmp_path, layout.files)
    made = build(tmp_path, layout.options)
    expected = contents(made)  # read before: open files do not travel
    again = pickle.loads(pickle.dumps(made))
    assert contents(again) == expected
    assert again.class_names == made.class_names and again.order(0, 1).tolist() == made.order(0, 1).tolist()


INSTANCES = "annotations/instances_train2017.json"
ONE_VOC = voc({"a": ["cat"]})
XML, SPLIT = "VOC2007/Annotations/a.xml", "VOC2007/ImageSets/Main/trainval.txt"
MISTAKES = [  # the tree, options, what the sentence says
    (
        {**LIST, "train.txt": "# nothing\n\n"},
        {"root": "ROOT/train.txt"},
        "no paths in .*train.txt: write one image path",
    ),
    (LIST, {"source": "list"}, "is a folder where a text list was expected: name the .txt file itself"),
    (
        {"a.jpg": b"", "train.txt": "# head\na.jpg\nb.jpg\nc.jpg\nd.jpg\ne.jpg\n"},
        {"root": "ROOT/train.txt"},
        r"line 3 b\.jpg, line 4 c\.jpg, line 5 d\.jpg and 1 more; correct these lines",
    ),
    (
        empty("annotations/unrelated.json"),
        {"source": "coco"},
        "and found none: set data.annotations to the json file and data.root to its image folder",
    ),
    (
        {**coco(images="a"), **coco(images="b")},
        {"source": "coco"},
        r"found several \(instances_a.json, instances_b.json\)",
    ),
    (
        {**coco(), "empty/x.jpg": b""},
        {"root": "ROOT/empty", "annotations": f"ROOT/{INSTANCES}"},
        r"none of the first 3 images that .* names is in .*empty \(first: a.jpg\): point data.root to",
    ),
    (coco({"images": []}), {}, r"is not a COCO instances file \(KeyError: 'categories'\): it needs images"),
    (coco([1, 2]), {}, "is not a COCO instances file"),
    (
        coco({**COCO, "annotations": [{"image_id": 9, "category_id": 77, "bbox": [0] * 4}]}),
        {},
        "unknown class .*category_id 77",
    ),
    (
        coco({**COCO, "annotations": [{"image_id": 9, "category_id": 3, "bbox": [1, 2]}]}),
        {},
        r"malformed \(annotation without id of b.jpg: bbox \[1, 2\]\); so many are no accident",
    ),
    (coco({**COCO, "images": []}), {}, "lists no images: point data.annotations to another file"),
    ({**coco(), INSTANCES: '{"images": ['}, {}, "cannot be read as JSON .*: name an instances file"),
    (
        empty("x.jpg"),
        {"source": "voc"},
        "no VOC tree in .*: data.root must be VOCdevkit, or a folder with JPEGImages and Annotations",
    ),
    (voc({"a": []}, "train"), {}, r"no split .*trainval.txt: set data.annotations to one of those there \(train\)"),
    ({**ONE_VOC, XML: "<annotation>"}, {}, "a.xml is not valid XML .*: repair it or delete it"),
    ({**ONE_VOC, SPLIT: "b\n"}, {"root": "ROOT/VOC2007"}, "none of the first 1 images that .*VOC2007 names is in"),
    (
        {**ONE_VOC, SPLIT: "\n"},
        {"root": "ROOT/VOC2007"},
        "no images in .*VOC2007 .*: choose another split with data.annotations",
    ),
    (empty("x.tar"), {}, r"x.tar is not a readable tar \(.*\): write it again, without compression"),
    ({"x.tar": b"nonsense" * 200}, {}, r"x.tar is not a readable tar \(.*\): write it again, without compression"),
    ({"x.tar": gzip.compress(tar({"a.jpg": b""}))}, {}, "x.tar is not a readable tar"),
    ({"x.tar": tar({"a.txt": b"?"})}, {}, r"no images in 1 shards from .*x.tar on \(looked for jpg, jpeg, png"),
    (
        {"none/": ""},
        {"root": "ROOT/none", "source": "tar"},
        r"no .tar shards in .*none: point data.root to their folder or to shard-\{000..012\}.tar",
    ),
    (
        shard_files(4),
        {"root": "ROOT/shard-{000..005}.tar"},
        r"shard-00[45].tar does not exist: did you mean .*/shard-00\d.tar\?",
    ),
    (
        empty("read.me"),
        {},
        r"no images under .* \(looked for jpg, jpeg, png, webp, bmp, tif, tiff, gif, ppm.*\): point data.root",
    ),
    *(
        (
            empty("a.jpg"),
            {"root": "ROOT/a.jpg", "source": kind},
            "a.jpg is a file where a folder of .* was expected: name",
        )
        for kind in ("auto", "folder", "coco", "voc")
    ),
    (
        empty("a.jpg"),
        {"annotations": "trainval"},
        "data.annotations trainval does not belong to a folder of images .*: remove it, or set data.source",
    ),
    *(
        (empty("a.jpg"), {"limit": limit}, f"data.limit is {limit}: it must be 1 or more, or null for all images")
        for limit in (0, -3)
    ),
    *(
        ({}, {"root": None, "source": kind}, "set data.root=FOLDER .*, or try data.source=scenes, which needs no data")
        for kind in ("auto", "folder", "coco", "voc", "tar", "list")
    ),
    ({}, {"source": "foldr"}, "unknown data.source 'foldr': did you mean 'folder'"),
    (
        {},
        {"root": "$MLS_DATA/street"},
        r"data.root \$MLS_DATA/street uses \$MLS_DATA, which is not set: export MLS_DATA, or write",
    ),
    (
        empty("street/a.jpg"),
        {"root": "ROOT/steret/x"},
        "data.root ROOT/steret/x does not exist: did you mean ROOT/street",
    ),
    (
        empty("street/a.jpg"),
        {"root": "ROOT/zzz/x"},
        "data.root ROOT/zzz/x does not exist: the nearest folder that does is ROOT$",
    ),
    (
        empty("street/a.jpg"),
        {"root": "ROOT/street", "annotations": "ROOT/no.json"},
        "data.annotations ROOT/no.json does not exist",
    ),
]


@pytest.mark.parametrize(("files", "options", "sentence"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_sentence_with_its_remedy(tmp_path, monkeypatch, files, options, sentence):
    monkeypatch.delenv("MLS_DATA", raising=False)
    put(tmp_path, files)
    with fails(sentence.replace("ROOT", re.escape(str(tmp_path)))) as error:
        build(tmp_path, {"root": "ROOT", **options})
    assert "\n" not in str(error.value)


def test_a_split_is_refused_where_there_is_none(tmp_path):
    put(tmp_path, empty("a.jpg"))
    with fails("only data.source=scenes has a split 'test': point data.root to the images of that split"):
        build_source(DataConfig(root=str(tmp_path)), "test")


def test_a_missing_file_is_listed_and_found_when_it_is_read(tmp_path):
    put(tmp_path, {"folder/a.jpg": b"a", **{f"coco/{name}": data for name, data in coco().items()}})
    (tmp_path / "folder/b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "coco/train2017/b.jpg").unlink()
    for folder, count in (("folder", 2), ("coco", 3)):
        made = source(tmp_path / folder)
        assert len(made) == count
        assert made.read(0) == b"a"
        with pytest.raises(FileNotFoundError):
            made.read(1)


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        ("B.JPG a.Png .hidden.jpg .cache/x.jpg deep/.git/y.jpg jpg c.jpg.part", "B.JPG a.Png"),
        ("dog/1.jpg cat/2.jpg loose.jpg", "cat/2.jpg dog/1.jpg loose.jpg"),
        ("dog/1.jpg cat/2.jpg cat/deeper/1.jpg", "cat/2.jpg cat/deeper/1.jpg dog/1.jpg"),
        ("images/1.jpg", "images/1.jpg"),
    ],
    ids=["hidden", "images beside the classes", "folders in a class", "a single folder"],
)
def test_a_tree_that_is_not_one_folder_a_class_has_no_labels(tmp_path, files, listed):
    made = source(put(tmp_path, empty(*files.split())))
    assert [made.describe(i) for i in range(len(made))] == [f"{tmp_path}/{name}" for name in listed.split()]
    assert made.labels is None and made.class_names is None


def test_a_link_loop_ends_and_a_file_reached_twice_is_listed_once(tmp_path):
    root = put(tmp_path, empty("root/real/a.jpg", "elsewhere/sub/b.jpg")) / "root"
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


def test_a_pipe_named_like_an_image_is_not_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert names(source(put(tmp_path, empty("a.jpg")))) == ["a.jpg"]


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    closed = put(tmp_path, empty("a.jpg", "closed/b.jpg")) / "closed"
    closed.chmod(0)
    try:
        with fails(r"cannot list .*closed \(Permission denied\): make it readable, or hide it"):
            source(tmp_path)
    finally:
        closed.chmod(0o700)


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


# ---------------------------------------------------------------- order


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """Sources of many lengths: every limit of a folder and of tar shards (one of them without images)."""
    root = tmp_path_factory.mktemp("ordered")
    put(root, empty(*(f"files/{i:02}.jpg" for i in range(40))))
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


# ---------------------------------------------------------------- COCO and VOC


def test_coco_boxes_are_shares_of_the_image_with_classes(tmp_path):
    made = source(put(tmp_path, coco()))
    boxes, classes = made.boxes(1)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.9, 0.8, 1.0, 1.0]]))
    assert classes.tolist() == [1, 0]
    assert made.boxes(2)[0].shape == (0, 4)
    assert made.boxes(2)[1].shape == (0,)


def test_coco_without_image_sizes_has_labels_and_asks_for_them_for_boxes(tmp_path):
    made = source(put(tmp_path, coco({**COCO, "images": [{"id": 9, "file_name": "b.jpg"}]})))
    assert made.labels.tolist() == [[1, 1, 0]]
    with fails("gives no width and height for .*b.jpg: add them"):
        made.boxes(0)


def test_voc_years_in_one_tree_are_named(tmp_path):
    put(tmp_path, LAYOUTS["VOC, two years"].files)
    assert source(tmp_path).name == "voc:VOC2007+VOC2012"


def test_voc_without_any_object_has_no_labels(tmp_path):
    put(tmp_path, voc({"x": []}, "test"))
    (tmp_path / "VOC2007/Annotations/x.xml").unlink()
    assert source(tmp_path, annotations="test").labels is None


# ---------------------------------------------------------------- tar shards


class Calls:
    """A progress callback that remembers how it was called."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path, kind):
    long = "d" * 90 + "/" + "é" * 40 + ".jpg"
    made = source(shard(tmp_path / "x.tar", {long: b"long", "b.jpg": b"b"}, kind))
    assert made.describe(0).endswith(long)
    assert [made.read(0), made.read(1)] == [b"long", b"b"]


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(put(tmp_path, empty("a_file")) / "a_file"))
    files = shards(tmp_path / "data")
    load_index(files)
    (index,) = (tmp_path / "data").glob(".mls-index-*.npz")
    index.unlink()
    index.mkdir()
    assert len(TarSource(files)) == 12


def test_traversal_names_are_only_read_and_links_and_devices_passed_over(tmp_path):
    secret = put(tmp_path, {"secret.jpg": b"secret"}) / "secret.jpg"
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


def test_a_shard_that_shrinks_after_indexing_is_an_os_error(tmp_path):
    (file,) = shards(tmp_path, 1)
    made = source(file)
    os.truncate(file, 600)
    with pytest.raises(OSError, match=r"shard-000\.tar became shorter after it was indexed"):
        made.read(3)


def test_a_folder_of_images_beside_a_tar_is_a_folder(tmp_path):
    shards(tmp_path, 1)
    put(tmp_path, empty("deep/er/a.jpg"))
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


# ---------------------------------------------------------------- where things are


def test_paths_may_use_home_and_the_data_variable(tmp_path, monkeypatch):
    put(tmp_path, {**empty("data/street/a.jpg", "work/note.txt"), **{f"data/tars/{n}": c for n, c in SHARDS.items()}})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "work")
    for text in ["~/data/street", "$MLS_DATA/street", "${MLS_DATA}/street", "street", "../data/street"]:
        assert names(source(text)) == ["a.jpg"]
    assert len(source("tars/shard-{000..001}.tar")) == 8
    put(tmp_path, empty("work/street/b.jpg"))
    assert names(source("street")) == ["b.jpg"]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_whatever_a_missing_path_is_called_the_answer_is_a_sentence(text):
    with fails("."):
        locate(f"/nowhere-at-all/{text}/x")


def test_the_embedded_scenes_need_no_root_and_take_a_limit():
    pytest.importorskip("mls.data.scenes")
    scenes = ScenesConfig(count=50, test_count=20)
    whole = build_source(DataConfig(source="scenes", scenes=scenes))
    some = build_source(DataConfig(source="scenes", scenes=scenes, limit=30))
    held_out = build_source(DataConfig(source="scenes", scenes=scenes, limit=30), "test")
    assert (len(whole), len(some), len(held_out)) == (50, 30, 20)
    assert torch.equal(whole.read(29), some.read(29))
