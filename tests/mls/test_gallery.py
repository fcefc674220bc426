"""The gallery on a real run: what is shown is what the dictionary holds."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

import mls
from mls.core.matching import Matches
from mls.core.neighbour_lists import NeighbourLists
from mls.data.augment import Augment
from mls.data.crops import CropDataset
from mls.data.sources import build_source, hash_of_images
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.engine.gallery import gallery, in_whole_images, last_moment, row_crop
from mls.engine.replay import replay
from mls.errors import CheckpointError, DataError, UserError
from mls.frozen.match_picture import CELL, FRAME, HEADER, MARGIN, RED, WHOLE, GalleryRow, boxed, draw
from mls.models import build_pair
from mls.monitor.matches import EPOCH, SEED
from mls.monitor.moments import meaning

SMALL = """data.scenes.count=512 data.scenes.test_count=128 data.batch_size=64 dictionary.size=256 optim.epochs=2
objective.warmup_epochs=0 monitor.knn_every_epochs=1
engine.threads=1 monitor.knn_images=128 run.name=run""".split()
Train = Callable[..., Run]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    def call(*overrides: str) -> Run:
        root = tmp_path_factory.mktemp("runs")
        small = [one for one in SMALL if "objective.method=moco_v2" not in overrides or "objective." not in one]
        return mls.pretrain(mls.load_config("mls_scenes_tiny", [*small, *overrides, f"run.root={root}"]), quiet=True)

    return call


@pytest.fixture(scope="session")
def run(train: Train) -> Run:
    return train()


@pytest.fixture(scope="session")
def rows(run: Run) -> list[GalleryRow]:
    return gallery(run, queries=40)


def test_a_query_never_matches_its_own_image(run: Run, rows: list[GalleryRow]) -> None:
    held = set(memory_of(run)["ids"].tolist())
    assert any(row.query_id in held for row in rows)  # else nothing could have gone wrong
    assert all(row.query_id not in row.match_ids for row in rows)


def test_matches_come_nearest_first(rows: list[GalleryRow]) -> None:
    assert len(rows) == 40
    for row in rows:
        assert len(row.scores) == len(row.matches) == len(row.match_ids) == 10
        assert row.scores == sorted(row.scores, reverse=True)
        assert all(-1.0001 <= score <= 1.0001 for score in row.scores)
        assert {picture.shape for picture in [row.query, *row.matches]} == {(32, 32, 3)}
        assert {picture.dtype for picture in [row.query, *row.matches]} == {np.dtype("uint8")}


def test_no_row_that_is_left_out_is_nearer(run: Run, rows: list[GalleryRow]) -> None:
    """The same answer from the exported backbone and a plain sort."""
    assert_nearest(rows, run, lambda images: mls.load_backbone(run.path)(images), "backbone", count=10)


def assert_nearest(
    found: list[GalleryRow], run: Run, embed: Callable[[torch.Tensor], torch.Tensor], memory: str, count: int
) -> None:
    held = memory_of(run)
    crops = CropDataset(build_source(run.config.data), run.config.augment, SEED)
    batch = crops.__getitems__([(EPOCH, row.query_id) for row in found])
    with torch.no_grad():
        query = normalize(embed(Augment(run.config.augment, SEED, "cpu")(batch).images[0]), dim=1)
    for scores, row in zip(query @ held[memory].T, found, strict=True):
        others = scores[held["ids"] != row.query_id]
        assert row.scores == pytest.approx(sorted(others.tolist(), reverse=True)[:count], abs=1e-4)


def test_the_query_is_the_same_crop_in_every_run(run: Run, rows: list[GalleryRow]) -> None:
    source = build_source(run.config.data)
    crops = CropDataset(source, run.config.augment, SEED)
    batch = crops.__getitems__([(EPOCH, row.query_id) for row in rows[:4]])
    for crop, row in zip(batch.crops[0], rows, strict=False):
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), row.query)


def test_a_row_s_box_cuts_out_the_key_crop_again(run: Run) -> None:
    source, config = build_source(run.config.data), run.config
    memory = memory_of(run)
    crops = CropDataset(source, config.augment, config.run.seed)
    batch = crops.__getitems__([(2, int(image)) for image in memory["ids"]])  # 256 rows: all from the second epoch
    assert torch.equal(batch.boxes[1], memory["boxes"])
    for index, box in enumerate(memory["boxes"].tolist()):
        again = row_crop(source, config, int(memory["ids"][index]), box)
        assert torch.equal(again, batch.crops[1][index])


def memory_of(run: Run) -> dict:
    return Checkpoints(run.checkpoints, 1).newest()["method"]["_extra_state"]["dictionary"]


def test_crops_are_boxes_in_their_whole_images(run: Run, rows: list[GalleryRow]) -> None:
    source, row = build_source(run.config.data), rows[0]
    held = memory_of(run)
    places = held["boxes"].double().numpy().round(4).tolist()
    boxes = {(image, tuple(box)) for image, box in zip(held["ids"].tolist(), places, strict=True)}
    assert {(image, tuple(box)) for image, box in zip(row.match_ids, row.match_boxes or [], strict=True)} <= boxes
    (whole,) = in_whole_images([row], source)
    assert {picture.shape for picture in [whole.query, *whole.matches]} == {(WHOLE, WHOLE, 3)}
    x0, y0, x1, y1 = (round(share * WHOLE) for share in row.query_box or ())
    top, left = whole.query[y0, x0:x1], whole.query[y0:y1, x0]
    assert all(reddish(tuple(colour)) for colour in [*top, *left])
    enlarged = source.read(row.query_id).permute(1, 2, 0).numpy().repeat(WHOLE // 32, 0).repeat(WHOLE // 32, 1)
    inside = slice(y0 + FRAME, y1 - FRAME), slice(x0 + FRAME, x1 - FRAME)
    assert np.array_equal(whole.query[inside], enlarged[inside])


def test_a_wide_image_keeps_its_shape() -> None:
    drawn = boxed(np.zeros((60, 120, 3), np.uint8), [((0.5, 0.0, 1.0, 1.0), RED)])
    assert (drawn[: WHOLE // 4] == 255).all() and (drawn[-WHOLE // 4 :] == 255).all()
    assert reddish(tuple(drawn[WHOLE // 4 + 1, WHOLE - 1])) and not drawn[WHOLE // 2, : WHOLE // 2].any()


def test_shared_labels_are_told_from_the_true_labels(run: Run, rows: list[GalleryRow]) -> None:
    labels = build_source(run.config.data).labels
    told = [shared for row in rows for shared in row.shared]
    true = [bool((labels[i] * labels[row.query_id]).any()) for row in rows for i in row.match_ids]
    assert told == true
    assert {True, False} == set(told)


def test_the_same_run_gives_the_same_gallery(run: Run, rows: list[GalleryRow]) -> None:
    again = gallery(str(run.path), queries=40)
    assert [row.match_ids for row in again] == [row.match_ids for row in rows]


def test_labels_from_the_projection_are_looked_up_there(train: Train, rows: list[GalleryRow]) -> None:
    other = train("objective.labels_from=projection", "objective.k=4")
    found = gallery(other, queries=5)
    assert [len(row.matches) for row in found] == [4] * 5  # no more rows than k are positives
    encoder = build_pair(other.config.model, seed=1).query
    state = Checkpoints(other.checkpoints, 1).newest()["method"]
    encoder.load_state_dict({k.removeprefix("pair.query."): v for k, v in state.items() if k.startswith("pair.query.")})
    assert_nearest(found, other, lambda images: encoder.eval()(images)[1], "projection", count=4)
    assert [row.query_id for row in found] == [row.query_id for row in rows[:5]]


def test_other_methods_have_nearest_rows_too(train: Train) -> None:
    run = train("objective.method=moco_v2", "objective.windows.count=2", "objective.windows.size=16")
    assert [setting.k for setting in replay(run, [1, 2], ["intersection"]).settings] == [1, 2]
    assert [len(row.matches) for row in gallery(run, queries=2)] == [10, 10]
    assert meaning(run.config).startswith("its nearest rows")


def test_the_words_say_when_no_row_was_chosen() -> None:
    chosen = "the rows chosen as its positives"
    assert meaning(mls.load_config("mls_scenes_tiny")) == chosen
    assert meaning(mls.load_config("mls_scenes_tiny", ["objective.pseudo_labels=random"])) != chosen


def test_nothing_to_show_is_one_sentence(train: Train, run: Run, tmp_path: Path) -> None:
    fresh = Run.create(mls.load_config("mls_scenes_tiny", [*SMALL, f"run.root={tmp_path}"]))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        gallery(fresh)
    with pytest.raises(UserError, match="is not a run folder"):
        gallery(tmp_path)
    state = Checkpoints(run.checkpoints, 1).newest()
    state["step"] = 0
    Checkpoints(fresh.checkpoints, 1).save(1, state)
    with pytest.raises(CheckpointError, match="has not been trained yet: train for at least one step"):
        gallery(fresh)


def test_images_that_are_gone_are_one_sentence(train: Train, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(64):
        Image.fromarray(noise.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(tmp_path / f"{number:02d}.png")
    run = train("data.source=folder", f"data.root={tmp_path}", "dictionary.size=64")
    found = gallery(run, queries=2)
    assert found[0].shared is None
    kept = Path(shutil.copytree(tmp_path, tmp_path.with_name("kept")))
    for number in range(64):
        if number not in {row.query_id for row in found}:
            (tmp_path / f"{number:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"\d\d.png cannot be read any more .*: bring it back"):
        gallery(run, queries=2)
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError):
        gallery(run, queries=2)
    shutil.copytree(kept, tmp_path)
    assert [row.match_ids for row in gallery(run, queries=2)] == [row.match_ids for row in found]


def rgb(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    return picture.getpixel((x, y))


def reddish(colour: tuple[int, int, int]) -> bool:
    return colour[0] > 180 and colour[1] < 80 and colour[2] < 80


def yellowish(colour: tuple[int, int, int]) -> bool:
    return colour[0] > 200 and colour[1] > 150 and colour[2] < 80


def test_the_query_stands_in_red_and_its_matches_in_yellow(rows: list[GalleryRow]) -> None:
    picture = draw(rows[:3])
    assert rgb(picture, 1, 1) == (255, 255, 255)
    assert reddish(rgb(picture, MARGIN + 1, HEADER + CELL // 2))
    assert reddish(rgb(picture, MARGIN + FRAME + CELL // 2, HEADER + 1))
    across = [rgb(picture, x, HEADER + 1) for x in range(picture.width)]
    assert sum(map(reddish, across)) == CELL + 2 * FRAME
    assert sum(map(yellowish, across)) == 10 * (CELL + 2 * FRAME)
    inside = np.asarray(picture)[HEADER + FRAME :, MARGIN + FRAME :][:CELL, :CELL]
    assert np.array_equal(inside, rows[0].query.repeat(3, 0).repeat(3, 1))  # tiny crops are enlarged pixel by pixel


def test_a_tick_is_drawn_where_a_label_is_shared(rows: list[GalleryRow]) -> None:
    row = rows[0]
    greens = []
    for shared in ([False] * 10, [True] + [False] * 9, [True] * 10, None):
        pixels = np.asarray(draw([replace(row, shared=shared)])).astype(int)
        below = pixels[HEADER + CELL + 2 * FRAME :]  # crops may be green themselves
        greens.append(int(((below[..., 1] > below[..., 0] + 40) & (below[..., 1] > below[..., 2] + 30)).sum()))
    assert greens[0] == greens[3] == 0
    assert greens[1] > 5
    assert greens[2] == 10 * greens[1]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 5)), min_size=0, max_size=4))
def test_crops_of_any_size_and_number_can_be_drawn(shapes: list[tuple[int, int]]) -> None:
    crop = lambda size: np.full((size, size, 3), 128, dtype=np.uint8)
    rows = [GalleryRow(crop(s), [crop(s)] * n, [0.5] * n, None, 0, [1] * n) for s, n in shapes]
    picture = draw(rows)
    across = [yellowish(rgb(picture, x, HEADER + 1)) for x in range(picture.width)] if rows else []
    assert sum(across) == (shapes[0][1] if shapes else 0) * (CELL + 2 * FRAME)


# ------------------------------------------------------------------------------------------------- replay


def test_replay_scores_what_other_settings_would_choose(run: Run, tmp_path: Path) -> None:
    source, held = build_source(run.config.data), memory_of(run)
    ids = (torch.arange(len(source))[:, None] + torch.arange(1, 6)) % len(source)
    facts = {"images": hash_of_images(source)}
    NeighbourLists.of(Matches(ids, torch.ones(ids.shape)), facts).save(tmp_path / "lists")
    found = replay(run, [3, 30], ["backbone", "union"], [tmp_path / "lists"])
    settings = {(setting.labels_from, setting.k): setting for setting in found.settings}
    assert "not of trainings" in found.note and found.rows == len(held["ids"]) and len(settings) == 6
    assert settings["backbone", 30].matches == 30 > run.config.objective.k  # more than the run took
    assert 30 < settings["union", 30].matches < 60 and settings[str(tmp_path / "lists"), 30].matches < 5
    moment, labels = last_moment(run), source.labels
    assert labels is not None
    shares = [
        [bool((labels[query.id] * labels[match.id]).any()) for match in query.matches["features"][:3]]
        for query in moment.queries
    ]
    scored = settings["backbone", 3].labels
    assert scored is not None and scored.precision[-1] == pytest.approx(np.mean(shares))
    assert moment.labels is not None and scored.recall == pytest.approx(moment.labels.recall["features"][:3], abs=1e-3)
    assert scored.chance == pytest.approx(moment.labels.chance, abs=1e-3)
    assert {row.name for row in settings["backbone", 3].nuisances} == {"layout", "colour", "geometry", "thumbnail"}


def test_replay_tells_what_it_cannot_replay(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than the 100 matches"):
        replay(run, [101], ["backbone"])
    NeighbourLists.of(Matches(torch.zeros(512, 1).long(), torch.ones(512, 1)), {"images": "other"}).save(tmp_path / "l")
    with pytest.raises(DataError, match="not of the images in"):
        replay(run, [3], [], [tmp_path / "l"])
