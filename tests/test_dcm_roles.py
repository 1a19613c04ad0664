"""Masks over heads at several roles: one for all of them, or one for each, equal to full forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TOLERANCES, assert_close
from test_several_roles import with_a_twin

import jaxmech as jm
from jaxmech import dcm, memory
from jaxmech.dcm import prompts, training

HEADS = [(2, 1), (1, 3), (2, 0), (3, 1)]
APART = {"last": [(2, 1), (3, 0)], "early": [(1, 3), (2, 1)], "query_box": [(2, 0)]}
GROUPS = {
    "one mask for two tokens": (HEADS, ["early", "query_box"]),
    "one mask, with the last token": (HEADS, ("last", "early")),
    "one mask for roles that may be one token": (HEADS, ["early", "twin"]),
    "a mask for each role": (APART, "last"),
}


BOTH_ATTENTIONS = pytest.mark.parametrize("model", [4, 2], ids=["mha", "gqa"], indirect=True)


@pytest.fixture
def model(request, random_model) -> jm.Model:
    """With grouped queries, or what `BOTH_ATTENTIONS` asks for."""
    return random_model(num_kv_heads=getattr(request, "param", 2))


@pytest.fixture
def pairs(model, random_pairs) -> jm.Pairs:
    return with_a_twin(random_pairs(model, count=10))


@pytest.fixture(params=GROUPS.values(), ids=GROUPS)
def group(request):
    return request.param


def places(group, role):
    """The roles, and of each number of the mask the layer, the roles' indices and the head."""
    if isinstance(group, dict):
        roles = list(group)
        return roles, [(layer, [roles.index(role)], head) for role in roles for layer, head in group[role]]
    return list(role), [(layer, list(range(len(role))), head) for layer, head in group]


def patched(model, pairs, group, role):
    """A function from a mask to the logits [B, V] of full forward passes."""
    roles, numbers = places(group, role)
    clean, corrupt = (np.stack([x[role] for role in roles], 1) for x in (pairs.positions, pairs.corrupt_positions))
    rows, (batch, length) = np.arange(len(pairs))[:, None], pairs.clean.shape
    z = model(pairs.corrupt, capture=("z",), capture_at=corrupt)[1]["z"]
    z = jnp.zeros((len(z), batch, length, *z.shape[3:])).at[:, rows, clean].set(z)

    @jax.jit
    def logits(mask):
        weight = jnp.zeros((model.config.num_layers, batch, length, model.config.num_heads))
        for m, (layer, at, head) in zip(mask, numbers, strict=True):
            weight = weight.at[layer, rows, clean[:, at], head].set(1 - m)
        patch = jm.Interventions(z=jm.Patch(weight, z))
        return model(pairs.clean, patch, logits_at=pairs.positions["last"])[0]

    return logits


def answering(pairs, logits) -> jm.Pairs:
    return dataclasses.replace(pairs, labels=np.asarray(logits.argmax(-1)))


@BOTH_ATTENTIONS
def test_training_equals_adam_on_patched_full_forwards(model, pairs, group):
    logits = patched(model, pairs, *group)
    count = len(places(*group)[1])
    pairs = answering(pairs, logits(jnp.zeros(count)) - logits(jnp.ones(count)))  # what patching raises most
    run = dcm.train(model, pairs, *group, lam=0.03, batch_size=5, epochs=3)

    @jax.value_and_grad
    def loss(mask, rows):
        said = jnp.take_along_axis(logits(mask), pairs.labels[:, None], 1)[rows, 0]
        return -said.mean() + 0.03 * (1 - mask).sum()

    optimizer, mask = optax.adam(0.1), jnp.ones(count)
    state = optimizer.init(mask)
    for rows, value, after in zip(run.history.rows, run.history.loss, run.history.mask, strict=True):
        expected, gradient = loss(mask, rows)
        updates, state = optimizer.update(gradient, state)
        mask = jnp.clip(optax.apply_updates(mask, updates), 0, 1)
        assert_close(value, expected, TOLERANCES.cone)
        assert_close(after, mask, TOLERANCES.cone)
    assert ((mask > 0) & (mask < 1)).any(), "nothing was learnt, or all at once"


@BOTH_ATTENTIONS
def test_accuracy_equals_full_forwards(model, pairs, group):
    logits, count = patched(model, pairs, *group), len(places(*group)[1])
    masks = np.random.default_rng(0).random((3, count)).astype(np.float32)
    pairs = answering(pairs, logits(masks[1]))
    found = dcm.accuracy(model, pairs, group[0], masks, group[1])
    expected = [(logits(mask).argmax(-1) == pairs.labels).mean() for mask in masks]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[1] == 1 and np.abs(logits(masks[0]) - logits(masks[1])).max() > 0.1


def test_a_run_says_what_it_selects_at_each_role(model, pairs, group):
    pairs = answering(pairs, patched(model, pairs, *group)(jnp.zeros(len(places(*group)[1]))))
    run = dcm.train(model, pairs, *group, lam=-1.0, batch_size=5, epochs=8)  # patching is rewarded here
    heads, role = group
    assert run.mask.max() < 0.5 and run.group == heads
    by_role = heads if isinstance(heads, dict) else dict.fromkeys(role, heads)
    assert run.selected_by_role == by_role
    assert run.selected == [head for at in (heads.values() if isinstance(heads, dict) else [heads]) for head in at]
    found = dcm.accuracy(model, pairs, run.group, np.round(run.mask)[None], run.roles[0])
    assert jm.patch_activations(model, pairs, run.selected_by_role).accuracy == found[0] == 1


def test_selection_patches_where_the_training_did(model, pairs, group):
    pairs = answering(pairs, patched(model, pairs, *group)(jnp.arange(len(places(*group)[1])) % 2 * 1.0))
    run = dcm.train(model, pairs[:6], *group, batch_size=3, epochs=4)
    chosen = dcm.select(model, run, pairs[6:], every=3)
    tried = [*range(3, 9, 3), 8]
    rounded = np.round(run.history.mask[np.array(tried) - 1])
    expected = dcm.accuracy(model, pairs[6:], run.group, rounded, group[1])
    assert chosen.validation_accuracy == expected.max()
    assert chosen.step in [step for step, x in zip(tried, expected, strict=True) if x == expected.max()]
    assert chosen.roles == run.roles


def test_selection_can_patch_elsewhere_and_says_so(model, pairs):
    pairs = answering(pairs, patched(model, pairs, HEADS, ["early"])(jnp.zeros(len(HEADS))))
    run = dcm.train(model, pairs, HEADS, "last", lam=-1.0, batch_size=5, epochs=8)
    chosen = dcm.select(model, run, pairs, "early")
    assert chosen.selected_by_role.keys() == {"early"}
    assert jm.patch_activations(model, pairs, chosen.selected_by_role).accuracy == chosen.validation_accuracy
    by_role = dcm.train(model, pairs, APART, batch_size=5)
    with pytest.raises(ValueError, match="role='early', but heads of the run have masks at roles of their own"):
        dcm.select(model, by_role, pairs, "early")


def test_runs_of_both_kinds_are_selected_together(model, pairs):
    groups = {"tied": (HEADS, ["early", "query_box"]), "apart": ({"early": [(1, 3)], "query_box": [(2, 0)]}, "last")}
    runs = {("x", name): dcm.train(model, pairs, *group, batch_size=4) for name, group in groups.items()}
    found = dcm.select_many(model, runs, {"x": pairs})
    for key, run in runs.items():
        alone = dcm.select(model, run, pairs)
        assert (found[key].step, found[key].validation_accuracy) == (alone.step, alone.validation_accuracy)


def test_the_papers_validation_knows_one_role(model, pairs):
    names = {"early": "prev_query_box", "last": "last", "query_box": "query_box"}
    roles = [
        {names[r]: x for r, x in given.items() if r in names} for given in (pairs.positions, pairs.corrupt_positions)
    ]
    pairs = dataclasses.replace(pairs, positions=roles[0], corrupt_positions=roles[1])
    run = dcm.train(model, pairs, HEADS, ["prev_query_box", "last"], batch_size=5)
    with pytest.raises(ValueError, match="is of masks at prev_query_box alone, not at prev_query_box, last"):
        dcm.select(model, run, pairs, compat="paper", train_pairs=pairs)


def test_desiderata_that_differ_at_the_second_role_alone_are_kept_apart(model, pairs):
    """They share their prompts and the first role; what is patched at the second is at another token."""
    moved = dict(pairs.positions) | {"query_box": pairs.positions["query_box"] - 1}
    both = {"one": pairs, "other": dataclasses.replace(pairs, positions=moved)}
    group, role = {"early": [(1, 3)], "query_box": [(2, 0), (1, 1)]}, "last"
    runs = dcm.train_many(model, both, {"g": group}, role, batch_size=5)
    masks = np.random.default_rng(1).random((2, 3)).astype(np.float32)
    found = dcm.accuracies(model, both, {(name, ("early", "query_box")): {"m": (group, masks)} for name in both})
    for name, some in both.items():
        alone = dcm.train(model, some, group, role, batch_size=5)
        assert_close(runs[name, "g", 0.01, 0].history.loss, alone.history.loss, TOLERANCES.cone)
        np.testing.assert_array_equal(found[name, ("early", "query_box")]["m"], dcm.accuracy(model, some, group, masks))
    losses = [runs[name, "g", 0.01, 0].history.loss for name in both]
    assert np.abs(losses[0] - losses[1]).max() > 1e-3, "the token made no difference"


def test_trainings_at_several_roles_are_cut_to_fit_the_memory(model, pairs, monkeypatch):
    options = {"batch_size": 2, "epochs": 2}
    whole = {name: dcm.train(model, pairs, *group, **options) for name, group in GROUPS.items()}
    fitting = {
        name: dcm.accuracy(model, pairs, run.group, run.history.mask, run.roles[0]) for name, run in whole.items()
    }
    monkeypatch.setattr(memory, "fitting", lambda weights, bytes_each: 3)
    for name, group in GROUPS.items():
        cut = dcm.train(model, pairs, *group, **options)
        assert_close(cut.history.mask, whole[name].history.mask, TOLERANCES.cone)
        found = dcm.accuracy(model, pairs, whole[name].group, whole[name].history.mask, whole[name].roles[0])
        np.testing.assert_array_equal(found, fitting[name])


def test_many_groups_at_their_roles_are_trained_as_one_by_one(model, pairs):
    groups = {"a": APART, "b": {"query_box": [(1, 0)]}, "c": {"last": [(3, 3)], "query_box": [(0, 2), (2, 2)]}}
    runs = dcm.train_many(model, {"x": pairs}, groups, lams=np.array([0.01, 0.1]), batch_size=4)
    for name, group in groups.items():
        alone = dcm.train(model, pairs, group, lam=0.1, batch_size=4)
        run = runs["x", name, 0.1, 0]
        assert (run.heads, run.roles) == (alone.heads, alone.roles)
        assert_close(run.history.mask, alone.history.mask, 1e-4)
    together = dcm.select_many(model, {("x", name): runs["x", name, 0.01, 0] for name in groups}, {"x": pairs})
    for name in groups:
        alone = dcm.select(model, runs["x", name, 0.01, 0], pairs)
        assert (together["x", name].step, together["x", name].selected) == (alone.step, alone.selected)


@pytest.mark.parametrize("fitting", [12, 11, 3, 1], ids=lambda x: f"{x} fit")
def test_prompts_are_run_once_for_groups_at_several_roles_if_they_fit(model, pairs, monkeypatch, fitting):
    """Or else place by place, as many desiderata at a time as fit, one at least: one of three at both of two roles."""
    desiderata = {str(i): dataclasses.replace(pairs, corrupt=np.roll(pairs.corrupt, i, axis=0)) for i in range(3)}
    groups = {"a": {"last": [(2, 1), (3, 0)]}, "b": {"query_box": [(1, 0)]}, "also a": {"last": [(1, 3)]}}
    groups["both"] = {"query_box": [(2, 2)], "early": [(1, 1)]}
    options = {"batch_size": 4, "epochs": 1, "lams": [0.05]}
    alone = {
        key: run
        for name, some in desiderata.items()
        for group, heads in groups.items()
        for key, run in dcm.train_many(model, {name: some}, {group: heads}, **options).items()
    }
    of_heads, runs, seen = memory.of_heads(model.config, len(pairs), model.config.num_layers), [], []
    monkeypatch.setattr(training.memory, "fitting", lambda weights, x: fitting if x == 4 * of_heads else 10**6)
    run_base = prompts._run_base
    monkeypatch.setattr(prompts, "_run_base", lambda *inputs, **how: runs.append(how) or run_base(*inputs, **how))
    found = dcm.train_many(model, desiderata, groups, **options, progress=lambda *call: seen.append(call))
    assert len(runs) == {12: 1, 11: 3, 3: 5, 1: 9}[fitting]
    calls = {12: 3, 11: 3, 3: 5, 1: 9}[fitting]
    assert seen == [(i + 1, calls) for i in range(calls)] and list(found) == list(alone)
    for key, run in alone.items():
        assert (found[key].heads, found[key].roles) == (run.heads, run.roles)
        assert_close(found[key].history.loss, run.history.loss, TOLERANCES.recompiled)
        assert_close(found[key].history.mask, run.history.mask, TOLERANCES.cone)


def test_one_mask_at_one_role_is_that_of_a_list(model, pairs):
    by_name, by_list = (dcm.train(model, pairs, *how, batch_size=5) for how in (({"early": HEADS},), (HEADS, "early")))
    np.testing.assert_array_equal(by_name.history.mask, by_list.history.mask)
    assert by_name.roles == by_list.roles == [("early",)] * 4 and by_name.group == HEADS


@pytest.mark.parametrize(
    ("group", "role", "message"),
    [
        (
            {"early": [(1, 1)], "twin": [(1, 2)]},
            "last",
            "'early' and 'twin' are one token.*would need the masks of both",
        ),
        (HEADS, ["early", "elsewhere"], "'early' and 'elsewhere' are one token.*would take the values of two"),
        ({"early": [(1, 1), (1, 1)]}, "last", r"Head \(1, 1\) is named twice"),
        ({"early": []}, "last", "No heads given in the group"),
        ({}, "last", "No heads given in the group"),
        (HEADS, ["early", "early"], r"role=\['early', 'early'\] names a role twice"),
        (HEADS, [], r"role is \[\]"),
        ({"nowhere": [(1, 1)]}, "last", "Unknown role 'nowhere'"),
    ],
)
def test_groups_that_make_no_sense_are_refused(random_model, random_pairs, group, role, message):
    model = random_model()
    pairs = with_a_twin(random_pairs(model))
    moved = [dict(pairs.positions), dict(pairs.corrupt_positions)]
    moved[0]["elsewhere"], moved[1]["elsewhere"] = moved[0]["early"], moved[1]["last"]
    pairs = dataclasses.replace(pairs, positions=moved[0], corrupt_positions=moved[1])
    with pytest.raises(ValueError, match=message):
        dcm.train(model, pairs, group, role, batch_size=2)


def test_a_circuit_is_masked_at_its_roles(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    groups = {"a": APART["last"], "none": [], "b": APART["early"], "c": APART["query_box"]}
    circuit = jm.Circuit(groups, {"a": "last", "none": "elsewhere", "b": "early", "c": "query_box"})
    found, expected = (dcm.train(model, pairs, group, batch_size=2) for group in (circuit, APART))
    assert (found.heads, found.roles) == (expected.heads, expected.roles)
    np.testing.assert_array_equal(found.history.mask, expected.history.mask)
    once = {role: iter(heads) for role, heads in APART.items()}
    np.testing.assert_array_equal(dcm.train(model, pairs, once, batch_size=2).mask, expected.mask)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({("y", "last"): {"m": (HEADS, np.ones((1, 4)))}}, r"masks has \('y', 'last'\), but there are no pairs of it"),
        ({("x", "last"): {}}, r"masks has \('x', 'last'\), but there are no heads"),
        ({("x", "last"): {"m": (5, np.ones((1, 4)))}}, r"heads=5; expected a list of \(layer, head\)"),
    ],
)
def test_masks_of_nothing_are_refused(random_model, random_pairs, masks, message):
    model = random_model()
    with pytest.raises((ValueError, TypeError), match=message):
        dcm.accuracies(model, {"x": random_pairs(model)}, masks)


def test_lists_and_heads_by_role_do_not_go_together(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    with pytest.raises(ValueError, match="expected one kind"):
        dcm.train_many(model, {"x": pairs}, {"a": HEADS, "b": APART}, batch_size=2)
