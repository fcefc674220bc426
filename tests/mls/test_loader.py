"""Which images make up which step, and how a mistake in the data reaches the user from a worker."""

import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from mls.config import AugmentConfig, Config, DataConfig, EngineConfig
from mls.data import Batch
from mls.data.listing import FileSource
from mls.data.loader import Loader, StepSampler, remedy, steps_per_epoch
from mls.data.sources import build_source
from mls.distributed import Process
from mls.errors import ConfigError, DataError

ALONE = Process(0, 1, torch.device("cpu"))
Steps = list[list[tuple[int, int]]]  # the (epoch, id) pairs of every step


@st.composite
def trainings(draw: st.DrawFn) -> tuple[FileSource, Config, int]:
    """A source, a configuration and the number of processes its batch divides into."""
    world, accumulate, part = (draw(st.integers(1, 4)) for _ in range(3))
    batch = world * accumulate * part
    images = draw(st.integers(batch, 4 * batch + 3))
    source = FileSource("numbers", Path("."), [b"%d.jpg" % i for i in range(images)])
    config = Config(data=DataConfig(batch_size=batch), engine=EngineConfig(accumulate=accumulate))
    return source, replace(config, run=replace(config.run, seed=draw(st.integers(0, 3)))), world


def put_together(source: FileSource, config: Config, world: int, first: int, last: int) -> Steps:
    """What all processes see, step by step: their micro-batches side by side."""
    ranks = [StepSampler(source, config, Process(r, world, ALONE.device), first, last) for r in range(world)]
    rounds = list(zip(*ranks, strict=True))
    assert len(rounds) == len(ranks[0])
    per_step = config.engine.accumulate
    steps = [rounds[start : start + per_step] for start in range(0, len(rounds), per_step)]
    return [[pair for micro in step for part in micro for pair in part] for step in steps]


@given(trainings())
def test_processes_and_micro_batches_do_not_change_what_a_step_sees(training: tuple[FileSource, Config, int]) -> None:
    source, config, world = training
    last = 2 * steps_per_epoch(source, config) + 1
    alone = put_together(source, replace(config, engine=EngineConfig(accumulate=1)), 1, 1, last)
    assert len(alone) == last
    assert put_together(source, config, world, 1, last) == alone


@given(trainings(), st.data())
def test_a_resume_goes_on_with_the_tail_of_the_whole_sequence(
    training: tuple[FileSource, Config, int], data: st.DataObject
) -> None:
    source, config, world = training
    last = 2 * steps_per_epoch(source, config) + 1
    first = data.draw(st.integers(1, last))
    for rank in range(world):
        whole, rest = (
            list(StepSampler(source, config, Process(rank, world, ALONE.device), start, last)) for start in (1, first)
        )
        assert rest == whole[(first - 1) * config.engine.accumulate :]


@given(trainings())
def test_an_epoch_shows_an_image_at_most_once_and_leaves_out_less_than_a_batch(
    training: tuple[FileSource, Config, int],
) -> None:
    source, config, world = training
    last = 3 * steps_per_epoch(source, config)
    shown = Counter(pair for step in put_together(source, config, world, 1, last) for pair in step)
    assert set(shown.values()) == {1}
    for epoch in (1, 2, 3):
        ids = {index for at, index in shown if at == epoch}
        assert ids <= set(range(len(source)))
        assert len(source) - len(ids) < config.data.batch_size


def test_a_batch_that_does_not_divide_into_the_processes_is_one_sentence() -> None:
    source = FileSource("numbers", Path("."), [b"0.jpg"] * 8)
    config = Config(data=DataConfig(batch_size=8))
    with pytest.raises(
        ConfigError, match=r"data\.batch_size 8 does not divide into 3 processes × engine\.accumulate 1"
    ):
        StepSampler(source, config, Process(0, 3, ALONE.device), 1, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_is_the_same_one_sentence_from_a_worker(tmp_path: Path, workers: int) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    data = DataConfig(root=str(tmp_path), batch_size=2, workers=workers)
    config = Config(data=data, augment=AugmentConfig(size=8))
    loader = Loader(build_source(data), config, ALONE, first=1, last=2)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert type(caught.value) is DataError
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path}/")
    assert "and 20 images tried in its place cannot be read (last: " in sentence
    assert sentence.endswith("check that data.root holds whole image files you may read")
    assert "\n" not in sentence
    assert "worker" not in sentence


def photographs(root: Path, count: int = 12) -> DataConfig:
    """Large enough for scaled decoding; one cannot be read."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    for i in range(count):
        photo.crop((4 * i, 0, 400 + 4 * i, 300)).save(root / f"{i:02}.jpg")
    (root / "05.jpg").write_bytes(b"no image")
    return DataConfig(root=str(root), batch_size=4, workers=0)


def same(first: Batch, second: Batch) -> bool:
    pairs = zip([*first.crops, *first.boxes, first.ids], [*second.crops, *second.boxes, second.ids], strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and first.epoch == second.epoch


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on a small machine
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [1, 4])
def test_crops_are_the_same_for_any_number_of_workers_and_after_a_resume(
    tmp_path: Path, workers: int, accumulate: int
) -> None:
    """Each batch is compared when the step that it belongs to would use it: later its memory is another one's."""
    data, engine = photographs(tmp_path), EngineConfig(accumulate=accumulate)
    config = Config(data=data, augment=AugmentConfig(size=48), engine=engine)
    source, last = build_source(data), 9
    alone = list(Loader(source, config, ALONE, 1, last))
    for first in (1, 5):
        loader = iter(Loader(source, replace(config, data=replace(data, workers=workers)), ALONE, first, last))
        for step in range(first, last + 1):
            micro_batches = [next(loader) for _ in range(accumulate)]
            time.sleep(0.02)  # long enough for a worker to be as far ahead as it may be
            expected = alone[(step - 1) * accumulate : step * accumulate]
            assert all(map(same, micro_batches, expected))
        assert next(loader, None) is None


def test_the_remedy_for_waiting_is_workers_first_and_packing_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photographs(tmp_path)
    source = build_source(data)
    monkeypatch.setattr("mls.data.loader.cores", lambda: 6)
    assert remedy(source, Config(data=data)) == "set data.workers=6 (now 0; this process has 6 cores)"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert "set data.workers=2 (now 1;" in remedy(source, Config(data=replace(data, workers=1)))
    busy = Config(data=replace(data, workers=2))
    assert remedy(source, busy).startswith(f"pack the images, `mls data pack --short-side 320 {tmp_path} NEW_FOLDER`")
    scenes = build_source(DataConfig(source="scenes", limit=4))
    assert "mls bench input" in remedy(scenes, busy)


UNCAUGHT = """
import torch
from mls.data.loader import in_workers

class Numbers:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.tensor(index)

def main():
    numbers = in_workers(Numbers(), 1)
    next(numbers)
    raise LookupError("nobody catches it")

main()
"""


def test_a_process_that_ends_by_an_uncaught_error_does_not_wait_for_its_workers() -> None:
    done = subprocess.run([sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("LookupError: nobody catches it")
