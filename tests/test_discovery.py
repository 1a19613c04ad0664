"""The chain of sweeps: what a stage selects, and what it hands on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from full_forward import path_patch as full_path_patch
from test_chain import CHAIN

import jaxmech as jm
from jaxmech.run_folder import RunFolder


def strongest(scores: np.ndarray, k: int) -> list[tuple[int, int]]:
    mean = scores.mean(-1)
    return [tuple(int(i) for i in np.unravel_index(flat, mean.shape)) for flat in np.argsort(mean, axis=None)[:k]]


def test_each_stage_takes_its_receivers_from_the_stage_before(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    circuit = jm.discover(model, pairs, chain=CHAIN)
    readers = strongest(full_path_patch(model, pairs), 3)
    senders = strongest(full_path_patch(model, pairs, "last", readers, "q"), 2)
    early = strongest(full_path_patch(model, pairs, "early", senders, "v"), 2)
    assert circuit.groups == {"readers": [h for h in readers if h not in senders], "senders": senders, "early": early}
    assert circuit.heads_by_role == {"last": circuit.groups["readers"] + senders, "early": early}


def test_roles_of_a_chain_are_different_tokens_somewhere(random_model, random_pairs):
    model = random_model(num_layers=3)
    pairs = random_pairs(model)
    at, corrupt_at = ({**roles, "twin": roles["early"].copy()} for roles in (pairs.positions, pairs.corrupt_positions))
    chain = (CHAIN[0], jm.Stage("early", "early", "readers", "v", 2), jm.Stage("again", "twin", "readers", "v", 2))
    with pytest.raises(ValueError, match="roles 'early' and 'twin' of the chain are the same token in every prompt"):
        jm.discover(model, replace(pairs, positions=at, corrupt_positions=corrupt_at), chain=chain)
    at["twin"][0] += 1
    found = jm.discover(model, replace(pairs, positions=at, corrupt_positions=corrupt_at), chain=chain)
    assert all(found.groups[group] for group in ("early", "again"))


@pytest.fixture
def two_heads(random_model, random_pairs):
    model = random_model(num_layers=3, num_heads=2, num_kv_heads=2)
    return model, random_pairs(model)


@pytest.fixture
def fake_scores(two_heads):
    """A function from the mean score of every head to scores of the `two_heads`, equal for all prompts."""
    probability = jm.path_patch(*two_heads).probability

    def make(*rows: list[float]) -> jm.PathScores:
        mean = np.array(rows, np.float32)[..., None]
        return jm.PathScores(np.repeat(mean, len(probability), axis=-1), probability)

    return make


def test_a_head_chosen_again_at_the_same_role_leaves_the_earlier_group(two_heads, fake_scores):
    done = {
        "readers": fake_scores([-0.1, -0.5], [-0.6, 0], [-0.9, 0]),
        "senders": fake_scores([0, -0.4], [-0.3, 0], [0, 0]),
        "early": fake_scores([0, -0.2], [0, 0], [0, 0]),
    }
    circuit = jm.discover(*two_heads, chain=CHAIN, done=done)
    assert circuit.groups["readers"] == [(2, 0)]
    assert circuit.groups["senders"] == [(0, 1), (1, 0)]
    assert circuit.scores["readers"].top(3, 1e-3) == [(2, 0), (1, 0), (0, 1)], "all that the stage selected"
    assert circuit.groups["early"] == [(0, 1)], "it acts at another role, so it stays in both groups"
    assert circuit.stopped == ""


def test_heads_below_the_smallest_effect_are_never_selected(two_heads, fake_scores):
    done = {"readers": fake_scores([-0.5, -0.0009], [0.3, 0], [0, 0]), "senders": fake_scores([-1, 0], [0, 0], [0, 0])}
    circuit = jm.discover(*two_heads, chain=CHAIN[:2], done=done, k={"readers": 6})
    assert circuit.groups == {"readers": [], "senders": [(0, 0)]}  # (0, 0) moved on, and nothing else was selected
    done = {"readers": done["readers"]}
    circuit = jm.discover(*two_heads, chain=CHAIN[:1], done=done, k={"readers": 6}, min_effect=1e-4)
    assert circuit.groups == {"readers": [(0, 0), (0, 1)]}


def test_a_stage_that_finds_nothing_ends_the_chain_and_says_so(two_heads, fake_scores):
    done = {"readers": fake_scores([-0.5, 0], [-0.3, 0], [0, 0]), "senders": fake_scores([0.2, 0], [0, 0], [0, 0])}
    with pytest.warns(UserWarning, match="Stage 'senders' .*reading q of readers.*found no head.*chain ends here"):
        circuit = jm.discover(*two_heads, chain=CHAIN, done=done)
    assert list(circuit.groups) == ["readers"]
    assert "'senders'" in circuit.stopped
    assert list(circuit.scores) == ["readers", "senders"], "the scores are there to look at"


def test_receivers_in_the_first_layer_end_the_chain_since_nothing_reaches_them(two_heads, fake_scores):
    done = {"readers": fake_scores([-0.5, 0], [0, 0], [0, 0])}
    with pytest.warns(UserWarning, match="No head has a path"), pytest.warns(UserWarning, match="found no head"):
        circuit = jm.discover(*two_heads, chain=CHAIN, done=done)
    assert not circuit.scores["senders"].per_example.any()
    plain = jm.path_patch(*two_heads)
    np.testing.assert_allclose(circuit.scores["senders"].probability, plain.probability, rtol=1e-5)


def test_finished_sweeps_are_reported_once_and_not_run_again(two_heads):
    seen = []
    first = jm.discover(*two_heads, chain=CHAIN[:2], on_stage=lambda stage, scores: seen.append(stage.group))
    again = jm.discover(*two_heads, chain=CHAIN[:2], done=first.scores, on_stage=lambda *_: pytest.fail("ran again"))
    assert seen == ["readers", "senders"] and again.groups == first.groups


def test_scores_of_a_run_folder_are_taken_up(two_heads, tmp_path):
    run = RunFolder.open(tmp_path, {})
    options = {"chain": CHAIN[:2], "metric": "log_probability"}
    first = jm.discover(*two_heads, **options, on_stage=lambda stage, scores: run.keep(stage.group, scores))
    never = lambda *_: pytest.fail("ran again")  # noqa: E731
    again = jm.discover(*two_heads, **options, done=jm.read_scores(tmp_path), on_stage=never)
    assert again.groups == first.groups


def test_progress_counts_to_the_end_of_every_stage(two_heads):
    calls = []
    circuit = jm.discover(*two_heads, chain=CHAIN, progress=lambda *call: calls.append(call))
    for stage in CHAIN[: len(circuit.scores)]:
        steps = [(done, total) for found, done, total in calls if found.group == stage.group]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


def test_scores_can_be_of_another_metric(two_heads):
    model, pairs = two_heads
    wrong = (pairs.labels + 1) % model.config.vocab_size
    circuit = jm.discover(model, pairs, chain=CHAIN[:2], metric="logit_difference", wrong_labels=wrong, min_effect=0)
    expected = jm.path_patch(model, pairs, metric="logit_difference", wrong_labels=wrong)
    np.testing.assert_array_equal(circuit.scores["readers"].per_example, expected.per_example)
    assert circuit.scores["senders"].metric == "logit_difference"


def test_scores_that_are_not_finite_choose_no_heads(two_heads, fake_scores):
    model, pairs = two_heads
    loud = jm.Model(model.config, {"params": {**model.weights, "unembed": 1e4 * model.weights["unembed"]}})
    with pytest.raises(ValueError, match=r'mean scores of . of 6 heads are not finite.*metric="log_probability"'):
        jm.discover(loud, pairs, chain=CHAIN[:1])
    with pytest.raises(ValueError, match="mean scores of 1 of 6 heads are not finite"):
        fake_scores([-0.5, np.nan], [0, 0], [0, 0]).top(1)


def test_a_smallest_effect_is_checked_before_a_sweep(two_heads, monkeypatch):
    monkeypatch.setattr(jm.discovery, "path_patch", lambda *arguments, **options: pytest.fail("a sweep was run"))
    for min_effect in (np.inf, np.nan, -1):
        with pytest.raises(ValueError, match=r"min_effect=.*; expected a finite number of at least 0"):
            jm.discover(*two_heads, chain=CHAIN, min_effect=min_effect, metric="log_probability")


@pytest.mark.parametrize("options", [{"min_effect": np.nan}, {"min_effect": -1}, {"min_effect": 5}])
def test_a_smallest_effect_that_is_no_fraction_is_refused(two_heads, options):
    with pytest.raises(ValueError, match="min_effect=.*; expected a fraction from 0 to 1"):
        jm.discover(*two_heads, chain=CHAIN, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, per_example=s.per_example[:2]), r"has scores \(2, 2, 5\) .* = \(3, 2, 5\)"),
        (lambda s: jm.PathScores(s.per_example[..., :1], s.probability[:1]), r"\(3, 2, 1\).* = \(3, 2, 5\)"),
        (lambda s: replace(s, probability=s.probability[:1]), r"probabilities \(1,\)"),
        (lambda s: replace(s, metric="log_probability"), "metric='log_probability'; expected 'probability'"),
        (lambda s: replace(s, probability=1.1 * s.probability), "probability .* of the label of example 0, where the"),
        (lambda s: replace(s, probability=s.probability[::-1]), "of another model or other pairs, or in another order"),
        (lambda s: replace(s, probability=np.nan * s.probability), "has probability nan of the label"),
    ],
)
def test_scores_of_something_else_are_not_taken_for_done(two_heads, fake_scores, change, message):
    done = {"readers": fake_scores([-0.5, 0], [0, 0], [0, 0])}
    with pytest.raises(ValueError, match=r"done\['readers'\].*" + message):
        jm.discover(*two_heads, chain=CHAIN, done={"readers": change(done["readers"])})


def test_scores_of_other_pairs_or_another_model_are_not_taken_for_done(random_model, random_pairs, two_heads):
    model, pairs = two_heads
    done = {"readers": jm.path_patch(model, pairs)}
    for other in (
        (model, random_pairs(model, seed=1)),
        (model, replace(pairs, labels=pairs.labels[::-1])),
        (random_model(5, num_layers=3, num_heads=2, num_kv_heads=2), pairs),
    ):
        with pytest.raises(ValueError, match="scores are of another model or other pairs"):
            jm.discover(*other, chain=CHAIN[:1], done=done)


@pytest.mark.parametrize(
    ("scores", "min_effect", "words"),
    [
        ([0, 0.3], 0, "the strongest mean effect is 0, and no head lowers the metric. The chain ends here"),
        ([0, -0.01], 0.1, "the strongest mean effect is -0.01, above -min_effect = -0.1. The chain ends here"),
    ],
)
def test_a_stage_that_finds_nothing_says_why(two_heads, fake_scores, scores, min_effect, words):
    done = {"readers": fake_scores(scores, [0, 0], [0, 0])}
    with pytest.warns(UserWarning, match=words):
        circuit = jm.discover(*two_heads, chain=CHAIN, done=done, min_effect=min_effect)
    assert circuit.groups == {} and words in circuit.stopped


def test_a_function_that_rises_where_the_model_is_worse_is_asked_about(two_heads):
    model, pairs = two_heads

    def loss(logits, rows):
        return -jax.nn.log_softmax(logits)[jnp.arange(len(rows)), jnp.asarray(pairs.labels)[rows]]

    alone = jm.Stage("all", "last", k=1)
    scores = jm.path_patch(model, pairs, metric=loss)
    falling = replace(scores, per_example=-np.abs(scores.per_example))
    rising = replace(scores, per_example=np.abs(scores.per_example))
    hint = r"the largest .*: is loss\(\) larger where the model is worse\? Then score its negative\."
    with pytest.warns(UserWarning, match=hint):
        circuit = jm.discover(model, pairs, chain=[alone], metric=loss, done={"all": rising})
    assert "score its negative" in circuit.stopped
    assert jm.discover(model, pairs, chain=[alone], metric=loss, done={"all": falling}).groups["all"]
    for other, min_effect in ((rising, 1e3), (falling, 1e3)):
        circuit = warned(model, pairs, chain=[alone], metric=loss, done={"all": other}, min_effect=min_effect)
        assert circuit.stopped and "negative" not in circuit.stopped
    named = {"all": replace(rising, metric="log_probability")}
    assert "negative" not in warned(model, pairs, chain=[alone], metric="log_probability", done=named).stopped


def warned(*args, **options) -> jm.Circuit:
    """The circuit of a discovery that ends early."""
    with pytest.warns(UserWarning, match="found no head"):
        return jm.discover(*args, **options)


def test_scores_in_bfloat16_are_taken_for_done_whatever_their_batch_size(random_model, random_pairs):
    model = random_model(dtype="bfloat16")
    pairs = random_pairs(model, count=9)
    done = {"readers": jm.path_patch(model, pairs, batch_size=2)}
    found = jm.discover(model, pairs, chain=CHAIN[:1], done=done, on_stage=lambda *_: pytest.fail("ran again"))
    assert found.groups["readers"] == done["readers"].top(3, 1e-3)


def test_unknown_groups_are_named(two_heads, fake_scores):
    with pytest.raises(ValueError, match=r"done has the groups \['reader'\]"):
        jm.discover(*two_heads, chain=CHAIN, done={"reader": fake_scores([-0.5, 0], [0, 0], [0, 0])})
    circuit = jm.Circuit({"readers": [(0, 0)]}, {"readers": "last"})
    with pytest.raises(ValueError, match=r"Unknown groups \['reader'\]; the circuit has \['readers'\]"):
        circuit.without({"reader": [(0, 0)]})
    with pytest.raises(ValueError, match=r"roles says nothing of the groups \['readers'\]"):
        jm.Circuit({"readers": [(0, 0)]}, {})
    with pytest.raises(ValueError, match=r"roles names \['reader'\]; the groups are \['readers'\]"):
        jm.Circuit({"readers": [(0, 0)]}, {"readers": "last", "reader": "last"})


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ({"readers": 7}, r"stage 'readers': k=7, but the model has 6 heads \(3 layers x 2\)"),
        ({"readers": 0}, "k=0; expected a whole number from 1 on"),
        ({"readers": 2.5}, "k=2.5; expected a whole number"),
        ({"readers": "four"}, "k='four'; expected a whole number"),
        ({"writers": 2}, r"k names the groups \['writers'\]; the chain has"),
    ],
)
def test_impossible_numbers_of_heads_are_named(two_heads, k, message):
    with pytest.raises(ValueError, match=message):
        jm.discover(*two_heads, chain=CHAIN, k=k)


def test_a_stage_without_receivers_is_at_the_last_token_under_whatever_name(two_heads):
    model, pairs = two_heads
    roles = [{**x, "answer": x["last"]} for x in (pairs.positions, pairs.corrupt_positions)]
    named = jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, *roles)
    found = jm.discover(model, named, chain=[jm.Stage("a", "answer", k=2)])
    assert found.groups["a"] == jm.discover(model, pairs, chain=[jm.Stage("a", "last", k=2)]).groups["a"]
    mixed = [{**x, "now_and_then": np.where(np.arange(5) < 4, x["last"], x["query_box"])} for x in roles]
    named = jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, *mixed)
    with pytest.raises(ValueError, match="sender='now_and_then' without receivers; only the last token"):
        jm.discover(model, named, chain=[jm.Stage("a", "now_and_then", k=2)])
    chain = (CHAIN[0], jm.Stage("a", "query_box"))
    with pytest.raises(ValueError, match="sender='query_box' without receivers; only the last token has a direct path"):
        jm.discover(model, pairs, chain=chain, on_stage=lambda *_: pytest.fail("a sweep was run"))


def test_every_head_of_the_model_may_be_asked_for_and_the_whole_probability(two_heads, fake_scores):
    chain = [jm.Stage("all", "last", k=6)]
    done = {"all": fake_scores([-0.5, -1.0], [-0.1, -0.2], [-0.3, -0.4])}
    assert len(jm.discover(*two_heads, chain=chain, done=done).groups["all"]) == 6
    assert jm.discover(*two_heads, chain=chain, done=done, min_effect=1.0).groups["all"] == [(0, 1)]


def test_a_role_that_the_pairs_lack_is_named_before_any_work(two_heads):
    with pytest.raises(ValueError, match="Unknown role 'prev_query_box'"):
        chain = (jm.Stage("readers", "last", k=3), jm.Stage("senders", "prev_query_box", "readers", "v", k=3))
        jm.discover(*two_heads, chain=chain, on_stage=lambda *_: pytest.fail("a sweep was run"))
    with pytest.raises(ValueError, match=r"roles \['prev_query_box'\] of the default chain.*chain=\[jm.Stage"):
        jm.discover(*two_heads, on_stage=lambda *_: pytest.fail("a sweep was run"))


def test_several_groups_can_be_the_receivers_of_a_stage(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    chain = (*CHAIN[:2], jm.Stage("early", "early", ("senders", "readers"), "v", k=4))
    circuit = jm.discover(model, pairs, chain=chain)
    readers = strongest(full_path_patch(model, pairs), 3)
    senders = strongest(full_path_patch(model, pairs, "last", readers, "q"), 2)
    together = sorted({*readers, *senders})
    expected = full_path_patch(model, pairs, "early", together, "v")
    assert circuit.groups["early"] == strongest(expected, 4)
    assert_close(circuit.scores["early"].per_example, expected, TOLERANCES.cone)
    assert len(together) > len(senders) and not np.allclose(
        full_path_patch(model, pairs, "early", senders, "v"), expected
    )


def test_circuits_are_equal_if_their_groups_and_roles_are(two_heads, tmp_path):
    circuit = jm.discover(*two_heads, chain=CHAIN[:2])
    circuit.save(tmp_path / "circuit.json", roles=True)
    loaded = jm.Circuit.load(tmp_path / "circuit.json")
    assert loaded == circuit == replace(circuit, stopped="Stage 'x' found no head.") and not loaded.scores
    assert circuit != circuit.without({"readers": circuit.groups["readers"][:1]})
    assert circuit != jm.Circuit(circuit.groups, {**circuit.roles, "readers": "early"})


def test_results_with_arrays_are_compared_as_objects(two_heads):
    model, pairs = two_heads
    chosen = jm.Circuit({"all": [(2, 0), (2, 1)]}, {"all": "last"})
    means = jm.mean_activations(model, pairs)
    patch = jm.Patch(np.ones(1), np.ones(1))
    makers = [
        lambda: jm.path_patch(model, pairs),
        lambda: jm.faithfulness(model, pairs, chosen, means, random=1),
        lambda: jm.completeness(model, pairs, chosen, means, random=1),
        lambda: jm.minimality(model, pairs, chosen, means),
        lambda: jm.dcm.train(model, pairs, [(2, 0), (2, 1)], batch_size=5, epochs=1),
        lambda: jm.Model(model.config, model.params),
        lambda: replace(patch),
        lambda: jm.Interventions(z=patch),
    ]
    for make in makers:
        one, other = make(), make()
        assert one == one and one != other and len({one, other}) == 2
