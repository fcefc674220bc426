"""The page of `mls report`: of runs that nobody trained, read by a parser and driven in a browser, if there is one."""

import json
import math
import operator
import os
import re
import shlex
import shutil
import subprocess
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mls
from mls.data.sources import build_source
from mls.engine import Run
from mls.errors import DataError, UserError
from mls.locks import locked
from mls.monitor import moments
from mls.monitor.log import rows_and_odd_lines
from mls.tools.report import curves, report
from mls.tools.report.curves import CHARTS, MOST_POINTS, Axis, Log, _add, _collect, read_log
from mls.tools.report.facts import Card, notes_of_recipe, tiles
from mls.tools.report.gallery import Atlas, Gallery, sources_of
from mls.tools.report.labels import KINDS, PAIRS
from mls.tools.report.page import Section, _section

QUERIES = 20
VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path", "image"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(1)</script>&\"' {{ 7 * 7 }} "
Make = Callable[..., Any]


class Page(HTMLParser):
    """Complains about anything that is not closed in order; collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.words.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li", "dd", "dt"):
            self.handle_data(" ")
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words[tag][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words["main"]).split())

    def rows(self) -> set[str]:
        return {" ".join(row.split()) for row in self.words["tr"]}

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(re.search(r'id="data">(.*?)</script>', self.source)[1])


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Page]:
    def make(*runs: Run) -> Page:
        out = tmp_path_factory.mktemp("pages") / "page.html"
        report([str(run.path) for run in runs], out)
        return Page(out)

    return make


@pytest.fixture(scope="module")
def runs(synthetic_run_of_module: Make) -> list[Run]:
    """Six; the second has no labels, another k, and was resumed, the last four kept no moments."""
    make = synthetic_run_of_module
    second = make("second", "objective.k=4", "monitor.log_every=7", labels=False)
    with open(second.path / "events.jsonl", "a") as file:
        for event, second_of_minute in (("stop", "45"), ("resume", "49")):
            row = {"event": event, "step": 4, "time": f"2027-01-15T08:00:{second_of_minute}+00:00"}
            file.write(json.dumps(row) + "\n")
    more = [make(f"run{number}", f"optim.lr=0.{number}") for number in range(3, 7)]
    first = make("first", row=lambda step: {"labels/precision": 0.4, "labels/precision_chance": 0.3})
    for run in (first, second):
        for moment in moments.read(run.path):  # fewer queries: what they have in common takes most of the time
            moments.write(run.path, replace(moment, queries=moment.queries[:QUERIES]))
    for run in more:
        shutil.rmtree(run.path / moments.FOLDER)
    return [first, second, *more]


@pytest.fixture(scope="module")
def pages(runs: list[Run], page_of: Callable[..., Page]) -> dict[int, Page]:
    """By the number of runs; 0: of one without labels."""
    return {0: page_of(runs[1]), **{count: page_of(*runs[:count]) for count in (1, 2, 6)}}


@pytest.fixture(scope="module")
def by_regions(synthetic_run_of_module: Make, page_of: Callable[..., Page]) -> Page:
    """Of a run whose labels come from regions, of which two match in each pair of images."""
    run = synthetic_run_of_module("regions", "objective.labels_from=regions", "objective.regions.grid=3")
    for moment in moments.read(run.path):
        listed = lambda query: {"regions": query.matches["features"], **query.matches}
        pairs = [(0, 8), (4, 2), (-1, -1), (1, 9), (2, 2)]  # of 9 windows
        queries = [replace(query, matches=listed(query), regions=pairs) for query in moment.queries]
        moments.write(run.path, replace(moment, queries=queries))
    return page_of(run)


# ------------------------------------------------------------------------------------------------ what the page holds


def test_the_command_prints_where_the_page_is_and_what_pairs_come_to(
    runs: list[Run], tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("report", "first", "--out", str(tmp_path), MLS_RUNS=str(runs[0].path.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    done = mls_command("report", str(tmp_path))
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="0 runs were named: name one to 8, or --judged FILE"):
        report()
    copies = [str(shutil.copytree(runs[-1].path, tmp_path / f"run{number}")) for number in range(9)]
    with pytest.raises(UserError, match="9 runs were named: name one to 8"):
        report(copies)


def test_the_page_needs_nothing_but_itself_and_runs_only_its_own_script(pages: dict[int, Page]) -> None:
    for page in pages.values():
        source = re.sub(r"data:[^\"]*|<script.*?</script>", "", page.source, flags=re.DOTALL)
        assert not re.search(r"https?:|url\(|@import|javascript:| style=", source)
        links = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
        assert links
        assert all(link.startswith(("data:", "#")) for link in links)
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        policy = next(tag["content"] for tag in page.all("meta") if "http-equiv" in tag)
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
        assert len(page.source) < (3_000_000 if page is pages[1] else 10_000_000)


def test_names_are_unique_headings_in_order_and_links_lead_somewhere(pages: dict[int, Page]) -> None:
    for page in pages.values():
        ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
        assert set(ids.values()) == {1}
        targets = [tag["href"][1:] for tag in page.all("a")] + [tag["aria-labelledby"] for tag in page.all("section")]
        assert [target for target in targets if target not in ids] == []
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
    assert pages[1].words["title"][0] == "first – mls report"


def test_evidence_of_every_finding_is_on_the_page(pages: dict[int, Page]) -> None:
    ids = {attributes.get("id") for _, attributes in pages[1].tags}
    source = (Path(mls.__file__).parent / "monitor" / "verdict.py").read_text()
    charts = {chart.id for charts in CHARTS.values() for chart in charts}
    named = set(re.findall(r'"(chart-[\w-]+|nuisance|labels|judge|curves|state)"', source))
    assert len(named) > 8
    assert named <= ids | charts


def test_numbers_are_those_of_the_files(runs: list[Run], pages: dict[int, Page]) -> None:
    rows, page, run = runs[0].metrics(), pages[1], pages[1].data["charts"]["runs"][0]
    for name in run:
        x = page.data["charts"]["xs"][run[name]["x"]]
        known = [(row["step"], row[name]) for row in rows if name in row]
        assert x["step"] == [step for step, _ in known]
        assert run[name]["y"] == pytest.approx([value for _, value in known])
        assert x["hours"] == pytest.approx([(step - 1) / 360 for step, _ in known], abs=1e-5)
        assert x["epoch"] == [step / 2 for step, _ in known]
        assert x["images"] == [128 * step for step, _ in known]
        assert f"{name} {known[-1][1]:.4g} step 8" in page.rows()
    moment = moments.read(runs[0].path)[-1]
    scores = sorted(match.score for query in moment.queries for match in query.matches["features"])
    assert any(row.startswith(f"Score of a match {np.median(scores):.3f} ") for row in page.rows())
    shown = page.data["runs"][0]["shown"]
    assert [each["step"] for each in shown] == [2, 4, 8]
    for number, query in enumerate(moment.queries):
        one = shown[-1]["queries"][number]
        assert one[0] == query.id
        assert [match[0] for match in one[3]["features"]] == [match.id for match in query.matches["features"]]
        rows = [{(match.id, match.box) for match in matches} for matches in query.matches.values()]
        assert one[2] == len(rows[0] & rows[1]) / 5
    for memory, words in (("features", "backbone (g)"), ("projections", "projection (z)")):
        scores = [match.score for query in moment.queries for match in query.matches[memory]]
        for x, y in zip(*page.data["runs"][0]["scores"][f"{words}, matches"].values(), strict=True):
            below, up_to = (np.mean([f(round(score, 4), x) for score in scores]) for f in (operator.lt, operator.le))
            assert below <= y / 100 + 0.01 <= up_to + 0.02
        every = page.data["runs"][0]["scores"][f"{words}, all rows"]
        assert dict(zip(every["y"], every["x"], strict=True))[50] == moment.scores[memory][10]
    labels = sources_of([Card.of(runs[0], "first")])[0][0].labels
    hits = [[bool((labels[q.id] * labels[m.id]).any()) for m in q.matches["features"]] for q in moment.queries]
    for rank in (1, 2, 3, 5):
        assert any(row.startswith(f"{rank} {np.mean(np.array(hits)[:, :rank]):.3f} ") for row in page.rows())
    shares = f"{moment.agreement['features'].share:.3f} {moment.agreement['projections'].share:.3f}"
    assert f"8 4 {shares} {moment.agreement_of_memories.share:.3f} 0.100 0.100" in page.rows()
    most = Counter((match.id, match.box) for query in moment.queries for match in query.matches["features"])
    often = f"Queries that match the most matched row {most.most_common(1)[0][1]} of {len(moment.queries)} "
    assert any(row.startswith(often) for row in page.rows())


def test_labels_are_judged_with_truth_and_without(pages: dict[int, Page]) -> None:
    assert "Against true labels" in pages[1].text
    assert "layout where light and dark lie" in pages[1].text
    assert "labels beat chance" in pages[1].text
    assert {"layout", "colour", "geometry", "thumbnail"} <= {row.split()[0] for row in pages[1].rows()}
    hubs = [row for row in pages[1].words["li"] if "queries match this crop" in row]
    assert len(hubs) == 24
    kinds = Counter(pair[0] for pair in pages[1].data["runs"][0]["pairs"])
    assert sum(kinds.values()) == PAIRS
    assert set(kinds.values()) == {33, 34}
    assert list(kinds) != list(KINDS) or [pair[0] for pair in pages[1].data["runs"][0]["pairs"][:3]] != list(KINDS)


def test_regions_that_match_are_boxes_of_their_images(by_regions: Page) -> None:
    lists = by_regions.data["runs"][0]["shown"][-1]["queries"][0][3]
    corner, far = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]  # the first and the last window of the grid, half a side
    assert [match[6:] for match in lists["regions"]][:4] == [
        [[corner, far]],
        [[[0.25, 0.25, 0.75, 0.75], [0.5, 0, 1, 0.5]]],
        [],
        [],
    ]
    assert {len(match) for match in lists["features"]} == {6}
    assert by_regions.data["memories"]["regions"] == "regions"


def test_what_replay_has_found_stands_on_the_page(synthetic_run: Make, page_of: Callable[..., Page]) -> None:
    from mls.engine.replay import Replay, Setting
    from mls.monitor.nuisance import Nuisance

    run, hostile = synthetic_run(labels=False), HOSTILE * 120
    table = [Nuisance("layout", 91.0, 0.5, 80.0, [91.0])]
    settings = [Setting(name, 5, 4.5, 99.0, 0.25, None, 7, None, table) for name in ("backbone", hostile)]
    (run.path / "replay.json").write_text(json.dumps(asdict(Replay("run", 8, 256, 60, hostile, {"5": 0.4}, settings))))
    page = page_of(run)
    assert "backbone 5 4.5 99.0 25.0% 7 91.0 ± 0.5" in page.rows()
    assert "<img src=x" not in page.source and "not of trainings" in page.text
    (run.path / "replay.json").write_text('{"run": 3}')
    assert Section(Card.of(run, "run"), Gallery()).replayed is None


def test_labels_of_some_images_judge_a_run_that_knew_none(synthetic_run: Make, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(256):
        Image.new("RGB", (16, 16), (number, 255 - number, 9)).save(images / f"{number:03d}.png")
    near = lambda query: [(query + 2 * place) % 256 for place in range(1, 6)]  # of the same parity
    run = synthetic_run("own", "data.source=folder", f"data.root={images}", labels=False, near=near)
    table = tmp_path / "some.csv"
    lines = [f"{n:03d}.png,{1 - n % 2},{n % 2 if n < 190 else ''}\n" for n in range(200)]
    table.write_text("image,even,odd\n" + "".join(lines))
    report([str(run.path)], tmp_path / "page.html", labels=table)
    page = Page(tmp_path / "page.html")
    labelled = sum(query.id < 190 for query in moments.read(run.path)[-1].queries)
    words = f"some.csv labels {labelled} of the 60 queries; 10 images with unknown classes are left out"
    assert words in page.text
    assert "labels beat chance 100% of the matches share a true label" in page.text
    assert any(row.startswith("5 1.000 1.000 ") for row in page.rows())
    shared = {bool(match[5]) if match[5] is not None else None for match in page.data["runs"][0]["shown"][-1]["queries"]
              for match in match[3]["features"]}  # fmt: skip
    assert shared == {True, None}
    for text, message in (("other.png,1,0", "other.png"), ("000.png,1,", "leaves classes of each image unknown")):
        table.write_text(f"image,even,odd\n{text}\n")
        with pytest.raises(UserError, match=message):
            report([str(run.path)], tmp_path / "page.html", labels=table)


def test_several_runs_share_charts_and_only_what_computes_differs(pages: dict[int, Page]) -> None:
    assert "objective.k 5 4" in pages[2].rows()
    assert not any(row.startswith(("monitor.", "run.", "engine.")) for row in pages[2].rows())
    assert "first: InfoNCE 6.9 at step 1, 6.2 at step 8" in pages[2].source
    assert [mark["kind"] for mark in pages[2].data["runs"][1]["marks"]] == ["stop", "stop", "resume"]
    assert "optim.lr 0.24 0.24 0.3 0.4 0.5 0.6" in pages[6].rows()


def test_tiles_and_the_next_command(runs: list[Run], synthetic_run: Make) -> None:
    first = {tile.name: tile for tile in tiles(Card.of(runs[0], "first"))}
    assert (first["State"].value, first["State"].note) == ("done", "8 steps, 4 epochs")
    assert first["Images/s"].value == "900"
    probe = ["eval", "run", "linear_scenes", "--weights", str(runs[0].path)]
    assert shlex.split(first["Next"].value) == ["mls", *probe]
    assert first["Data wait"].value == "1.0%"
    assert first["Expected"].note.startswith(
        "the recipe’s numbers are not for this run: data.scenes.count, objective.k, "
    )
    run = synthetic_run("it's a run")
    (run.path / "DONE").unlink()
    stopped = {tile.name: tile for tile in tiles(Card.of(run, "run"))}
    assert (stopped["State"].value, stopped["State"].note) == ("stopped", "step 8 of 8: finished")
    assert shlex.split(stopped["Next"].value) == ["mls", "pretrain", "--resume", str(run.path)]
    events = [{"event": "start", "total": 100, "time": "2027-01-15T08:00:00+00:00"}]
    card = Card("run", run, read_log(run.path / "metrics.jsonl"), events)
    with locked(run.path / ".lock", "it is being trained"):
        running = {tile.name: tile for tile in tiles(card, now=card.heard + 30)}
    assert running["State"].value == "running"
    assert running["Last heard"].note == "0:30 ago"
    assert running["To come"].value == "0:13"  # 92 steps of 128 images at 900 a second
    assert {tile.name: tile for tile in tiles(card)}["State"].value == "killed"


@pytest.mark.parametrize(
    ("overrides", "total", "other"),
    [
        (["run.seed=3", "data.root=/my/coco", "engine.checkpoint_every=9", "monitor.log_every=3"], 184_800, ""),
        (["optim.epochs=100"], 46_200, "optim.epochs is changed"),
        (["data.limit=50000", "model.backbone=resnet18"], 78_000, "data.limit, model.backbone are changed"),
        ([], 1_600, "its data make 1,600 steps, not 184,800"),
        ([], None, "how many images it has is not known yet"),
    ],
)
def test_what_a_recipe_expects_stands_only_beside_runs_that_are_the_recipe(
    overrides: list[str], total: int | None, other: str
) -> None:
    run = SimpleNamespace(path=Path("run"), config=mls.load_config("mls_coco_r50", overrides), done=False)
    card = Card("run", run, Log(step=100), [{"event": "start", "total": total}])  # pyright: ignore
    notes = {tile.name: tile.note for tile in tiles(card, now=0.0) if tile.name in ("Cost", "Expected")}
    if other:
        assert notes == {"Expected": f"the recipe’s numbers are not for this run: {other}"}
    else:
        assert list(notes) == list(notes_of_recipe("mls_coco_r50")) == ["Cost", "Expected"]
        assert "118,287 images" in notes["Cost"] and "40.1 box AP" in notes["Expected"]


def test_results_of_the_weights_stand_beside_the_run(synthetic_run: Make, page_of: Callable[..., Page]) -> None:
    from mls.results import Results

    run = synthetic_run()
    facts = {"cell": "a", "seed": 3, "step": 8, "protocol": "linear_scenes", "metrics": 1}
    store = Results(run.path.parent / "results.jsonl")
    store.add(**facts, metric="scenes/map", value=0.5312, weights=str(run.path))
    store.add(**{**facts, "cell": "b"}, metric="scenes/map", value=0.1111, weights="another")
    text = page_of(run).text
    assert "linear_scenes scenes/map 0.5312 8 3" in text
    assert "0.1111" not in text


def test_a_run_without_anything_still_gets_a_page(page_of: Callable[..., Page], tmp_path: Path) -> None:
    fresh = Run.create(mls.load_config("mls_scenes_tiny", [f"run.root={tmp_path}", "run.name=fresh"]))
    text = page_of(fresh).text
    assert "Nothing has been logged yet" in text
    assert "fresh has logged no metrics yet" in text
    assert "has no checkpoint yet" in text
    (fresh.path / "metrics.jsonl").write_text(json.dumps({"step": 3, "epoch": 1, "loss": 2.5}) + "\n[1]\n")
    (fresh.path / "backbone.json").write_text("[")
    Image.new("RGB", (8, 8), "red").save(fresh.path / "maps.png")  # by `mls maps`
    page = page_of(fresh)
    (drawn,) = [given["src"] or "" for _, given in page.tags if given.get("class") == "maps"]
    assert b64decode(drawn.partition(",")[2]) == (fresh.path / "maps.png").read_bytes()
    text = page.text
    assert "not finished: step 3, epoch 1 of 16" in text
    assert "metrics.jsonl: left out 1 lines that hold no row, the first is line 2" in text
    with pytest.raises(UserError, match=r"cannot write .*page.html: No such file"):
        report([str(fresh.path)], tmp_path / "missing" / "page.html")


def test_images_that_are_gone_are_told_and_their_matches_kept(
    synthetic_run: Make, page_of: Callable[..., Page], tmp_path: Path
) -> None:
    run = synthetic_run("gone", "data.source=folder", f"data.root={tmp_path / 'gone'}")
    page = page_of(run)
    assert "No crops: the images cannot be shown" in page.text
    assert "two views agree" in page.text
    assert page.data["places"] == {}


def test_hostile_names_of_any_length_stay_text(synthetic_run: Make, page_of: Callable[..., Page]) -> None:
    run = synthetic_run(f"r {HOSTILE[:60].replace('/', '|')}", row=lambda step: {HOSTILE * 120: 1.0})
    with open(run.path / "events.jsonl", "a") as file:
        row = {"event": "stop", "step": 7, "reason": HOSTILE * 120, "time": HOSTILE}
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "event": "resume", "host": HOSTILE * 120}) + "\n")
    with open(run.path.parent / "results.jsonl", "a") as file:
        row = {"weights": str(run.path), "cell": "c", "metric": HOSTILE * 120, "protocol": HOSTILE * 120}
        file.write(json.dumps({**row, "value": 0.5, "seed": HOSTILE, "step": 1}) + "\n")
    page = page_of(run)
    assert run.name in page.words["h1"][0]
    assert page.text.count(HOSTILE.strip()[:60]) > 5
    assert "<img src=x" not in page.source
    assert page.source.count("<script") == 2
    assert len(page.source) < 3_000_000


# ------------------------------------------------------------------------------------------------ verdicts that look


@pytest.mark.parametrize(("alike_in", "rule"), [("layout", "labels follow layout"), ("colour", "labels follow colour")])
def test_matches_that_are_alike_in_nothing_but_pixels_are_told(synthetic_run: Make, alike_in: str, rule: str) -> None:
    from mls.monitor.nuisance import Thumbnails

    run = synthetic_run()
    (source,), _ = sources_of([Card.of(run, "run")])
    moment = moments.read(run.path)[-1]
    thumbnails = Thumbnails.of_moment(moment, source, mirrored=False)
    for query in moment.queries:
        order = thumbnails.similarities(query, moment.random)[alike_in].argsort(descending=True)
        for found in query.matches.values():
            nearest = [moment.random[place] for place in order[: len(found)]]
            found[:] = [match._replace(id=crop.id, box=crop.box) for match, crop in zip(found, nearest, strict=True)]
    moments.write(run.path, moment)
    section = section_of(run)
    assert rule in [finding.rule for finding in section.findings]
    assert section_of(synthetic_run("other")).findings[0].rule == "healthy"


@pytest.mark.parametrize(
    ("rule", "row", "changes"),
    [
        ("collapse", {"health/projection_cosine": 0.9}, {}),
        ("starving for data", {"data_wait": 0.5}, {}),
        ("diverging", {"skipped_steps": 1.0}, {}),
        ("term inactive", {"loss/info_nce": 7.6}, {}),
        ("labels are the own image", {}, {"own": {"features": 0.6, "projections": 0.2}}),
    ],
)
def test_a_run_folder_that_deserves_a_verdict_gets_it(
    synthetic_run: Make, rule: str, row: dict[str, float], changes: dict[str, Any]
) -> None:
    run = synthetic_run(row=lambda step: row, **changes)
    section = Section(Card.of(run, "run"), Gallery(moments=moments.read(run.path)))
    assert [finding.rule for finding in section.findings if finding.kind == "bad"] == [rule]


def test_the_scenes_with_the_paper_s_recipe_get_layout() -> None:
    """Half of the queries of the last moment of `mls pretrain mls_scenes_tiny` (seed 0), and the first ten matches."""
    from mls.monitor.nuisance import Thumbnails, nuisances
    from mls.monitor.verdict import Seen, labels_follow

    moment = moments._fields().validate_json((Path(__file__).parent / "moment_of_mls_scenes_tiny.json").read_bytes())
    config = mls.load_config("mls_scenes_tiny")
    table = nuisances(
        moment,
        [query.matches["features"] for query in moment.queries],
        Thumbnails.of_moment(moment, build_source(config.data), mirrored=config.augment.flip > 0),
    )
    percentiles = {row.name: row.percentile for row in table}
    found = labels_follow(Seen(config, {}, moment, percentiles))
    assert found is not None and found.rule == "labels follow layout"
    assert 92 < percentiles["layout"] < 97 and percentiles["colour"] < 65


def section_of(run: Run) -> Section:
    card = Card.of(run, "run")
    sources, ((number, why),) = sources_of([card])
    return _section(card, Atlas(1 << 20, sources), number, why)


# ------------------------------------------------------------------------------------------------ curves and pictures


@settings(max_examples=30)
@given(
    st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=60),
    st.integers(1, 60),
    st.integers(1, 700),
)
def test_points_are_means_of_what_was_logged_in_bounded_memory(
    values: list[float | None], repeated: int, chunk: int
) -> None:
    rows = [{"step": n, "epoch": 1, "loss": value} for n, value in enumerate(values * repeated, start=1)]
    log = Log()
    for start in range(0, len(rows), chunk):
        part, tables = rows[start : start + chunk], {}
        _collect(tables, part, 0)
        _add(log, tables, len(part))
    series = log.series["loss"]
    places, points = series.points()
    assert len(points) < 2 * MOST_POINTS
    assert int(places[-1, 0]) == log.step == len(rows)
    width = series.width
    for number, (step, value) in enumerate(zip(places[:, 0], points, strict=True)):
        part = [row["loss"] for row in rows[number * width : (number + 1) * width]]
        known = [value for value in part if value is not None]
        assert step == min((number + 1) * width, len(rows))
        assert value == (pytest.approx(math.fsum(known) / len(known), abs=1e-3) if known else None)
    known = [(row["loss"], row["step"]) for row in rows if row["loss"] is not None]
    assert series.last == (known[-1] if known else None)


@given(st.lists(st.sampled_from(['{"step": 1, "epoch": 1, "a": 2}', "", "[", "5", '{"step": -1, "epoch": 1}', "{},{}",
                                 '{"step": 2, "epoch": 1, "a": NaN, "b": "x"}', "[" * 9999]), max_size=9),
       st.integers(1, 60))  # fmt: skip
@settings(max_examples=30)
def test_a_log_is_read_as_its_own_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    rows, odd = rows_and_odd_lines(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "BLOCK", block)
        log = read_log(path)
    assert (log.rows, log.odd, log.first_odd) == (len(rows), len(odd), odd[0] if odd else 0)


def test_hours_leave_out_what_lies_between_a_stop_and_a_resume() -> None:
    places = np.array([[1, 1, 1000.0], [2, 1, 2000.0], [3, 2, 9000.0]])
    columns = Axis(10, 2.0, [(2100.0, 8700.0)]).columns(places, 1000.0)
    assert columns["hours"] == pytest.approx([0.0, 1000 / 3600, 1400 / 3600], abs=1e-5)
    assert columns["epoch"] == [0.5, 1, 1.5]


def test_pictures_stay_below_their_limit_and_where_their_places_say() -> None:
    draw = np.random.default_rng(0)
    large, tiny = ([draw.integers(0, 255, (3, s, s), dtype=np.uint8) for _ in range(400)] for s in (128, 32))
    sources: Sequence[Any] = [SimpleNamespace(read=lambda i, of=of: torch.from_numpy(of[i])) for of in (large, tiny)]
    atlas = Atlas(1_000_000, [sources[0]])
    atlas.fill((0, number) for number in range(400))
    assert sum(len(b64decode(sheet.uri.partition(",")[2])) for sheet in atlas.sheets) <= 1_000_000
    assert 0 < len(atlas.places) == 400 - atlas.left_out < 400
    exact = Atlas(10_000_000, [sources[1]])
    exact.fill([(0, 7), (0, 7), (0, 300)])
    with Image.open(BytesIO(b64decode(exact.sheets[0].uri.partition(",")[2]))) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    _, x, y, width, height = exact.places[0, 300]
    assert (width, height) == (32, 32)
    assert np.abs(pixels[y : y + height, x : x + width].astype(int).mean((0, 1)) - tiny[300].mean((1, 2))).max() < 4


@pytest.mark.parametrize(
    "content", ["5", "{}", '{"judged": 1, "pairs": [{"kind": "x"}]}', '{"judged": 2, "pairs": []}', "[" * 9999]
)
def test_a_file_of_judged_pairs_that_is_none_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "judged.json").write_text(content)
    with pytest.raises(DataError, match="give the file judged.json that the page saved"):
        report(judged=tmp_path / "judged.json")


# ------------------------------------------------------------------------------------------------ in a browser


class Chromium:
    """One page of a headless browser, driven through its pipe of JSON messages, which needs no library."""

    def __init__(self, folder: Path) -> None:
        (reads, self.to), (self.of, writes) = os.pipe(), os.pipe()
        shell = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        command = ["bash", "-c", shell, str(BROWSER), *options, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.rest, self.sent, self.session = b"", 0, {}
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.of, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        data = json.dumps({"id": self.sent, "method": method, "params": params, **self.session}).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        while (answer := self.message()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, text: str) -> Any:
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, path: Path, width: int = 1440, dark: bool = False, script: bool = True) -> None:
        self.events.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def complaints(self) -> list[Any]:
        """What was written to the console, and what was asked of anybody."""
        said = [event for event in self.events if event.get("method") in (
            "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]  # fmt: skip
        asked = [event["params"]["request"]["url"] for event in self.events if "request" in event.get("params", {})]
        return said + [url for url in asked if not url.startswith(("file:///", "data:", "blob:"))]

    def key(self, text: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, key=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if BROWSER is None:
        pytest.skip("no chromium here: the page is not looked at by a browser")
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.call("Browser.close")
    chromium.process.wait(20)
    os.close(chromium.to)
    os.close(chromium.of)


# Tells the colour of each line that marks an event in a curve, by its dashes.
MARKS = """window.marked = []; const stroke = CanvasRenderingContext2D.prototype.stroke;
CanvasRenderingContext2D.prototype.stroke = function (...all) {
  if (String(this.getLineDash()) === "2,4") window.marked.push(this.strokeStyle);
  return stroke.apply(this, all);
};"""

CONTRAST = """(() => {
  const style = getComputedStyle(document.documentElement), of = name => style.getPropertyValue("--" + name).trim();
  const light = text => {
    const hex = text.length === 4 ? [...text.slice(1)].map(c => c + c).join("") : text.slice(1);
    const [r, g, b] = [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ratio = name => {
    const [a, b] = [light(of(name)), light(of("paper"))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  return {text: ratio("soft"), lines: [0,1,2,3,4,5,6,7].map(n => ratio("c" + n))};
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 360])
def test_a_browser_shows_every_page_without_complaint(
    browser: Chromium, pages: dict[int, Page], width: int, dark: bool
) -> None:
    for page in pages.values():
        browser.show(page.path, width, dark)
        assert browser.complaints() == []
        assert browser.js("document.documentElement.scrollWidth") <= width
        shown = "document.querySelectorAll('.plot canvas').length"
        assert browser.js(shown) == browser.js("document.querySelectorAll('.plot').length") > 8
        colour = browser.js("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == dark
        strips = browser.js("getComputedStyle(document.querySelector('.list .matches')).flexWrap")
        assert strips == ("nowrap" if width == 360 else "wrap")  # on a phone a list is a strip
    contrast = browser.js(CONTRAST)  # of what the charts draw, which no tool can see
    assert contrast["text"] >= 4.5
    assert min(contrast["lines"]) >= 3


@pytest.mark.skipif(find_spec("axe_core_python") is None, reason="no axe-core here: pip install axe-core-python")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everybody_can_use_the_page(browser: Chromium, pages: dict[int, Page], dark: bool) -> None:
    axe = Path(find_spec("axe_core_python").origin).parent / "axe.min.js"  # pyright: ignore
    for number, page in enumerate(pages.values()):  # each at both widths and in both schemes
        browser.show(page.path, 360 if (number + dark) % 2 else 1440, dark)
        browser.js(axe.read_text(encoding="utf-8"))
        tags = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}"
        found = browser.js(f"axe.run(document, {tags}).then(found => JSON.stringify(found.violations))")
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in json.loads(found)] == []


def test_without_script_the_page_still_says_what_it_has_to(browser: Chromium, pages: dict[int, Page]) -> None:
    browser.show(pages[1].path, script=False)
    text = browser.js("document.body.innerText")
    assert "labels beat chance" in text
    assert "InfoNCE 6.9 at step 1, 6.2 at step 8" in text
    assert browser.js("document.querySelectorAll('#queries .query').length") == 12
    assert browser.js("document.querySelectorAll('.scripted:not([hidden])').length") == 0


def test_nothing_that_was_not_in_the_page_runs_in_it(browser: Chromium, pages: dict[int, Page]) -> None:
    browser.show(pages[1].path)
    browser.js(
        "document.body.insertAdjacentHTML('beforeend', '<p id=p style=\"color: red\" onclick=\"window.ran = 1\">')"
    )
    browser.js(
        "{const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); p.click()}"
    )
    assert browser.js("window.ran") is None
    assert browser.js("p.style.color") == ""


def click(browser: Chromium, selector: str) -> None:
    browser.js(f"document.querySelector({json.dumps(selector)}).click()")


def test_the_gallery_moves_through_moments_memories_and_runs(browser: Chromium, pages: dict[int, Page]) -> None:
    page = pages[2]
    browser.show(page.path)
    first = "document.querySelectorAll('#queries .query:first-child .match .unseen')"
    ids = f"[...{first}].map(match => +match.textContent.match(/\\d+/)[0])"
    shown = page.data["runs"][0]["shown"]
    worst = min(range(QUERIES), key=lambda number: (shown[-1]["queries"][number][2], number))
    of = lambda moment, memory, number=worst: [match[0] for match in shown[moment]["queries"][number][3][memory]]
    assert browser.js(ids) == of(2, "features")
    click(browser, "input[name=show][value=projection]")
    assert browser.js(ids) == of(2, "projections")
    click(browser, "input[name=show][value=both]")
    assert browser.js(ids) == of(2, "features") + of(2, "projections")
    click(browser, "input[name=show][value=pixels]")
    assert browser.js(ids) == of(2, "features") + of(2, "pixels")
    browser.js(
        "{const s = document.querySelector('input[name=moment]'); s.value = 0; s.dispatchEvent(new Event('input'))}"
    )
    assert browser.js(ids) == of(0, "features")
    assert browser.js("document.querySelector('output[name=when]').textContent") == "step 2, epoch 1"
    click(browser, "input[name=show][value=runs]")
    assert len(browser.js(ids)) == 10
    best = max(range(QUERIES), key=lambda number: (shown[-1]["queries"][number][2], number))
    click(browser, "input[name=order][value=best]")
    click(browser, "input[name=show][value=backbone]")
    assert browser.js(ids) == of(0, "features", best)
    click(browser, "#more")
    assert browser.js("document.querySelectorAll('#queries .query').length") == QUERIES
    click(browser, "#queries .match")
    assert browser.js("document.querySelector('#whole').open")
    told = browser.js("document.querySelector('#whole').innerText")
    assert f"scene {of(0, 'features', best)[0]} of the train split; the row is" in told
    assert browser.js("document.querySelectorAll('#whole rect').length") == 4
    assert browser.complaints() == []


def test_a_tap_shows_the_regions_that_matched(browser: Chromium, by_regions: Page) -> None:
    browser.show(by_regions.path)
    click(browser, "#queries .match")
    yellow = [dict(zip("xywh", map(float, box), strict=True)) for box in browser.js(
        "[...document.querySelectorAll('#whole .region')].map(r => "
        "['x', 'y', 'width', 'height'].map(n => r.getAttribute(n)))")]  # fmt: skip
    assert [(box["w"], box["h"]) for box in yellow] == [(16, 16), (16, 16)]  # of scenes of 32 pixels
    assert yellow[0]["x"] % 32 == yellow[0]["y"] % 32 == 0 and yellow[1]["x"] % 32 == yellow[1]["y"] % 32 == 16
    assert "yellow: the region" in browser.js("document.querySelector('#whole').innerText")
    assert browser.complaints() == []


def test_curves_follow_the_axis_the_runs_that_are_ticked_and_the_pointer(
    browser: Chromium, pages: dict[int, Page]
) -> None:
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=MARKS)["identifier"]
    browser.show(pages[2].path)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    inked = """(() => { const c = document.querySelector('#chart-loss canvas');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return d.filter((value, n) => n % 4 === 3 && value > 0).length; })()"""
    settle = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    browser.js(settle)
    both, charts = browser.js(inked), browser.js("document.querySelectorAll('.plot[data-chart]').length")
    assert browser.js("window.marked.length") == 4 * charts  # the end of one run; two stops and a resume of the other
    browser.js("window.marked.length = 0")
    click(browser, "input[name=run][value='0']")
    browser.js(settle)
    assert 0 < browser.js(inked) < both
    assert browser.js("[window.marked.length, new Set(window.marked).size]") == [3 * charts, 1]
    click(browser, "input[name=run][value='0']")
    for axis in ("epoch", "images", "hours"):
        click(browser, f"input[name=x][value={axis}]")
    browser.js(settle)
    browser.js("document.querySelector('#chart-loss').scrollIntoView()")
    box = browser.js("(({x, y, width, height}) => [x + width - 2, y + height / 2])"
                     "(document.querySelector('#chart-loss .u-over').getBoundingClientRect())")  # fmt: skip
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    browser.js(settle)
    assert browser.js("document.querySelector('#chart-loss output').textContent") == "7.2 · 7.2"
    other = browser.js("document.querySelector('#chart-infonce-loss output').textContent")  # one cursor over all
    assert other == "6.2 · 6.2"
    assert browser.complaints() == []


def test_judging_pairs_saves_a_file_that_the_command_reads(
    browser: Chromium, pages: dict[int, Page], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.show(pages[1].path)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    click(browser, "#begin")
    pairs = pages[1].data["runs"][0]["pairs"]
    assert not set(KINDS) & set(re.findall(r"\w+", browser.js("document.querySelector('#judging').outerHTML")))
    for number, (kind, *_) in enumerate(pairs):
        assert f"Pair {number + 1} of 100" in browser.js("document.querySelector('#asked').textContent")
        browser.key("y" if kind == "matched" else "n" if number % 2 else "?")
    while not any(e.get("params", {}).get("state") == "completed" for e in browser.events):
        browser.events.append(browser.message())
    assert browser.complaints() == []
    capsys.readouterr()
    report(judged=tmp_path / "judged.json")
    rows = [re.split(r"\s*\|\s*", line) for line in capsys.readouterr().out.splitlines()]
    yes = sum(pair[0] == "matched" for pair in pairs)
    assert any(row[1:4] == ["matched", "1.00 (0.90–1.00)", str(yes)] for row in rows)
    assert sum(int(cell) for row in rows[2:] for cell in row[3:6]) == PAIRS
