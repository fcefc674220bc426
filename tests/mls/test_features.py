"""Cached features: the same rows after kills, damage and full disks."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mls.errors import UserError
from mls.frozen.features import BLOCK, CachedFeatures, _in_blocks, cached_features

COUNT = 3 * BLOCK + 17
ROWS = torch.arange(COUNT * 4, dtype=torch.float32).view(COUNT, 4)
FACTS = {"weights": "abc", "size": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path))
    return tmp_path


class Counting:
    """Yields the rows from a start on, and stores the starts."""

    def __init__(self, batch: int = 100, stop_after: int = COUNT) -> None:
        self.batch, self.stop_after, self.starts = batch, stop_after, []

    def __call__(self, start: int) -> Iterator[Tensor]:
        self.starts.append(start)
        for at in range(start, COUNT, self.batch):
            if at > self.stop_after:
                raise KeyboardInterrupt
            yield ROWS[at : at + self.batch]


def cached(compute: Counting) -> CachedFeatures:
    return cached_features(FACTS, COUNT, compute, quiet=True)


@given(st.lists(st.integers(1, 600), max_size=6))
def test_blocks_hold_the_rows_of_the_batches_in_order(sizes: list[int]) -> None:
    rows = torch.arange(float(sum(sizes)))[:, None]
    blocks = list(_in_blocks(iter(rows.split(sizes)), BLOCK, "<f4"))
    assert [len(block) for block in blocks[:-1]] == [BLOCK] * (len(blocks) - 1)
    assert np.concatenate([rows.numpy()[:0], *blocks]).tolist() == rows.tolist()


def test_features_are_computed_once_and_read_from_a_file_that_numpy_reads_too() -> None:
    first, again = Counting(), Counting()
    found, reread = cached(first), cached(again)
    assert torch.equal(found.features, ROWS) and torch.equal(reread.features, ROWS)
    assert first.starts == [0] and again.starts == []
    assert found.sha256 == reread.sha256
    assert np.array_equal(np.load(found.folder / "features.npy", mmap_mode="r"), ROWS.numpy())


def test_other_facts_are_other_features() -> None:
    cached(Counting())
    other = Counting()
    cached_features(FACTS | {"size": 64}, COUNT, other, quiet=True)
    assert other.starts == [0]


def test_an_interrupted_extraction_goes_on_from_its_last_whole_block() -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(Counting(stop_after=2 * BLOCK + 5))
    again = Counting(batch=33)
    assert torch.equal(cached(again).features, ROWS)
    assert again.starts == [2 * BLOCK]


@pytest.mark.parametrize(("damaged_row", "goes_on_from"), [(0, 0), (BLOCK + 3, BLOCK), (COUNT - 1, 3 * BLOCK)])
def test_a_damaged_file_is_noticed_and_completed(damaged_row: int, goes_on_from: int) -> None:
    whole = cached(Counting())
    path = whole.folder / "features.npy"
    digest, data = whole.sha256, bytearray(path.read_bytes())
    data[len(data) - 16 * (COUNT - damaged_row)] ^= 1
    del whole
    path.write_bytes(data)
    again = Counting()
    found = cached(again)
    assert torch.equal(found.features, ROWS) and found.sha256 == digest
    assert again.starts == [goes_on_from]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dim": 4}', '{"dim": "x", "blocks": []}'])
def test_a_damaged_index_means_starting_anew(text: str) -> None:
    folder = cached(Counting()).folder
    (folder / "features.json").write_text(text)
    assert torch.equal(cached(Counting()).features, ROWS)
    assert json.loads((folder / "features.json").read_text())["dim"] == 4


def test_writing_to_the_tensor_leaves_the_file_as_it_is() -> None:
    cached(Counting()).features.zero_()
    again = Counting()
    assert torch.equal(cached(again).features, ROWS) and again.starts == []


def test_a_full_disk_is_one_sentence() -> None:
    folder = cached(Counting()).folder
    (folder / "features.npy").unlink()
    (folder / "features.npy").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no disk space left .*MLS_CACHE"):
        cached(Counting())


def test_a_killed_process_loses_one_block_at_most(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time, torch
        from mls.frozen.features import cached_features
        rows = torch.arange({COUNT} * 4, dtype=torch.float32).view({COUNT}, 4)
        def compute(start):
            for at in range(start, {COUNT}, 64):
                time.sleep(0.05)
                yield rows[at : at + 64]
        cached_features({FACTS!r}, {COUNT}, compute)
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    index = lambda: [json.loads(p.read_text()) for p in tmp_path.glob("features/*/features.json")]
    while not index() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    blocks = len(index()[0]["blocks"])
    assert 0 < blocks < 4
    again = Counting()
    assert torch.equal(cached(again).features, ROWS)
    assert again.starts[0] >= blocks * BLOCK
