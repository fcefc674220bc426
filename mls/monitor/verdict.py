"""Did a run work? One named rule for each thing that goes wrong, with its threshold, what was measured, where that can
be seen, and what to change. A rule looks at the log, at the last moment and at the nuisance table, and at nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Literal

from mls.config import Config, MLSOptions, WordsOptions

if TYPE_CHECKING:
    from mls.monitor.moments import Moment

COSINE_OF_PROJECTIONS, COSINE_OF_FEATURES = 0.5, 0.95  # of two rows: features behind a ReLU are never spread as wide
LOWEST_SPREAD = 0.1  # of a coordinate, where 1 is uniform on the sphere
WAITING = 0.2  # share of the time; from here on the run and `mls doctor` say so, too
RISE = 0.1  # of the loss over its lowest tenth
SKIPPED = 0.01  # share of the steps
AT_CHANCE = 0.98  # of the loss of a network that tells nothing apart
PULL = 0.01  # of the multi-label term beside InfoNCE's
PERCENTILE = 80.0  # of matches in the similarity of something that is not content; chance is 50
OWN_IMAGE = 0.3  # share of the k nearest rows
GAIN = 0.05  # of precision over chance: less is within the noise of 60 queries
TERMS = {"multi_label": "multi-label term", "words": "term of words"}  # which may join InfoNCE later
SENTENCES = 6  # of a verdict, where no more is wrong

Points = Sequence[tuple[int, float | None]]  # (step, value); None: it was not finite
Kind = Literal["bad", "good", "open"]


@dataclass(frozen=True)
class Finding:
    """What a rule found. `evidence` names the part of the page that shows it, `override` what to change."""

    rule: str
    kind: Kind
    sentence: str
    measured: str
    threshold: str
    evidence: str
    override: str = ""


@dataclass(frozen=True)
class Seen:
    """What the rules look at."""

    config: Config
    series: Mapping[str, Points]
    moment: Moment | None = None
    nuisance: Mapping[str, float] = field(default_factory=dict)  # percentiles of matches, by what they are alike in
    precision: tuple[float, float] | None = None  # of the matches and by chance, by labels that the run did not know

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series.get(name, ()) if value is not None]

    def late(self, name: str) -> float | None:
        """The median over the later half: what holds now, whatever the first steps were."""
        values = self.values(name)
        return median(values[len(values) // 2 :]) if values else None

    def last(self, name: str) -> float | None:
        values = self.values(name)
        return values[-1] if values else None

    @property
    def step(self) -> int:
        return max((points[-1][0] for points in self.series.values() if points), default=0)


def of_matches(finding: Finding) -> Finding:
    """What is said of matches where no label is taken from them: they only show what lies near what."""
    kind: Kind = "open" if finding.kind == "bad" else finding.kind
    sentence = f"{finding.sentence} No label is taken from them." if kind == "open" else finding.sentence
    return replace(finding, rule="matches" + finding.rule[len("labels") :], kind=kind, sentence=sentence, override="")


RULES: dict[str, Callable[[Seen], Finding | None]] = {}


def rule(function: Callable[[Seen], Finding | None]) -> Callable[[Seen], Finding | None]:
    RULES[function.__name__] = function
    return function


def verdict(seen: Seen) -> list[Finding]:
    """What is wrong, worst first; that nothing is, where nothing is; what nobody can tell; and what is in order, the
    labels first, up to SENTENCES in all."""
    if not seen.step:
        return [Finding("unknown", "open", "Nothing has been logged yet.", "no row", "", "state")]
    found = [finding for check in RULES.values() if (finding := check(seen)) is not None]
    if not isinstance(seen.config.objective, MLSOptions):
        found = [of_matches(finding) if finding.rule.startswith("labels") else finding for finding in found]
    faults, in_order = ([one for one in found if (one.kind == "good") == good] for good in (False, True))
    if not any(finding.kind == "bad" for finding in faults):
        sentence = "Training looks healthy: no rule finds a fault."
        in_order.append(Finding("healthy", "good", sentence, f"{len(found)} rules", "each within its limit", "curves"))
    return [*faults, *in_order[::-1][: max(0, SENTENCES - len(faults))]]


@rule
def collapse(seen: Seen) -> Finding | None:
    limits = {"projection": COSINE_OF_PROJECTIONS, "backbone": COSINE_OF_FEATURES}
    for memory, limit in limits.items():
        cosine, spread = seen.last(f"health/{memory}_cosine"), seen.last(f"health/{memory}_std")
        far = cosine is not None and cosine >= limit
        if not far and (spread is None or spread > LOWEST_SPREAD):
            continue
        measured = f"mean cosine of two {memory} rows {cosine:.2f}" if far else f"spread of a coordinate {spread:.2f}"
        threshold = f"at least {limit:g}" if far else f"at most {LOWEST_SPREAD:g}"
        sentence = f"The {memory} rows have collapsed: all images look alike to the network, and matches mean nothing."
        lower = f"optim.lr={seen.config.optim.lr / 3:.2g}"
        return Finding("collapse", "bad", sentence, measured, threshold, "chart-mean-cosine-of-two-rows", lower)
    known = {memory: seen.last(f"health/{memory}_cosine") for memory in limits}
    measured = ", ".join(f"{memory} {cosine:.2f}" for memory, cosine in known.items() if cosine is not None)
    threshold = " and ".join(f"{memory} below {limit:g}" for memory, limit in limits.items())
    sentence = "Nothing has collapsed: different images have different features."
    return Finding("no collapse", "good", sentence, f"mean cosine of two rows: {measured}", threshold,
                   "chart-mean-cosine-of-two-rows") if measured else None  # fmt: skip


@rule
def diverging(seen: Seen) -> Finding | None:
    lower = f"optim.lr={seen.config.optim.lr / 3:.2g}"
    skipped = (seen.last("skipped_steps") or 0.0) / seen.step
    if skipped >= SKIPPED:
        sentence = "Losses or gradients were often not finite, and those steps were skipped: the rate is too high."
        measured, threshold = f"{skipped:.1%} of the steps skipped", f"at least {SKIPPED:.0%}"
        return Finding("diverging", "bad", sentence, measured, threshold, "chart-gradient-norm", lower)
    values = _settled_loss(seen)
    if len(values) < 10:
        return None
    part = len(values) // 10
    tenths = [fmean(values[start : start + part]) for start in range(0, len(values) - part + 1, part)]
    first, lowest, last = tenths[0], min(tenths), fmean(values[-part:])
    rise = (last - lowest) / max(abs(lowest), (first - lowest) / 20, 1e-9)
    if rise < RISE:
        sentence = f"The loss goes from {first:.3g} to {last:.3g}, and does not rise again."
        measured, threshold = f"{max(rise, 0.0):.0%} above its lowest tenth", f"below {RISE:.0%}"
        return Finding("no divergence", "good", sentence, measured, threshold, "chart-loss")
    sentence = f"The loss rises again, from {lowest:.3g} to {last:.3g}: training diverges."
    return Finding(
        "diverging", "bad", sentence, f"{rise:.0%} above its lowest tenth", f"at least {RISE:.0%}", "chart-loss", lower
    )


def _settled_loss(seen: Seen) -> list[float]:
    """The loss while it has one meaning: with a full dictionary, and all terms that it has in the end."""
    points = [(step, value) for step, value in seen.series.get("loss", ()) if value is not None]
    full = [step for step, fill in seen.series.get("dictionary/fill", ()) if fill is not None and fill >= 1]
    begins = full[0] if full else 0
    for term in TERMS:
        joined = [step for step, value in seen.series.get(f"loss/{term}", ()) if value is not None]
        if (
            joined and points and joined[0] > points[0][0]
        ):  # a row is the mean since the one before: of that one partly without it
            begins = max(begins, joined[0] + 1)
    return [value for step, value in points if step >= begins]


@rule
def starving(seen: Seen) -> Finding | None:
    wait = seen.late("data_wait")
    if wait is None:
        return None
    if wait < WAITING:
        sentence = "The data keep up: training hardly waits for images."
        return Finding("data keep up", "good", sentence, f"{wait:.1%} of the time", f"below {WAITING:.0%}",
                       "chart-data-wait")  # fmt: skip
    workers = seen.config.data.workers
    override = "" if workers is None else f"data.workers={max(2, 2 * workers)}"  # by default all cores work already
    sentence = f"Training waits for images {wait:.0%} of the time: the network could learn that much faster."
    return Finding("starving for data", "bad", sentence, f"{wait:.0%} of the time", f"at least {WAITING:.0%}",
                   "chart-data-wait", override)  # fmt: skip


@rule
def term_inactive(seen: Seen) -> Finding | None:
    name, loss, chance = "term inactive", seen.late("loss/info_nce"), seen.late("chance/info_nce")
    if loss is not None and chance is not None and loss >= AT_CHANCE * chance:
        sentence = "InfoNCE is at chance: no image is told from any other."
        return Finding(name, "bad", sentence, f"{loss:.2f}, chance {chance:.2f}", f"at least {AT_CHANCE:.0%} of chance",
                       "chart-infonce-loss", f"optim.lr={seen.config.optim.lr / 3:.2g}")  # fmt: skip
    options = seen.config.objective
    acting = [one for one in TERMS if seen.values(f"loss/{one}")]  # in the warm-up there is none yet, and that is meant
    if not isinstance(options, MLSOptions | WordsOptions) or not options.weight or not acting:
        return None
    if acting[0] == "words" and (told := words_at_chance(seen)) is not None:
        return told
    words, term, others = TERMS[acting[0]], seen.late(f"gradient/{acting[0]}"), seen.late("gradient/info_nce")
    if term is not None and others and term < PULL * others:
        sentence = f"The {words} hardly pulls: the run is InfoNCE alone, whatever the labels are."
        balanced = isinstance(options, MLSOptions) and options.normalise != "positives"
        return Finding(name, "bad", sentence, f"{term / others:.2%} of InfoNCE’s gradient", f"below {PULL:.0%}",
                       "chart-gradient-of-each-part",
                       "objective.normalise=positives" if balanced else "")  # fmt: skip
    if term is None or not others:
        return None
    sentence = "Both parts of the loss pull."
    return Finding("terms pull", "good", sentence, f"the {words} {term / others:.1%} of InfoNCE’s gradient",
                   f"{PULL:.0%} or more", "chart-gradient-of-each-part")  # fmt: skip


def words_at_chance(seen: Seen) -> Finding | None:
    """What can be told of a bag lies between one answer for all images and the bag itself."""
    loss, chance, floor = (seen.last(f"{name}/words") for name in ("loss", "chance", "floor"))
    if loss is None or chance is None or floor is None or loss - floor < AT_CHANCE * (chance - floor):
        return None
    sentence = "The term of words is at chance: the same answer for all images would do as well."
    return Finding("term inactive", "bad", sentence, f"{loss:.2f}, chance {chance:.2f}, at best {floor:.2f}",
                   f"at least {AT_CHANCE:.0%} of the way from the best to chance", "chart-words-loss")  # fmt: skip


ALIKE = {
    "layout": ("labels follow layout", "where things stand (4 × 4 grey layout), not what they are"),
    "colour": ("labels follow colour", "the mean colour"),
    "thumbnail": ("labels follow pixels", "the picture as a whole (8 × 8 thumbnail)"),
    "geometry": ("labels follow the box", "where and how large the crop is"),
}


@rule
def labels_follow(seen: Seen) -> Finding | None:
    """The nuisance that matches are most alike in."""
    known = {name: seen.nuisance[name] for name in ALIKE if name in seen.nuisance}
    worst = max(known, key=lambda name: known[name], default=None)
    if worst is None:
        return None
    if known[worst] < PERCENTILE:
        sentence = f"Matches are not chosen by what is no content; they are most alike in {ALIKE[worst][1]}."
        return Finding("labels follow nothing else", "good", sentence, f"percentile {known[worst]:.0f}, chance 50",
                       f"below {PERCENTILE:.0f}", "nuisance")  # fmt: skip
    if worst == "thumbnail" and known.get("layout", 0.0) >= PERCENTILE:  # the same thing, with a name that says more
        worst = "layout"
    name, words = ALIKE[worst]
    sentence = f"Matches follow {words}: they lie at the {known[worst]:.0f}th percentile of it, where chance is 50."
    options = seen.config.objective
    regions = isinstance(options, MLSOptions) and options.labels_from != "regions"
    smaller = "objective.labels_from=regions" if regions else ""
    if seen.config.augment.scale[0] > 0.2:
        smaller = "augment.scale=[0.2,1.0]"
    override = "augment.grey=0.5" if worst == "colour" else smaller
    return Finding(
        name, "bad", sentence, f"percentile {known[worst]:.0f}", f"at least {PERCENTILE:.0f}", "nuisance", override
    )


@rule
def labels_are_own_image(seen: Seen) -> Finding | None:
    if seen.moment is None or not seen.moment.own or seen.config.dictionary.own_rows == "exclude":
        return None
    share = next(iter(seen.moment.own.values()))  # of the memory that gives the labels
    if share < OWN_IMAGE:
        sentence = "Few of the nearest rows are crops of the query’s own image."
        return Finding("labels are of others", "good", sentence, f"{share:.1%} of the k nearest rows",
                       f"below {OWN_IMAGE:.0%}", "labels")  # fmt: skip
    repeated = ": labels repeat what InfoNCE says" if isinstance(seen.config.objective, MLSOptions) else ""
    sentence = f"{share:.0%} of the nearest rows are crops of the query’s own image{repeated}."
    return Finding("labels are the own image", "bad", sentence, f"{share:.0%} of the k nearest rows",
                   f"at least {OWN_IMAGE:.0%}", "labels", "dictionary.own_rows=exclude")  # fmt: skip


@rule
def labels_against_truth(seen: Seen) -> Finding | None:
    """Precision beside chance; where the images have no labels, that it is not known."""
    known = seen.moment and seen.moment.labels
    precision, chance = seen.late("labels/precision"), seen.late("labels/precision_chance")
    if known and known.precision:
        precision, chance = next(iter(known.precision.values()))[-1], known.chance
    precision, chance = seen.precision or (precision, chance)
    if precision is None or chance is None:
        if seen.moment is None:
            return None
        sentence = "Whether matches show the same things cannot be told without labels: judge 100 pairs yourself."
        return Finding("cannot be told without labels", "open", sentence, "the images have no labels", "", "judge")
    measured, threshold = f"precision {precision:.3f}, chance {chance:.3f}", f"chance + {GAIN:g}"
    if precision < chance + GAIN:
        sentence = "Matches share a true label with their query hardly more often than random rows do."
        return Finding("labels at chance", "bad", sentence, measured, threshold, "labels")
    sentence = f"{precision:.0%} of the matches share a true label with their query, where {chance:.0%} is chance."
    return Finding("labels beat chance", "good", sentence, measured, threshold, "labels")
