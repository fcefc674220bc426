"""The fast reader of tar headers says of any shard what tarfile says, and reads each header once."""

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mls.config import DataConfig, ScenesConfig
from mls.data import tarindex
from mls.data.pack import Packing, pack
from mls.data.sources import build_source
from mls.data.tarindex import index_files, load_index, scan, stamp_of

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "x" * 120 + ".jpg"  # ustar cannot hold it
NAMES = st.sampled_from(["a.jpg", "b/c.png", "d.json", "d.cls", "ä.jpg", LONG, "f" * 90 + "/g.jpg", ".jpg"])
MEMBER = st.tuples(NAMES, st.sampled_from(["0", "5", "2", "x"]), st.integers(0, 1600), st.sampled_from([0, 7, 1.5]))


def shard_of(members: list[tuple[str, str, int, float]], form: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[form]) as tar:
        for name, kind, size, time in members:
            member = tarfile.TarInfo("x.jpg" if name == LONG and form == "ustar" else name)
            member.mtime, member.type = time if form == "pax" else int(time), kind.encode()
            if kind == "x":  # a file with an extended header that may say something
                member.type, member.pax_headers = tarfile.REGTYPE, {"comment": "x"} if form == "pax" else {}
            member.size, member.linkname = size * member.isreg(), "a.jpg" * (kind == "2")
            tar.addfile(member, io.BytesIO(b"3" * member.size))
    return stream.getvalue()


@given(st.lists(MEMBER, max_size=6), st.sampled_from(sorted(FORMATS)), st.data())
def test_any_shard_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, str, int, float]], form: str, data: st.DataObject
) -> None:
    content = bytearray(shard_of(members, form))
    damage = data.draw(st.sampled_from(["none", "cut", "changed", "zeros"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if damage == "cut":
        del content[place:]
    elif damage != "none":
        content[place : place + 1] = b"\0" if damage == "zeros" else b"!"
    path = tmp_path_factory.getbasetemp() / "shard.tar"
    path.write_bytes(content)
    assert members_of(path, plain=True) == members_of(path, plain=False)


def members_of(path: Path, plain: bool) -> list[object]:
    """The members, and the damage; `plain`: by the fast reader as far as it goes."""
    found: list[object] = []
    with pytest.MonkeyPatch.context() as patch, open(path, "rb") as file:
        if not plain:
            patch.setattr(tarindex, "KINDS", ())  # nothing is plain enough for it
            patch.setattr(tarindex, "IDLE", ())
        try:
            found += tarindex._members(file)
        except (tarfile.TarError, ValueError) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("form", ["ustar", "pax"])
def test_headers_are_read_once_and_tarfile_parses_none_but_the_end(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(shard_of([(f"{i}.jpg", "0", 5000, 1.5) for i in range(200)], form))
    read, parsed = [], []
    pread, next_ = os.pread, tarfile.TarFile.next
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(size) or pread(file, size, at))
    monkeypatch.setattr(tarfile.TarFile, "next", lambda tar: parsed.append(tar) or next_(tar))
    assert len(scan(path, stamp_of(path)).names) == 200
    assert len(read) <= 201 and sum(read) <= 201 * tarindex.WINDOW
    assert len(parsed) <= 2


def test_many_shards_are_read_in_processes_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [tmp_path / f"{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        shard.write_bytes(shard_of([(f"{i}.jpg", "0", 10 * number, 0) for i in range(20)], "ustar"))
    alone = [part.fingerprint for part in load_index(shards)]
    index_files(shards)[0].unlink()
    here = os.getpid()
    monkeypatch.setattr(tarindex, "LARGE", 0)
    monkeypatch.setattr(tarindex, "cores", lambda: 2)
    monkeypatch.setattr(tarindex, "scan", lambda *some: pytest.fail("here") if os.getpid() == here else scan(*some))
    assert [part.fingerprint for part in load_index(shards)] == alone


def test_a_pack_comes_with_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = build_source(DataConfig(source="scenes", scenes=ScenesConfig(count=20)))
    pack(scenes, tmp_path / "packed", Packing(per_shard=8))
    monkeypatch.setattr(tarindex, "scan", lambda *arguments: pytest.fail("a shard was read"))
    assert len(build_source(DataConfig(root=str(tmp_path / "packed")))) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_processes_that_read_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Each has more to hand over than a pipe holds."""
    code = """import multiprocessing, sys, time
from mls.data.loader import in_workers
class Large:
    __len__ = lambda self: 100
    __getitem__ = lambda self, number: b"x" * (1 << 20)
items = in_workers(Large(), 2)
next(items)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [Path(f"/proc/{number}") for number in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 120
    while any(path.exists() and "zombie" not in (path / "status").read_text() for path in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
