"""The chain of sweeps: what a stage selects, what it hands on, and how chains and circuits are read."""

import json

import numpy as np
import pytest
from full_forward import path_patch as full_path_patch

import jaxmech as jm
from jaxmech.discovery import check_chain

CHAIN = (
    jm.Stage("readers", "last", k=3),
    jm.Stage("senders", "last", "readers", "q", k=2),
    jm.Stage("early", "early", "senders", "v", k=2),
)


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


def fake_scores(*rows: list[float]) -> jm.PathScores:
    return jm.PathScores(np.array(rows, np.float32)[..., None], np.ones(1, np.float32))


@pytest.fixture
def two_heads(random_model, random_pairs):
    model = random_model(num_layers=3, num_heads=2, num_kv_heads=2)
    return model, random_pairs(model)


def test_a_head_chosen_again_at_the_same_role_leaves_the_earlier_group(two_heads):
    done = {
        "readers": fake_scores([-0.1, -0.5], [-0.6, 0], [-0.9, 0]),
        "senders": fake_scores([0, -0.4], [-0.3, 0], [0, 0]),
        "early": fake_scores([0, -0.2], [0, 0], [0, 0]),
    }
    circuit = jm.discover(*two_heads, chain=CHAIN, done=done)
    assert circuit.groups["readers"] == [(2, 0)]
    assert circuit.groups["senders"] == [(0, 1), (1, 0)]
    assert circuit.groups["early"] == [(0, 1)], "it acts at another role, so it stays in both groups"
    assert circuit.stopped == ""


def test_heads_below_the_smallest_effect_are_never_selected(two_heads):
    done = {"readers": fake_scores([-0.5, -0.0009], [0.3, 0], [0, 0]), "senders": fake_scores([-1, 0], [0, 0], [0, 0])}
    circuit = jm.discover(*two_heads, chain=CHAIN[:2], done=done, k={"readers": 6})
    assert circuit.groups == {"readers": [], "senders": [(0, 0)]}  # (0, 0) moved on, and nothing else was selected
    done = {"readers": done["readers"]}
    circuit = jm.discover(*two_heads, chain=CHAIN[:1], done=done, k={"readers": 6}, min_effect=1e-4)
    assert circuit.groups == {"readers": [(0, 0), (0, 1)]}


def test_a_stage_that_finds_nothing_ends_the_chain_and_says_so(two_heads):
    done = {"readers": fake_scores([-0.5, 0], [-0.3, 0], [0, 0]), "senders": fake_scores([0.2, 0], [0, 0], [0, 0])}
    with pytest.warns(UserWarning, match="Stage 'senders' .*readers via q.*found no head.*chain ends here"):
        circuit = jm.discover(*two_heads, chain=CHAIN, done=done)
    assert list(circuit.groups) == ["readers"]
    assert "'senders'" in circuit.stopped
    assert list(circuit.scores) == ["readers", "senders"], "the scores are there to look at"


def test_receivers_in_the_first_layer_end_the_chain_since_nothing_reaches_them(two_heads):
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


def test_scores_that_are_not_finite_choose_no_heads(two_heads):
    model, pairs = two_heads
    loud = jm.Model(model.config, {"params": {**model.weights, "unembed": 1e4 * model.weights["unembed"]}})
    with pytest.raises(ValueError, match=r'mean scores of . of 6 heads are not finite.*metric="log_probability"'):
        jm.discover(loud, pairs, chain=CHAIN[:1])
    with pytest.raises(ValueError, match="mean scores of 1 of 6 heads are not finite"):
        fake_scores([-0.5, np.nan], [0, 0], [0, 0]).top(1)


@pytest.mark.parametrize("options", [{"min_effect": np.nan}, {"min_effect": -1}, {"min_effect": 5}])
def test_a_smallest_effect_that_is_no_fraction_is_refused(two_heads, options):
    with pytest.raises(ValueError, match="min_effect=.*; expected a fraction from 0 to 1"):
        jm.discover(*two_heads, chain=CHAIN, **options)


def test_unknown_groups_are_named(two_heads):
    with pytest.raises(ValueError, match=r"done has the groups \['reader'\]"):
        jm.discover(*two_heads, chain=CHAIN, done={"reader": fake_scores([-0.5, 0], [0, 0], [0, 0])})
    circuit = jm.Circuit({"readers": [(0, 0)]}, {"readers": "last"})
    with pytest.raises(ValueError, match=r"Unknown groups \['reader'\]; the circuit has \['readers'\]"):
        circuit.without({"reader": [(0, 0)]})
    with pytest.raises(ValueError, match=r"roles says nothing of the groups \['readers'\]"):
        jm.Circuit({"readers": [(0, 0)]}, {})


def test_the_default_chain_is_that_of_the_paper():
    assert [(s.group, s.sender, s.receivers, s.via, s.k) for s in jm.PAPER_CHAIN] == [
        ("value_fetcher", "last", None, None, 20),
        ("pos_transmitter", "last", "value_fetcher", "q", 5),
        ("pos_detector", "query_box", "pos_transmitter", "v", 10),
        ("struct_reader", "prev_query_box", "pos_detector", "v", 5),
    ]


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


def test_every_head_of_the_model_may_be_asked_for_and_the_whole_probability(two_heads):
    chain = [jm.Stage("all", "last", k=6)]
    done = {"all": fake_scores([-0.5, -1.0], [-0.1, -0.2], [-0.3, -0.4])}
    assert len(jm.discover(*two_heads, chain=chain, done=done).groups["all"]) == 6
    assert jm.discover(*two_heads, chain=chain, done=done, min_effect=1.0).groups["all"] == [(0, 1)]


def test_a_head_in_two_groups_of_one_role_acts_there_once():
    groups = {"a": [(0, 1), (2, 3)], "b": [(2, 3), (1, 1)], "c": [(2, 3)]}
    circuit = jm.Circuit(groups, {"a": "last", "b": "last", "c": "early"})
    assert circuit.heads_by_role == {"last": [(0, 1), (2, 3), (1, 1)], "early": [(2, 3)]}
    assert circuit.without({"a": [[2, 3]], "c": [[2, 3]]}).groups == {"a": [(0, 1)], "b": [(2, 3), (1, 1)], "c": []}
    lists = jm.Circuit({"a": [[0, 1], [2, 3]]}, {"a": "last"})
    assert lists.without({"a": [(2, 3)]}).groups == {"a": [[0, 1]]}, "as JSON has heads"


def test_a_role_that_the_pairs_lack_is_named_before_any_work(two_heads):
    with pytest.raises(ValueError, match="Unknown role 'prev_query_box'"):
        chain = (jm.Stage("readers", "last", k=3), jm.Stage("senders", "prev_query_box", "readers", "v", k=3))
        jm.discover(*two_heads, chain=chain, on_stage=lambda *_: pytest.fail("a sweep was run"))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "no stages"),
        ((CHAIN[0], CHAIN[0]), "'readers' occurs twice"),
        ((CHAIN[1], CHAIN[0]), "receivers 'readers' is none of the earlier groups"),
        ((jm.Stage("a", "last", via="q"),), "with via='q'"),
        ((CHAIN[0], jm.Stage("a", "last", "readers")), "with via=None"),
        ((CHAIN[0], jm.Stage("a", "last", "readers", "z")), "with via='z'"),
        ((jm.Stage("../a", "last"),), r"group '\.\./a': files and arrays are named by groups"),
        ((jm.Stage("a/b", "last"),), "group 'a/b': files and arrays are named by groups"),
        ((jm.Stage("file", "last"),), "group 'file': .* and none of file, allow_pickle"),
    ],
)
def test_chains_that_do_not_fit_together_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        check_chain(stages)


def test_a_chain_is_read_from_toml(tmp_path):
    (tmp_path / "chain.toml").write_text(
        '[[stage]]\ngroup = "readers"\nsender = "last"\nk = 3\n\n'
        '[[stage]]\ngroup = "senders"\nsender = "last"\nreceivers = "readers"\nvia = "q"\nk = 2\n'
    )
    assert jm.read_chain(tmp_path / "chain.toml") == CHAIN[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage = [", "not a chain"),
        ('[[stage]]\ngroup = "a"\n', "sender"),
        ('[[stage]]\ngroup = "a"\nsender = "last"\ncolour = "red"\n', "colour"),
        ('[[stages]]\ngroup = "a"\nsender = "last"\n', r"unknown tables \['stages'\]"),
    ],
)
def test_a_bad_chain_file_is_named(tmp_path, text, message):
    (tmp_path / "chain.toml").write_text(text)
    with pytest.raises(ValueError, match=f"chain.toml.*{message}"):
        jm.read_chain(tmp_path / "chain.toml")


def test_a_circuit_is_saved_as_in_the_paper_and_read_back(tmp_path):
    circuit = jm.Circuit({"value_fetcher": [(3, 1), (2, 0)]}, {"value_fetcher": "last"})
    circuit.save(tmp_path / "new" / "circuit.json")
    assert json.loads((tmp_path / "new" / "circuit.json").read_text()) == {"value_fetcher": [[3, 1], [2, 0]]}
    loaded = jm.Circuit.load(tmp_path / "new" / "circuit.json")
    assert (loaded.groups, loaded.roles) == (circuit.groups, circuit.roles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a circuit file"),
        ("[1]", "not a circuit file"),
        ('{"value_fetcher": [[1]]}', "not a circuit file"),
        ('{"value_fetcher": [["1", "2"]]}', r"not \[layer, head\]"),
        ('{"value_fetcher": [[-1, 2]]}', r"not \[layer, head\]"),
        ('{"value_fetcher": [[1, -2]]}', r"not \[layer, head\]"),
        ('{"induction": [[1, 2]]}', r"groups \['induction'\].*give the chain"),
    ],
)
def test_a_bad_circuit_file_is_named(tmp_path, text, message):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(ValueError, match=f"circuit.json.*{message}"):
        jm.Circuit.load(tmp_path / "circuit.json")
