"""Which images make up which step, and how a mistake in the data reaches the user from a worker."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mls.config import AugmentConfig, Config, DataConfig, EngineConfig
from mls.data.listing import FileSource
from mls.data.loader import Loader, StepSampler, steps_per_epoch
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
