"""The verdict on a run: each rule on a log that deserves it, and none on one that does not."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from mls.monitor.verdict import RULES, Finding, Seen, verdict
from mls.recipes import load_config

STEPS = range(20, 2001, 20)


def seen(overrides: tuple[str, ...] = (), nuisance: dict[str, float] | None = None, **changes: Any) -> Seen:
    """A healthy run of the paper's recipe, but for what is changed: a value, or a function of the step, by metric."""
    noise = random.Random(0)
    values: dict[str, Any] = {
        "loss": lambda step: 8.0 - step / 1000 + noise.uniform(-0.2, 0.2),
        "loss/info_nce": lambda step: 7.5 - step / 1000,
        "chance/info_nce": 8.3,
        "loss/multi_label": 0.8,
        "gradient/info_nce": 0.3,
        "gradient/multi_label": 0.02,
        "health/projection_cosine": 0.02,
        "health/projection_std": 0.98,
        "health/backbone_cosine": 0.71,
        "health/backbone_std": 0.5,
        "data_wait": lambda step: 0.9 if step < 100 else 0.02,
        "dictionary/fill": lambda step: min(1.0, step / 100),
        "labels/precision": 0.5,
        "labels/precision_chance": 0.35,
        "skipped_steps": 0.0,
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    known = {name: value for name, value in values.items() if value is not None}
    series = {n: [(step, v(step) if callable(v) else v) for step in STEPS] for n, v in known.items()}
    return Seen(load_config("mls_coco_r50", overrides), series, nuisance=nuisance or {"layout": 60.0, "colour": 55.0})


def found(run: Seen) -> dict[str, Finding]:
    return {finding.rule: finding for finding in verdict(run)}


def test_a_healthy_run_is_called_healthy() -> None:
    findings = found(seen())
    in_order = ["labels beat chance", "labels follow nothing else", "terms pull", "data keep up", "no divergence"]
    assert list(findings) == ["healthy", *in_order]
    assert {finding.kind for finding in findings.values()} == {"good"}
    assert all(finding.measured and finding.threshold and finding.evidence for finding in findings.values())


@pytest.mark.parametrize(
    ("name", "run", "measured"),
    [
        ("collapse", seen(health__projection_cosine=lambda step: step / 2500), "0.80"),
        ("collapse", seen(health__backbone_std=0.02), "0.02"),
        ("starving for data", seen(data_wait=0.43), "43%"),
        ("diverging", seen(loss=lambda step: 7 + abs(step - 900) / 500), "%"),
        ("diverging", seen(skipped_steps=lambda step: step / 50), "2.0% of the steps"),
        ("term inactive", seen(loss__info_nce=8.25), "8.25, chance 8.30"),
        ("term inactive", seen(gradient__multi_label=0.0003), "0.10%"),
        ("labels follow layout", seen(nuisance={"layout": 94.0, "thumbnail": 95.0, "colour": 60.0}), "94"),
        ("labels follow colour", seen(nuisance={"layout": 60.0, "colour": 91.0}), "91"),
        ("labels at chance", seen(labels__precision=0.36), "0.360, chance 0.350"),
    ],
)
def test_each_rule_speaks_of_the_run_that_deserves_it_and_no_other_does(name: str, run: Seen, measured: str) -> None:
    findings = found(run)
    bad = [finding for finding in findings.values() if finding.kind == "bad"]
    assert [finding.rule for finding in bad] == [name] == list(findings)[:1]
    assert 4 <= len(findings) <= 6
    assert measured in bad[0].measured
    assert bad[0].threshold and bad[0].evidence


def test_own_images_and_missing_labels_are_told_from_a_moment(synthetic_run: Callable[..., Any]) -> None:
    from mls.monitor import moments

    def of(**changes: Any) -> dict[str, Finding]:
        run = synthetic_run(f"run{len(changes)}", **changes)
        return found(Seen(run.config, {"loss": [(1, 2.0)]}, moments.read(run.path)[-1]))

    own = of(own={"features": 0.7, "projections": 0.1})["labels are the own image"]
    assert own.override == "dictionary.own_rows=exclude"
    assert "70%" in own.measured
    assert of(labels=False, agreement={})["cannot be told without labels"].evidence == "judge"


def test_matches_are_no_fault_of_a_run_that_takes_no_labels_from_them() -> None:
    for method in ("moco_v2", "mls_words", "simsiam"):
        run = seen((f"objective.method={method}",), nuisance={"layout": 94.0})
        findings = found(run)
        followed = findings["matches follow layout"]
        assert (followed.kind, followed.override) == ("open", "")
        assert followed.sentence.endswith("where chance is 50. No label is taken from them.")
        assert findings["matches beat chance"].kind == "good" and "healthy" in findings
        assert not any(rule.startswith("labels") for rule in findings)


def test_nothing_is_said_of_a_run_that_logged_nothing_and_a_term_that_is_not_there_yet_is_not_inactive() -> None:
    assert [finding.rule for finding in verdict(Seen(load_config("mls_coco_r50"), {}))] == ["unknown"]
    warming = seen(("objective.warmup_epochs=3",), loss__multi_label=None, gradient__multi_label=None)
    assert "term inactive" not in found(warming)
    assert len(RULES) == 7


def test_a_loss_that_rises_as_a_term_joins_does_not_diverge() -> None:
    later = lambda value: lambda step: value if step >= 700 else None
    words: dict[str, Any] = {"loss__multi_label": None, "gradient__multi_label": None}
    words |= {"loss__words": later(4.5), "gradient__words": later(1.5)}
    partly = lambda step: 20 if step == 700 else 50  # the term joined in the midst of the first row's steps
    run = seen(
        ("objective.method=mls_words",), loss=lambda step: (partly(step) if step >= 700 else 8) - step / 1e3, **words
    )
    assert found(run)["no divergence"].kind == "good"
    assert "the term of words 500.0% of" in found(run)["terms pull"].measured
    words |= {"chance__words": later(4.6), "floor__words": later(2.6)}
    for loss, rule in ((4.5, "terms pull"), (4.58, "term inactive")):
        told = found(seen(("objective.method=mls_words",), **words | {"loss__words": later(loss)}))
        assert rule in told, (loss, told)
    assert told["term inactive"].measured == "4.58, chance 4.60, at best 2.60"
