"""The criteria by other metrics than accuracy, against hand-written loops over plain full forward passes."""

import math
from collections.abc import Callable

import full_forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from criteria_case import CIRCUIT, EVERY_HEAD, GROUPS, PROMPTS, ROLES, Case, Heads, left, made

import jaxmech as jm

METRICS = ["probability", "log_probability", "logit_difference", "function"]


@pytest.fixture
def case(random_model, random_pairs) -> Case:
    return made(random_model, random_pairs)


@pytest.fixture
def measured(case) -> Callable:
    """A function from a metric to its keywords, and one from heads by role (None: the model) to its values [B]."""
    wrong = (case.pairs.labels + 7) % case.model.config.vocab_size
    rows = np.arange(PROMPTS)

    def by(metric: str):
        def values(heads: Heads | None, elsewhere: bool = True) -> np.ndarray:
            if heads is None:
                logits = full_forward.last_logits(case.model, case.pairs)
            else:
                logits = full_forward.evaluate(case.model, case.pairs, heads, case.means, elsewhere)
            logits = logits.astype(np.float64)
            right = logits[rows, case.pairs.labels]
            if metric == "logit_difference":
                return right - logits[rows, wrong]
            if metric == "function":
                return logits[rows, case.pairs.labels] ** 2
            log_probability = right - np.log(np.exp(logits).sum(-1))
            return np.exp(log_probability) if metric == "probability" else log_probability

        if metric == "function":
            return {"metric": squared_logit}, values
        return {"metric": metric, "wrong_labels": wrong if metric == "logit_difference" else None}, values

    def squared_logit(logits, rows):
        """Of the label, which is looked up by row."""
        assert logits.shape == (len(rows), case.model.config.vocab_size)
        return logits[jnp.arange(len(rows)), jnp.asarray(case.pairs.labels)[rows]] ** 2

    return by


def f(metric: str, values: np.ndarray) -> np.ndarray:
    return np.exp(values.mean(-1)) if metric == "log_probability" else values.mean(-1)


@pytest.mark.parametrize("metric", METRICS)
def test_faithfulness_in_other_metrics_is_that_of_full_forwards(case, measured, metric):
    options, values = measured(metric)
    found = jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, random=2, **options)
    model, circuit = values(None), values(left(CIRCUIT, {}))
    others = np.stack([values(left(other, {})) for other in found.random_circuits])
    for ours, theirs in ((found.model, model), (found.circuit, circuit), (found.random, others)):
        assert_close(ours.per_example, theirs, TOLERANCES.cone)
    assert found.ratio == pytest.approx(f(metric, circuit) / f(metric, model), rel=1e-4)
    np.testing.assert_allclose(found.random_ratios, f(metric, others) / f(metric, model), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.circuit.correct, case.correct(left(CIRCUIT, {})))
    nothing = values(dict.fromkeys(ROLES.values(), ()))
    assert_close(found.empty.per_example, nothing, TOLERANCES.cone)
    model, circuit, nothing = (f(metric, x) for x in (model, circuit, nothing))
    assert found.recovered == pytest.approx((circuit - nothing) / (model - nothing), rel=1e-3)
    low, high = found.confidence_interval()
    assert low < found.ratio < high and found.circuit.logits is None
    assert found.metric == ("squared_logit()" if metric == "function" else metric)
    mean_low, mean_high = found.circuit.confidence_interval()
    assert mean_low < found.circuit.mean < mean_high


@pytest.mark.parametrize("metric", METRICS)
def test_completeness_in_other_metrics_is_that_of_full_forwards(case, measured, metric):
    options, values = measured(metric)
    found = jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=1, **options)
    for i, gone in enumerate(found.subsets):
        every = dict.fromkeys(ROLES.values(), EVERY_HEAD)
        taken = {role: [h for g in gone if ROLES[g] == role for h in gone[g]] for role in every}
        model = values({role: [head for head in heads if head not in taken[role]] for role, heads in every.items()})
        circuit = values(left(CIRCUIT, gone))
        assert_close(found.circuit.per_example[i], circuit, TOLERANCES.cone)
        assert_close(found.model.per_example[i], model, TOLERANCES.cone)
        assert found.gap[i] == pytest.approx(abs(f(metric, circuit) - f(metric, model)), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_minimality_in_other_metrics_equals_loops_over_full_forwards(case, measured, metric):
    options, values = measured(metric)
    small = jm.Circuit(
        {g: GROUPS[g][:3] for g in ("readers", "binders")}, {g: ROLES[g] for g in ("readers", "binders")}
    )
    whole = lambda group, gone: f(metric, values(left(small, {group: gone})))  # noqa: E731
    found = jm.minimality(case.model, case.pairs, small, case.means, fraction=0.3, **options)
    assert found.whole == pytest.approx(whole("readers", []), rel=1e-4)
    for group, heads in small.groups.items():
        without = np.array([[whole(group, [i, j]) for j in heads] for i in heads])
        assert_close(found.pairs[group], without, TOLERANCES.cone)
        for i, head in enumerate(heads):
            drop = np.diag(without) - without[i]
            best = max((x for x in range(len(heads)) if x != i), key=lambda j, drop=drop: drop[j])
            partners = [heads[best]] if drop[best] > 0 else []  # ceil(0.3 * 3) = 1
            assert found.partners[group][i] == partners
            before, after = whole(group, partners), whole(group, [*partners, head])
            assert found.before[group][i] == pytest.approx(before, rel=1e-4)
            assert found.after[group][i] == pytest.approx(after, rel=1e-4)
            signed = metric in ("logit_difference", "function")
            score = (before - after) / abs(found.whole) if signed else before / after - 1
            assert found.scores[group][i] == pytest.approx(score, abs=1e-3)
        kept = [head for head, score in zip(heads, found.scores[group], strict=True) if score >= 0.01]
        assert found.circuit.groups[group] == kept


@pytest.mark.parametrize("metric", ["logit_difference", "anything()"])
def test_a_head_without_which_a_negative_value_is_more_negative_scores_high(metric):
    """Its ratio would say that the head is good for nothing."""
    before, after = {"g": np.array([-0.14])}, {"g": np.array([-0.76])}
    found = jm.Minimality({}, {}, before, after, -0.1, 0.01, CIRCUIT, metric)
    assert found.scores["g"] == pytest.approx([6.2])
    assert jm.Minimality({}, {}, before, after, -0.1, 0.01, CIRCUIT, "probability").scores["g"] == [0]


def test_where_the_label_is_never_the_most_probable_token_another_metric_tells_circuits_apart(case):
    """As in indirect object identification: accuracy knows nothing, the logit difference does."""
    never = case.with_labels((case.own_answers() + 1) % case.model.config.vocab_size)
    args = never.model, never.pairs, CIRCUIT, never.means
    assert math.isnan(jm.faithfulness(*args, random=1).ratio)
    found = jm.faithfulness(*args, random=1, metric="probability")
    assert found.model.accuracy == 0 and found.ratio > 0 and found.random_ratios[0] > 0
    assert abs(found.ratio - found.random_ratios[0]) > 0.01


def test_what_is_measured_does_not_depend_on_parts_or_kept_logits(case, measured):
    args = case.model, case.pairs, [CIRCUIT, {"last": []}, {"last": EVERY_HEAD}], case.means
    options, function = {"metric": "probability"}, measured("function")[0]
    for elsewhere in (True, False):
        squared = [jm.evaluate(*args, elsewhere, batch_size=size, **function).measured for size in (None, 5)]
        assert_close(squared[1], squared[0], TOLERANCES.recompiled)
        whole = jm.evaluate(*args, elsewhere, **options)
        parts = jm.evaluate(*args, elsewhere, batch_size=5, keep_logits=False, **options)
        assert whole.logits is not None and parts.logits is None and whole.measured is not None
        assert_close(parts.measured, whole.measured, TOLERANCES.recompiled)
        right = jax.nn.softmax(whole.logits)[:, np.arange(PROMPTS), case.pairs.labels]
        assert_close(whole.measured, right, TOLERANCES.recompiled)
    assert jm.evaluate(*args).measured is None
    own = jm.predict(case.model, case.pairs, batch_size=7, **options)
    assert_close(own.measured, jm.path_patch(case.model, case.pairs).probability, TOLERANCES.cone)


def test_a_function_that_is_never_positive_has_a_recovered_share_with_an_interval(case):
    """The share of the way from everything ablated to the model, as by hand; ratios of it are nan."""
    own = jnp.asarray(full_forward.last_logits(case.model, case.pairs))

    def likeness(logits, rows):
        """Minus the squared distance from the model's own logits: 0 at best."""
        return -jnp.square(logits - own[rows]).sum(-1)

    arguments = case.model, case.pairs, CIRCUIT, case.means
    found = jm.faithfulness(*arguments, random=3, metric=likeness)
    assert math.isnan(found.ratio) and repr(found).startswith(
        f"Faithfulness(likeness(): recovered {found.recovered:.3f}"
    )

    def values(heads):
        logits = full_forward.evaluate(case.model, case.pairs, heads, case.means, True)
        return -np.square(logits - own).sum(-1)

    none = values(dict.fromkeys(CIRCUIT.heads_by_role, ()))
    part, random = values(left(CIRCUIT, {})), [values(left(other, {})) for other in found.random_circuits]
    share = lambda x: (x.mean() - none.mean()) / (0 - none.mean())  # noqa: E731
    assert found.recovered == pytest.approx(share(part), rel=1e-3)
    np.testing.assert_allclose(found.random_recovered, [share(x) for x in random], rtol=1e-2, atol=1e-3)
    low, high = found.recovered_interval(0.9, resamples=200, seed=3)
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(PROMPTS, [1 / PROMPTS] * PROMPTS, size=200)
    shares = [1 - (times @ part) / (times @ none) for times in drawn]
    np.testing.assert_allclose([low, high], np.quantile(shares, [0.05, 0.95]), rtol=1e-3)
    assert low < found.recovered < high
