"""The page of `mls report`: of real runs, read by a parser and, where there is one, by a browser."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mls
from mls.config import Config
from mls.engine import Run
from mls.errors import Stopped, UserError
from mls.recipes import applicable
from mls.tools.charts import BOTTOM, LEFT, RIGHT, TOP, chart
from mls.tools.report import Card, _cost, _from_recipe, picture, report

SMALL = """data.scenes.count=512 data.scenes.test_count=128 data.batch_size=64 dictionary.size=256 optim.epochs=2
objective.warmup_epochs=0 monitor.knn_every_epochs=1
engine.threads=1 monitor.knn_images=128 monitor.log_every=2 monitor.health_every=4""".split()
VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHARTS = ["InfoNCE loss", "Multi-label loss", "Cosine similarity", "Gradient of each part", "Gradient norm"]
CHARTS += ["Pseudo-label overlap", "Pseudo-label precision", "Online probes", "Spread of a coordinate"]
CHARTS += ["Mean cosine of two rows", "Effective rank", "Learning rate", "Dictionary fill", "Speed", "Data wait"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return mls.pretrain(mls.load_config("mls_scenes_tiny", [*SMALL, f"run.root={folder}", "run.name=mls"]), quiet=True)


@pytest.fixture(scope="module")
def half(folder: Path) -> Run:
    """MoCo-v2, stopped in the middle."""
    changes = [f"run.root={folder}", "run.name=half", "engine.max_steps=10", "objective.method=moco_v2"]
    with pytest.raises(Stopped):
        changes = applicable("mls_scenes_tiny", [*SMALL, *changes])
        mls.pretrain(mls.load_config("mls_scenes_tiny", changes), quiet=True)
    return Run.open(folder / "half")


class Page(HTMLParser):
    """Complains about anything that is not closed in order; collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
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
        if tag in ("td", "th", "li", "dd"):
            self.handle_data(" ")
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words[tag][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words["body"]).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*runs: Run, out: Path | None = None) -> Page:
    report([str(run.path) for run in runs], out)
    return Page((out or runs[0].path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def both(run: Run, half: Run, folder: Path) -> Page:
    return page_of(run, half, out=folder / "both.html")


def test_the_command_prints_where_the_page_is(
    half: Run, tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("report", "half", "--out", str(tmp_path), MLS_RUNS=str(half.path.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").is_file()
    wrong = mls_command("report", str(tmp_path))
    assert wrong.returncode == 2
    assert "is not a run folder" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_page_needs_nothing_but_itself(page: Page, both: Page) -> None:
    for each in (page, both):
        assert not re.search(r"https?:|//|url\(|@import|<script|javascript:", re.sub(r"data:[^\"]*", "", each.source))
        links = [attributes.get(name) for _, attributes in each.tags for name in ("src", "href") if name in attributes]
        assert links
        assert all(link.startswith("data:") for link in links)
        assert not any(name.startswith("on") for _, attributes in each.tags for name in attributes)


def test_every_chart_is_there_and_named(page: Page) -> None:
    for name in CHARTS:
        assert name in page.words["h3"]
        assert name in page.words["title"]
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    for svg in charts:
        assert all(name in ids for name in svg["aria-labelledby"].split())
    assert len(charts) == len(page.words["desc"]) == len(page.words["figcaption"]) - 8  # eight queries
    assert page.words["desc"][0].startswith("InfoNCE: ")
    assert "; chance: " in page.words["desc"][0]


def test_the_charts_show_what_was_logged(run: Run, page: Page) -> None:
    last = run.last("loss/info_nce")
    assert f", {last:.4g} at step 16;" in page.words["desc"][0]
    for key, value in run.metrics()[-1].items():
        if key not in ("step", "epoch"):
            assert f"{key} {value:.4g} step 16" in " ".join(" ".join(row.split()) for row in page.words["tr"])


def test_headings_are_in_order_and_the_page_has_a_title_and_a_language(page: Page, run: Run) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.words["title"][0] == "mls – mls report"
    assert page.all("html")[0]["lang"] == "en"
    assert run.name in page.words["h1"][0]


def test_crops_are_framed_captioned_and_described(page: Page) -> None:
    told = [image["alt"] for image in page.all("img")]
    assert len(told) == 8 * 11
    assert sum(alt.startswith("query ") for alt in told) == 8
    assert sum(bool(re.fullmatch(r"match \d+: a crop of image \d+", alt)) for alt in told) == 80
    assert all(re.match(r"-?\d\.\d\d", words) for words in page.words["li"][-80:])
    assert "Each query and the rows chosen as its positives" in page.text
    assert "Rows of the query’s own image are left out" in page.text


def test_the_page_says_what_a_run_is_and_what_was_changed(page: Page) -> None:
    assert "finished: 16 steps, 2 epochs" in page.text
    assert "16 steps of 64 images at" in page.text
    changed = page.text[page.text.index("Changed") :]
    assert "optim.epochs 16 → 2" in changed
    assert "data.batch_size 128 → 64" in changed
    assert "run.root" not in page.text


def test_two_runs_share_their_charts(both: Page) -> None:
    assert "mls: InfoNCE" in both.text
    assert "half: InfoNCE" in both.text
    assert "half: multi-label" not in both.text  # MoCo-v2 has none
    assert "What differs between the runs" in both.text
    rows = {" ".join(row.split()) for row in both.words["tr"]}
    assert {"objective.method mls moco_v2", "engine.max_steps null 10"} <= rows
    assert not any(row.startswith("optim.epochs") for row in rows)
    assert len(both.all("img")) == 2 * 8 * 11
    assert "half: its nearest rows" in both.text


def test_a_run_that_is_not_finished_says_how_far_it_is(both: Page) -> None:
    assert "not finished: step 10 of 16" in both.text
    assert "of it to come" in both.text


def test_a_run_without_anything_still_gets_a_page(run: Run, folder: Path) -> None:
    fresh = Run.create(mls.load_config("mls_scenes_tiny", [*SMALL, f"run.root={folder}", "run.name=fresh"]))
    alone = page_of(fresh)
    assert "nothing logged and nothing saved yet" in alone.text
    assert "fresh has logged no metrics yet" in alone.text
    assert "No crops: " in alone.text
    assert "has no checkpoint yet" in alone.text
    assert "Last values" not in alone.text
    beside = page_of(run, fresh, out=folder / "beside.html")
    assert "fresh has logged no metrics yet" in beside.text
    assert "InfoNCE loss" in beside.words["h3"]
    (fresh.path / "metrics.jsonl").write_text(json.dumps({"step": 3, "epoch": 1, "loss": 2.5}) + "\n")
    assert "not finished: step 3, epoch 1 of 2" in page_of(fresh).text


def test_a_hostile_name_stays_text(run: Run, folder: Path) -> None:
    name = "<img src=x onerror=alert(1)>&\"' {{ 7 * 7 }}"
    twin = Run(Path(shutil.copytree(run.path, folder / name)))
    page = page_of(twin, run, out=folder / "hostile.html")
    assert name in page.words["h1"][0]
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert "<img src=x" not in page.source
    assert "Nothing: both their configuration and their seed are the same." in page.text


def test_runs_of_the_same_name_are_told_apart_and_one_named_twice_is_shown_once(
    run: Run, page: Page, tmp_path: Path
) -> None:
    twin = Run(Path(shutil.copytree(run.path, tmp_path / run.name)))
    told = page_of(run, twin, out=tmp_path / "page.html")
    assert str(run.path) in told.words["h1"][0]
    assert str(twin.path) in told.words["h1"][0]
    assert len(page_of(run, run).all("img")) == len(page.all("img"))


def test_a_page_that_cannot_be_written_is_one_sentence(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*page.html: No such file"):
        report([str(run.path)], tmp_path / "missing" / "page.html")


def test_a_recipe_of_one_s_own_is_not_compared(run: Run, tmp_path: Path) -> None:
    own = Run(Path(shutil.copytree(run.path, tmp_path / "own")))
    text = (own.path / "config.yaml").read_text().replace("recipe: mls_scenes_tiny", "recipe: my_own")
    (own.path / "config.yaml").write_text(text)
    assert "unknown, because the recipe does not ship with mls" in page_of(own).text


@pytest.mark.parametrize(
    ("overrides", "steps", "other"),
    [
        (["run.seed=3", "data.root=/my/coco", "engine.checkpoint_every=9", "monitor.log_every=3"], 184_800, ""),
        (["optim.epochs=100"], 46_200, "optim.epochs is changed"),
        (["data.limit=50000", "model.backbone=resnet18"], 78_000, "data.limit, model.backbone are changed"),
        ([], 1_600, "its data make 1,600 steps, not 184,800"),
        ([], None, "how many images it has is not known yet"),
    ],
)
def test_what_a_recipe_expects_stands_only_beside_runs_that_are_the_recipe(
    overrides: list[str], steps: int | None, other: str
) -> None:
    config = mls.load_config("mls_coco_r50", overrides)
    card = Card("run", Run(Path("run")), config, [], from_recipe=_from_recipe(config))
    notes = dict(_cost(card, 100, steps))
    assert list(notes) == ["Cost", "Expected"]
    for text, own in zip(notes.values(), ("118,287 images", "40.1 box AP"), strict=True):
        assert text == f"the recipe's is not for this run: {other}" if other else own in text


@given(st.integers(8, 400))
def test_tiny_crops_stay_exact_and_large_ones_small(size: int) -> None:
    crop = np.random.default_rng(size).integers(0, 255, (size, size, 3), dtype=np.uint8)
    uri = picture(crop)["uri"]
    with Image.open(BytesIO(b64decode(uri.partition(",")[2]))) as image:
        shown = np.asarray(image)
    assert shown.shape == (min(size, 160), min(size, 160), 3)
    assert (size > 160) == uri.startswith("data:image/jpeg;")
    if size <= 160:
        assert np.array_equal(shown, crop)


def card(values: list[float | None], label: str = "run", key: str = "loss") -> Card:
    rows = [{"step": 10 * n, "epoch": 1, key: value} for n, value in enumerate(values, start=1)]
    return Card(label, Run(Path(label)), Config(), rows)


@given(
    st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=600),
    st.sampled_from([{}, {"low": 0.0}, {"low": 0.0, "high": 1.0}, {"log": True}]),
)
def test_curves_and_ticks_lie_inside_the_chart(values: list[float | None], options: dict) -> None:
    drawn = chart([card(values)], "Loss", "", {"loss": "loss"}, **options)
    shown = [value for value in values if value is not None and (value > 0 or "log" not in options)]
    assert (drawn is None) == (shown == [])
    if drawn is None:
        return
    (line,) = drawn["lines"]
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.e+]+) ([-\d.e+]+)", line["path"])]
    assert 0 < len(points) <= 240
    assert all(LEFT <= x <= RIGHT and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in points)
    assert all(TOP - 0.1 <= y <= BOTTOM + 0.1 for y, _ in drawn["y_ticks"])
    assert 2 <= len(drawn["y_ticks"]) <= 8
    assert drawn["averaged"] == -(-len(values) // 240)


def test_a_value_that_was_not_finite_leaves_a_gap() -> None:
    drawn = chart([card([1.0, 2.0, None, 2.0, 3.0, None, 4.0])], "Loss", "", {"loss": "loss"})
    assert drawn["lines"][0]["path"].count("M") == 3
    assert drawn["lines"][0]["path"].count("L") == 2
    assert len(drawn["lines"][0]["dots"]) == 5


def test_what_no_run_logged_has_no_chart() -> None:
    assert chart([card([1.0])], "Speed", "", {"images/s": "images_per_second"}) is None
    assert chart([card([])], "Loss", "", {"loss": "loss"}) is None


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is not looked at by a browser")
@pytest.mark.parametrize(("scheme", "bright"), [(1, True), (0, False)], ids=["light", "dark"])
def test_a_browser_draws_the_page_without_complaint(both: Page, tmp_path: Path, scheme: int, bright: bool) -> None:
    (tmp_path / "page.html").write_text(both.source, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--window-size=1280,4200", f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "page.png") as image:
        pixels = image.convert("RGB")
    assert (sum(pixels.getpixel((3, 3))) > 600) == bright
    colours = Counter(pixels.getdata() if not hasattr(pixels, "get_flattened_data") else pixels.get_flattened_data())
    for frame in [(214, 39, 40), (242, 183, 1)] if bright else [(240, 73, 74), (242, 194, 48)]:
        assert colours[frame] > 1000
