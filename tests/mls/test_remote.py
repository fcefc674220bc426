"""Shards from a real HTTP server on this machine: a good one, one that fails, one that cuts off, one that stalls."""

import hashlib
import http.server
import io
import json
import logging
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mls.config import DataConfig
from mls.data import Source, remote
from mls.data.listing import list_images
from mls.data.pack import Packing, pack
from mls.data.sources import build_source
from mls.errors import DataError


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` says how often each path still fails, and how."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.faults = folder, [], {}
        self.pause = 0.0  # seconds between the first half of a file and the second
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.server.requests.append(self.path.rpartition("/")[2])
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        fault, times = self.server.faults.get(name, ("", 0))
        if body and times:
            self.server.faults[name] = (fault, times - 1)
        if times and fault.isdigit():
            return self.send_error(int(fault))
        file = self.server.folder / name
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return None
        half = len(data) // 2
        self.wfile.write(data[:half])
        time.sleep(self.server.pause)
        if times and fault == "stall":
            time.sleep(2)
        if not (times and fault == "cut"):
            self.wfile.write(data[half:] if not (times and fault == "rot") else b"\xff" * (len(data) - half))
        return None

    def log_message(self, *arguments: object) -> None:
        pass


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (i % 256, 80, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With two shards of three images; the local copies go into tmp_path/cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    for n in range(2):
        with tarfile.open(folder / f"shard-{n}.tar", "w") as tar:
            for i in range(3):
                member = tarfile.TarInfo(f"{i}.jpg")
                member.size = len(picture(3 * n + i))
                tar.addfile(member, io.BytesIO(picture(3 * n + i)))
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with Server(folder) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def source(url: str) -> Source:
    return build_source(DataConfig(root=url))


def test_shards_come_once_and_are_read_as_local_ones(server: Server, tmp_path: Path) -> None:
    made = source(f"{server.url}/shard-{{0..1}}.tar")
    assert [made.read(i) for i in range(6)] == [picture(i) for i in range(6)]
    (folder,) = (tmp_path / "cache" / "shards").iterdir()
    assert made.describe(4) == f"{folder}/shard-1.tar:1.jpg"
    requests = [*server.requests]
    assert sorted(requests) == ["manifest.json", "shard-0.tar", "shard-1.tar"]
    again = source(f"{server.url}/shard-{{0..1}}.tar")
    assert [again.read(i) for i in range(6)] == [picture(i) for i in range(6)]
    assert server.requests[len(requests) :] == ["manifest.json"]


def test_without_the_server_the_copies_are_enough(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{server.url}/shard-0.tar"
    source(url)
    server.faults["manifest.json"] = ("503", 99)
    with caplog.at_level(logging.WARNING):
        assert len(source(url)) == 3
    assert "manifest.json did not come in 2 tries (last: HTTP 503)" in caplog.text


@pytest.mark.parametrize(("fault", "reason"), [("500", "HTTP 500"), ("cut", "."), ("rot", "checksum"), ("stall", ".")])
def test_a_server_that_fails_now_and_then_is_asked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, reason: str
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    digest = hashlib.sha256((server.folder / "shard-0.tar").read_bytes()).hexdigest()
    (server.folder / "manifest.json").write_text(json.dumps({"shards": {"shard-0.tar": {"sha256": digest}}}))
    server.faults["shard-0.tar"] = (fault, 2)
    with caplog.at_level(logging.WARNING):
        made = source(f"{server.url}/shard-0.tar")
    assert [made.read(i) for i in range(3)] == [picture(i) for i in range(3)]
    assert server.requests.count("shard-0.tar") == 3
    assert len([m for m in caplog.messages if "shard-0.tar did not come (" in m and reason in m]) == 2


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_a_server_that_goes_on_failing_ends_in_a_sentence(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    server.faults["shard-0.tar"] = (fault, 99)
    with pytest.raises(DataError) as caught:
        source(f"{server.url}/shard-0.tar")
    sentence = str(caught.value)
    assert sentence.startswith(f"{server.url}/shard-0.tar did not come in 5 tries (last: ")
    assert sentence.endswith("): check the server and start again") and "\n" not in sentence
    assert not list(tmp_path.glob("cache/shards/*/*.tar")), "half a shard must not look like one"
    assert not list(tmp_path.glob("cache/shards/*/.*.part"))


@pytest.mark.parametrize(("fault", "reason"), [("404", "not found"), ("403", "HTTP 403"), ("401", "HTTP 401")])
def test_a_server_that_says_no_is_not_asked_again(server: Server, fault: str, reason: str) -> None:
    server.faults["shard-0.tar"] = (fault, 99)
    with pytest.raises(DataError, match=rf"shard-0\.tar cannot be had \({reason}\): check the address"):
        source(f"{server.url}/shard-0.tar")
    assert server.requests.count("shard-0.tar") == 1


def test_a_slow_server_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 5.0)
    server.pause = 0.3
    assert len(source(f"{server.url}/shard-{{0..1}}.tar")) == 6


FETCH = """
import sys
from mls.config import DataConfig
from mls.data.sources import build_source
sys.stdout.buffer.write(build_source(DataConfig(root=sys.argv[1])).read(2))
"""


def test_processes_that_want_the_same_shard_load_it_once(server: Server) -> None:
    server.pause = 0.3
    command = [sys.executable, "-c", FETCH, f"{server.url}/shard-0.tar"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in both] == [picture(2)] * 2
    assert server.requests.count("shard-0.tar") == 1


def test_a_pack_behind_a_url_brings_its_class_names_and_a_new_one_replaces_the_copy(
    server: Server, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (images / name).parent.mkdir(parents=True)
        (images / name).write_bytes(picture(len(list_images(images))))
    url = f"{server.url}/pack/shard-000000.tar"
    for count in (2, 3):
        folder = server.folder / "pack"
        for file in folder.glob("*") if folder.exists() else ():
            file.unlink()
        pack(source(str(images)), folder, Packing())
        made = source(url)
        assert list(made.class_names) == ["cat", "dog"]
        assert len(made) == count
        (images / "dog/3.jpg").write_bytes(picture(9))


def test_passwords_and_signatures_are_not_shown(server: Server) -> None:
    server.faults["shard-0.tar"] = ("403", 99)
    url = server.url.replace("//", "//user:secret@") + "/shard-0.tar?signature=secret"
    with pytest.raises(DataError) as caught:
        source(url)
    assert "secret" not in str(caught.value)
    assert "shard-0.tar cannot be had" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1/images", r"http://127\.0\.0\.1/images does not end in \.tar: name the shards"),
        ("gs://bucket/a.tar", r'gs://bucket/a\.tar needs a package that is not installed: pip install "gcsfs"'),
        ("htp://host/a.tar", r"unknown protocol 'htp': did you mean 'http'\?"),
    ],
)
def test_mistakes_in_an_address_are_sentences(url: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        source(url)


def test_any_protocol_of_fsspec_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "other"))
    assert source(f"file://{server.folder}/shard-1.tar").read(0) == picture(3)
