"""A study measured by another metric than accuracy: its parts are what the methods say by that metric."""

import contextlib
import dataclasses

import numpy as np
import pytest
from pairs_task import records, settings_of, write_task

import jaxmech as jm
from jaxmech.report import doubts, write_report
from jaxmech.report.measures import CHANGED, MEASURES
from jaxmech.report.style import new_axes, value_axis
from jaxmech.study import STAGES, doubt
from jaxmech.study.study import Study

MEASURED = {"log_probability": True, "logit_difference": False}  # and whether heads at other tokens are ablated


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, records(8))
    return dataclasses.replace(settings_of(folder), metric="log_probability", threshold=0.03)


@pytest.fixture(scope="module")
def discovery(settings) -> dict:
    study = Study(settings, {})
    return {name: STAGES["discovery"].run(study, name, lambda *_: None) for name in settings.names}


@pytest.fixture(scope="module", params=MEASURED)
def study(settings, discovery, request) -> Study:
    """All stages but those of desiderata."""
    settings = dataclasses.replace(settings, measure=request.param, ablate_elsewhere=MEASURED[request.param])
    study = Study(settings, {"discovery": discovery})
    for name, stage in STAGES.items():
        if name not in study.results and stage.fits(settings):
            parts = stage.parts(settings)
            study.results[name] = {part: stage.run(study, part, lambda *_: None) for part in parts}  # pyright: ignore
    return study


@pytest.fixture(scope="module")
def results(study) -> dict:
    settings = study.settings
    found = {name: STAGES[name].assembled(parts) for name, parts in study.results.items()}
    of_study = {name: getattr(settings, name) for name in ("metric", "measure", "ablate_elsewhere")}
    return found | of_study | {"models": settings.names, "prompts": len(study.data.pairs), "chance": None}


def test_a_model_in_which_no_head_is_found_goes_through_all_stages(settings):
    settings = dataclasses.replace(settings, min_effect=50.0)
    study = Study(settings, {})
    for name, stage in STAGES.items():
        if stage.fits(settings):
            with contextlib.ExitStack() as warned:
                if name == "discovery":
                    warned.enter_context(pytest.warns(UserWarning, match="found no head"))
                parts = {part: stage.run(study, part, lambda *_: None) for part in stage.parts(settings)}
            study.results[name] = parts  # pyright: ignore
    assert study.results["cmap"]["tuned"] == {"groups": {"z": {}}, "heads": {}}
    assert study.results["discovery"]["tuned"]["stopped"] and study.circuit("tuned") == jm.Circuit({}, {})
    own = study.results["faithfulness"]["tuned"]["tuned"]
    assert own["circuit"] == own["empty"] and own["random"] == [own["empty"]["value"]] * 2


def f_of(study: Study, mean) -> np.ndarray:
    return np.exp(mean) if study.settings.measure == "log_probability" else np.asarray(mean)


def test_models_and_patched_ones_are_measured_by_it(study):
    by, pairs = study.settings.measure, study.data.pairs
    base, tuned = (study.model(name) for name in ("base", "tuned"))
    entry, own = study.results["accuracy"]["tuned"], jm.predict(tuned, pairs, metric=by)
    assert entry["value"] == pytest.approx(float(f_of(study, own.mean))) and entry["accuracy"] == own.accuracy
    assert entry["low"] < entry["value"] < entry["high"]
    low, high = own.confidence_interval(seed=study.settings.seed)
    np.testing.assert_allclose([entry["low"], entry["high"]], f_of(study, [low, high]))
    found = study.results["cmap"]["tuned"]
    patched = jm.cmap(base, tuned, pairs, study.circuit("tuned"), metric=by)
    assert found["groups"]["z"]["whole circuit"]["value"] == pytest.approx(float(f_of(study, patched.mean)), rel=1e-4)
    assert patched.mean != pytest.approx(jm.predict(base, pairs, metric=by).mean, rel=0.05)
    sweep = jm.cmap_heads(base, tuned, pairs[:5], "last", metric=by)
    np.testing.assert_allclose(found["heads"]["last"]["change"], sweep.scores.mean, atol=1e-5)
    blocked = jm.knockout(tuned, pairs, "asked", "before", metric=by).mean
    np.testing.assert_allclose(study.results["knockout"]["tuned"]["asked -> before"], f_of(study, blocked), rtol=1e-5)


def test_the_criteria_are_by_it(study):
    by, pairs, tuned = study.settings.measure, study.data.pairs, study.model("tuned")
    means, groups = study.means("tuned"), study.results["discovery"]["tuned"]["groups"]
    found = jm.Circuit({g: [tuple(h) for h in hs] for g, hs in groups.items()}, study.circuit("tuned").roles)
    how = {"metric": by, "ablate_elsewhere": study.settings.ablate_elsewhere}
    minimal = jm.minimality(tuned, pairs, found, means, threshold=0.03, **how)
    assert study.circuit("tuned") == minimal.circuit
    entries = study.results["minimality"]["tuned"]["groups"]
    for group, scores in minimal.scores.items():
        np.testing.assert_allclose([entry["score"] for entry in entries[group]], scores, atol=1e-4)
    faithful = jm.faithfulness(tuned, pairs, minimal.circuit, means, random=2, seed=2, **how)
    entry = study.results["faithfulness"]["tuned"]["tuned"]
    assert entry["circuit"]["value"] == pytest.approx(float(f_of(study, faithful.circuit.mean)), rel=1e-4)
    assert entry["empty"]["value"] == pytest.approx(float(f_of(study, faithful.empty.mean)), rel=1e-4)
    for share in ("ratio", "recovered"):
        assert entry[share]["value"] == pytest.approx(getattr(faithful, share), rel=1e-4)
    np.testing.assert_allclose(entry["random"], f_of(study, faithful.random.mean), rtol=1e-3, atol=1e-6)
    complete = jm.completeness(tuned, pairs, minimal.circuit, means, random=2, seed=2, **how)
    for side in ("circuit", "model"):
        values = [entry[side] for entry in study.results["completeness"]["tuned"]]
        np.testing.assert_allclose(values, f_of(study, getattr(complete, side).mean), rtol=1e-3, atol=1e-6)


def test_the_report_is_of_it(results, tmp_path):
    measure, changed = MEASURES[results["measure"]], CHANGED[results["measure"]]
    page = write_report(tmp_path, results, settings={}, versions={}, timings={}).read_text().replace("&#39;", "'")
    before, after = (results["accuracy"][model]["value"] for model in ("base", "tuned"))
    how = "gain" if after > before else "loss"
    gain = f"{measure.text(after)} in tuned, {measure.text(before)} in base: a {how} of {measure.gap(after - before)}."
    assert f"The {measure.long} is {gain}" in page
    share = "recovered" if results["measure"] == "logit_difference" else "ratio"
    own = results["faithfulness"]["tuned"]["tuned"]
    assert f">{share}</th>" in page and f"{100 * own[share]['value']:.1f}\N{NO-BREAK SPACE}% [" in page
    assert measure.with_interval(own["circuit"]) in page and measure.with_interval(results["accuracy"]["base"]) in page
    assert ("no heads" in page) == (share == "recovered") == ("as a share of the whole circuit's" in page)
    role, (layer, head) = "last", results["discovery"]["tuned"]["groups"]["movers"][0]
    assert f">{changed.bare(results['cmap']['tuned']['heads'][role]['change'][layer][head])}<" in page
    alone = "All other tokens are as in the model, on both sides.", "by their mean outputs, at its tokens alone."
    assert all((words in page) == (not results["ablate_elsewhere"]) for words in alone)
    assert f"<h2>{measure.title}</h2>" in page and "<h2>Accuracy</h2>" not in page
    assert "How often the most" not in page and "Accuracy, that is, how often" in page


def test_units_are_those_of_the_measure():
    difference, typical = MEASURES["logit_difference"], MEASURES["log_probability"]
    entry = {"value": -0.25, "low": -1.5, "high": 2.0}
    assert difference.with_interval(entry) == "−0.250 [−1.500, 2.000]"
    assert (
        typical.with_interval({"value": 3e-9, "low": 1e-9, "high": 4e-8})
        == "3.0e-07\N{NO-BREAK SPACE}% [1.0e-07, 4.0e-06]"
    )
    assert (difference.gap(-0.5), MEASURES["accuracy"].gap(-0.5)) == ("0.500", "50.0 points")
    assert (difference.label, typical.label) == ("logit difference", "typical p(correct), %")
    assert CHANGED["accuracy"].signed(0.015) == "+1.5\N{NO-BREAK SPACE}points"


@pytest.mark.parametrize(
    ("measure", "values", "ends"),
    [("accuracy", [0.001, 0.002], (0, 100)), ("log_probability", [0.001, 0.002], (0, 0.21)),
     ("logit_difference", [-1.0, 3.0], (-1.2, 3.2)), ("logit_difference", [], (0, 0.05))],
)  # fmt: skip
def test_axes_show_small_values_and_those_below_0(measure, values, ends):
    _, axes = new_axes(1.0)
    value_axis(axes, "x", MEASURES[measure], values)
    assert axes.get_xlim() == pytest.approx(ends) and axes.get_xlabel() == MEASURES[measure].label


@pytest.mark.parametrize(
    ("measure", "value", "words"),
    [("accuracy", 0.0, "m answers no prompt right"), ("accuracy", 0.05, "m answers only 5.0 % of the prompts right"),
     ("probability", 2e-5, "m gives the right answer a probability of only 0.002 %"), ("probability", 0.05, ""),
     ("logit_difference", -0.3, "m has no larger logit for the right answer than for the wrong one, on average"),
     ("logit_difference", 0.3, "")],
)  # fmt: skip
def test_a_model_that_cannot_do_the_task_is_doubted_by_what_is_measured(measure, value, words):
    found = doubt("m", value, None, measure)
    assert found.startswith(f"{words}. A model") if words else found == ""
    results = {"models": ["m"], "measure": measure, "accuracy": {"m": {"accuracy": 0.0, "value": value}}}
    assert doubts(results) == ([found] if found else [])
