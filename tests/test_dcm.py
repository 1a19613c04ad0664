"""DCM: training equals Adam on the gradient of patched full forwards, many runs equal single ones, and selection."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TOLERANCES, assert_close, right_in_turn

import jaxmech as jm
from jaxmech import dcm, memory
from jaxmech.dcm import groups, prompts, selection, steps, targets
from jaxmech.metrics import name_of
from jaxmech.model import forward

HEADS = [(2, 1), (1, 3), (2, 0), (3, 1)]


BOTH_ATTENTIONS = pytest.mark.parametrize("model", [4, 2], ids=["mha", "gqa"], indirect=True)


@pytest.fixture
def model(request, random_model) -> jm.Model:
    """With grouped queries, or what `BOTH_ATTENTIONS` asks for."""
    return random_model(num_kv_heads=getattr(request, "param", 2))


@pytest.fixture
def pairs(model, random_pairs) -> jm.Pairs:
    return random_pairs(model, count=10)


@partial(jax.jit, static_argnums=(0, 1))
def full_forward(config, heads, weights, z, clean, position, last, mask) -> jax.Array:
    """Logits [B, V] of a full forward pass with z at `position` mixed by the mask with the values z [L, B, N, H]."""
    layers, numbers = np.array(heads).T
    weight = jnp.zeros((config.num_layers, 1, 1, config.num_heads)).at[layers, 0, 0, numbers].set(1 - mask)
    patch = jm.Patch(weight, z[:, :, None], position[:, None])
    return forward(config, weights, clean, jm.Interventions(z=patch), logits_at=last)[0]


def patched(model, pairs, heads, role):
    """A function from a mask to the logits [B, V]."""
    rows = np.arange(len(pairs))
    z = model(pairs.corrupt, capture=("z",))[1]["z"][:, rows, pairs.corrupt_position(role)]
    prompts = pairs.clean, pairs.position(role), pairs.position("last")
    return partial(full_forward, model.config, tuple(heads), model.weights, z, *prompts)


def answering(model, pairs, heads, role, mask) -> jm.Pairs:
    """The pairs with the labels that the model says under the mask."""
    labels = np.asarray(patched(model, pairs, heads, role)(np.asarray(mask, np.float32)).argmax(-1))
    return jm.Pairs(pairs.clean, pairs.corrupt, labels, pairs.positions, pairs.corrupt_positions)


def target_logit(pairs, logits) -> jax.Array:
    return logits[np.arange(len(pairs)), pairs.labels]


def trained_by_full_forwards(
    model, pairs, heads, role, lam, orders, value=target_logit, optimizer=None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [steps] and masks [steps, n] of Adam, one full forward and backward pass a step.

    Args:
      value: what is raised of each example, a function from the pairs and their logits [B, V] to [B].
      optimizer: another one.
    """
    optimizer, logits = optimizer or optax.adam(0.1), patched(model, pairs, heads, role)
    mask = jnp.ones(len(heads))
    state, losses, masks = optimizer.init(mask), [], []

    @jax.jit
    @jax.value_and_grad
    def loss(mask, share):  # of every example in the batch
        return -value(pairs, logits(mask)) @ share + lam * (1 - mask).sum()

    for rows in orders:
        value, gradient = loss(mask, np.isin(np.arange(len(pairs)), rows) / (rows >= 0).sum())
        update = optax.with_extra_args_support(optimizer).update
        updates, state = update(gradient, state, mask, value=value, grad=gradient)
        mask = jnp.clip(optax.apply_updates(mask, updates), 0, 1)
        losses.append(value)
        masks.append(mask)
    return np.array(losses), np.array(masks)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("role", ["last", "query_box", "early"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_equals_adam_on_patched_full_forwards(model, pairs, role, shuffle):
    pairs = answering(model, pairs, HEADS, role, [0, 0, 0, 1])
    run = dcm.train(model, pairs, HEADS, role, lam=0.05, batch_size=4, epochs=2, shuffle=shuffle, seed=3)
    assert run.history.rows.shape == (6, 4)  # 10 examples: two batches of 4 and one of 2
    np.testing.assert_array_equal(np.sort(run.history.rows[:3].reshape(-1)), [-1, -1, *range(10)])
    loss, mask = trained_by_full_forwards(model, pairs, HEADS, role, 0.05, run.history.rows)
    assert (mask < 1).any()
    assert_close(run.history.loss, loss, TOLERANCES.cone)
    assert_close(run.history.mask, mask, TOLERANCES.cone)
    np.testing.assert_array_equal(run.mask, run.history.mask[-1])


OPTIMIZERS = {
    "sgd on a schedule": optax.sgd(optax.linear_schedule(0.2, 0.02, 6), momentum=0.9),
    "clipped rmsprop": optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.05)),
    "with weight decay": optax.adamw(0.1, weight_decay=0.2),
    "by the loss": optax.polyak_sgd(max_learning_rate=0.1, f_min=-20),
    "by more values of the loss": optax.lbfgs(0.05, linesearch=None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_trains_as_on_full_forwards(model, pairs, name):
    pairs = answering(model, pairs, HEADS, "query_box", [0, 0, 0, 1])
    how = {"lam": 0.05, "batch_size": 4, "optimizer": OPTIMIZERS[name]}
    run = dcm.train(model, pairs, HEADS, "query_box", **how)
    orders = run.history.rows
    loss, mask = trained_by_full_forwards(model, pairs, HEADS, "query_box", 0.05, orders, optimizer=OPTIMIZERS[name])
    assert_close(run.history.loss, loss, TOLERANCES.cone)
    assert_close(run.history.mask, mask, TOLERANCES.cone)
    with pytest.raises(TypeError, match="optimizer=0.1; expected one of optax"):
        dcm.train(model, pairs, HEADS, "query_box", batch_size=4, optimizer=0.1)  # pyright: ignore
    by_adam = dcm.train(model, pairs, HEADS, "query_box", lam=0.05, batch_size=4)
    assert np.abs(by_adam.mask - run.mask).max() > 0.01


def squared_logit(logits, rows):
    """Of the token whose id is the row."""
    return logits[jnp.arange(len(rows)), rows] ** 2 / 10


METRICS = {
    "probability": lambda pairs, logits: jnp.exp(METRICS["log_probability"](pairs, logits)),
    "log_probability": lambda pairs, logits: target_logit(pairs, jax.nn.log_softmax(logits)),
    "logit_difference": lambda pairs, logits: (
        target_logit(pairs, logits) - logits[np.arange(len(pairs)), pairs.wrong_labels]
    ),
    squared_logit: lambda pairs, logits: squared_logit(logits, np.arange(len(pairs))),
}


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_masks_can_be_trained_to_raise_another_metric(model, pairs, metric):
    wrong = (pairs.labels + 7) % model.config.vocab_size
    pairs = dataclasses.replace(answering(model, pairs, HEADS, "early", [0, 0, 0, 1]), wrong_labels=wrong)
    options = {"lam": 1e-4, "batch_size": 4, "epochs": 2, "shuffle": True, "seed": 3}
    run = dcm.train(model, pairs, HEADS, "early", **options, metric=metric)
    loss, mask = trained_by_full_forwards(model, pairs, HEADS, "early", 1e-4, run.history.rows, METRICS[metric])
    assert (mask < 1).any()
    assert_close(run.history.loss, loss, TOLERANCES.cone)
    assert_close(run.history.mask, mask, TOLERANCES.cone)
    other = dcm.train(model, pairs, HEADS, "early", **options)
    assert np.abs(run.history.loss - other.history.loss).max() > 0.1


def test_every_epoch_is_shuffled_anew(random_model, random_pairs):
    model = random_model()
    run = dcm.train(model, random_pairs(model, count=6), [(3, 0)], batch_size=3, epochs=3, shuffle=True)
    epochs = run.history.rows.reshape(3, 6)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(6), (3, 1)))
    assert len(np.unique(epochs, axis=0)) == 3


def test_prompts_of_equal_tokens_that_end_elsewhere_are_other_base_prompts(model, pairs):
    """They share tokens and the role's positions, not the token at which the answer is read."""
    earlier = {**pairs.positions, "last": pairs.position("last") - 1}
    desiderata = {"one": pairs, "two": dataclasses.replace(pairs, positions=earlier)}
    runs = dcm.train_many(model, desiderata, {"a": HEADS}, "early", batch_size=10, epochs=1)
    masks = {(name, "early"): {"a": (HEADS, np.ones((1, 4)))} for name in desiderata}
    logits, rows = np.asarray(model(pairs.clean)[0]), np.arange(len(pairs))
    said = {name: logits[rows, x.position("last")] for name, x in desiderata.items()}
    for name in desiderata:
        assert_close(runs[name, "a", 0.01, 0].history.loss, [-said[name][rows, pairs.labels].mean()], TOLERANCES.cone)
        desiderata[name] = right_in_turn(desiderata[name], said[name].argmax(-1))
    found = dcm.accuracies(model, desiderata, masks)
    assert [found[name, "early"]["a"].item() for name in desiderata] == [0.5, 0.5]


@pytest.mark.parametrize("tied", [False, True])
def test_heads_of_the_last_layer_and_tied_embeddings_train_too(random_model, random_pairs, tied):
    model = random_model(tie_embeddings=tied)
    pairs = random_pairs(model, count=4)
    run = dcm.train(model, pairs, [(3, 0), (3, 2)], "last", batch_size=4)
    loss, mask = trained_by_full_forwards(model, pairs, [(3, 0), (3, 2)], "last", 0.01, run.history.rows)
    assert_close(run.history.loss, loss, TOLERANCES.cone)
    assert_close(run.history.mask, mask, TOLERANCES.cone)


def test_the_first_loss_is_that_of_the_unpatched_model(model, pairs):
    run = dcm.train(model, pairs, HEADS, batch_size=10, epochs=1)
    rows = np.arange(len(pairs))
    logits = np.asarray(model(pairs.clean)[0])[rows, pairs.position("last"), pairs.labels]
    assert_close(run.history.loss[0], -logits.mean(), TOLERANCES.cone)


def test_many_runs_at_once_are_the_runs_one_by_one(model, random_pairs):
    desiderata = {"one": random_pairs(model, 6, seed=1), "two": random_pairs(model, 6, length=14, seed=2)}
    one = desiderata["one"]  # with the same base prompts and other counterfactual ones
    desiderata["three"] = jm.Pairs(one.clean, one.corrupt[::-1], one.labels, one.positions, one.positions)
    groups = {"a": HEADS, "b": [(3, 3), (0, 1), (1, 0)]}
    options = {"batch_size": 4, "shuffle": True}
    found = dcm.train_many(model, desiderata, groups, "query_box", lams=[0.01, 0.3], seeds=[0, 5], **options)
    assert len(found) == 24
    for (name, group, lam, seed), run in found.items():
        if (name, group, lam, seed) in (("three", "b", 0.3, 5), ("two", "a", 0.01, 0)):
            alone = dcm.train(model, desiderata[name], groups[group], "query_box", lam, seed=seed, **options)
            assert run.heads == alone.heads
            assert_close(run.history.loss, alone.history.loss, TOLERANCES.recompiled)
            assert_close(run.history.mask, alone.history.mask, TOLERANCES.cone)
    assert not np.array_equal(found["one", "a", 0.01, 0].history.rows, found["one", "a", 0.01, 5].history.rows)


@pytest.mark.parametrize("shuffle", [False, True])
def test_trainings_that_do_not_fit_the_memory_are_cut_and_equal_whole_ones(
    random_model, random_pairs, monkeypatch, shuffle
):
    model = random_model(num_kv_heads=2)
    desiderata = {"one": random_pairs(model, 10, seed=1), "two": random_pairs(model, 10, length=14, seed=2)}
    desiderata = {name: answering(model, x, HEADS, "query_box", [0, 1, 1, 0]) for name, x in desiderata.items()}
    options = {"role": "query_box", "lams": [0.0, 0.05], "seeds": [0, 5], "batch_size": 3, "shuffle": shuffle}
    whole = dcm.train_many(model, desiderata, {"a": HEADS}, **options)
    kept = 2 * prompts._base_bytes(model.config, list(desiderata.values()), [prompts.Place(["query_box"], 1)])
    calls, train = [], steps._train
    monkeypatch.setattr(steps, "_train", lambda *inputs, **static: calls.append(inputs) or train(*inputs, **static))
    monkeypatch.setattr(memory, "CPU_BUDGET", 2 * 6 * kept)  # 6 prompts of each, of 10
    seen = []
    cut = dcm.train_many(model, desiderata, {"a": HEADS}, **options, progress=lambda *call: seen.append(call))
    assert seen == [(i + 1, len(calls)) for i in range(len(calls))]
    at_a_time, runs = calls[0][6].shape[1], len(calls[0][4].lam)
    assert at_a_time < 8
    assert runs < 8
    assert len(calls) == math.ceil(8 / at_a_time) * math.ceil(8 / runs)
    assert len({str(jax.tree.map(np.shape, call)) for call in calls}) == 1
    assert all((run.history.mask < 0.9).any() for run in whole.values()), "nothing was learned"
    for key, run in cut.items():
        np.testing.assert_array_equal(run.history.rows, whole[key].history.rows)
        assert_close(run.history.loss, whole[key].history.loss, TOLERANCES.recompiled)
        assert_close(run.history.mask, whole[key].history.mask, TOLERANCES.cone)
    masks = np.array([run.mask for (name, *_), run in whole.items() if name == "one"])
    fitting = dcm.accuracy(model, desiderata["one"], HEADS, masks, "query_box")
    monkeypatch.setattr(memory, "CPU_BUDGET", 1)
    np.testing.assert_array_equal(dcm.accuracy(model, desiderata["one"], HEADS, masks, "query_box"), fitting)


def test_segments_are_steps_whose_examples_fit():
    rng = np.random.default_rng(0)
    orders = np.stack([np.pad(rng.permutation(10), (0, 2), constant_values=-1).reshape(4, 3) for _ in range(2)])
    for most in (10, 8, 6, 1):
        segments = prompts.cut(orders, most)
        assert len({(segment.rows.shape, segment.orders.shape) for segment in segments}) == 1
        steps = np.concatenate([np.where(x.orders < 0, -1, x.rows[x.orders]) for x in segments], axis=1)
        np.testing.assert_array_equal(steps[:, :4], orders)
        assert (steps[:, 4:] == orders[:, -1:]).all()
        assert len(segments[0].rows) <= max(most, 6)
    assert len(prompts.cut(orders, 10)) == 1
    assert len(prompts.cut(orders, 1)) == 4


@BOTH_ATTENTIONS
@pytest.mark.parametrize("role", ["last", "query_box", "early"])
def test_accuracies_of_masks_are_those_of_patched_full_forwards(model, pairs, role):
    masks = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0.3]], np.float32)
    pairs = answering(model, pairs, HEADS, role, masks[2])
    pairs.labels[::3] = answering(model, pairs, HEADS, role, masks[0]).labels[::3]
    answers = [patched(model, pairs, HEADS, role)(mask).argmax(-1) for mask in masks]
    found = dcm.accuracy(model, pairs, HEADS, masks, role)
    np.testing.assert_allclose(found, [(answer == pairs.labels).mean() for answer in answers])


def test_masks_over_several_sets_of_heads_are_tried_in_one_pass(model, pairs):
    masks = {"a": (HEADS, np.array([[1, 1, 1, 1], [0, 0, 1, 0]])), "b": ([(0, 3), (2, 1)], np.array([[0, 0.5]]))}
    pairs = answering(model, pairs, HEADS, "query_box", masks["a"][1][1])
    found = dcm.accuracies(model, {"": pairs}, {("", "query_box"): masks})["", "query_box"]
    for name, (heads, some) in masks.items():
        np.testing.assert_array_equal(found[name], dcm.accuracy(model, pairs, heads, some, "query_box"))
    assert found["a"][1] == 1 and found["b"].shape == (1,)


@pytest.mark.parametrize("budget", [2**30, 1])
def test_desiderata_that_share_base_prompts_are_tried_in_one_pass(model, pairs, monkeypatch, budget):
    other = jm.Pairs(pairs.clean, pairs.corrupt[::-1], pairs.labels[::-1], pairs.positions, pairs.positions)
    desiderata = {"one": answering(model, pairs, HEADS, "early", [0, 0, 1, 1]), "two": other}
    desiderata["two"].labels[::2] = answering(model, other, HEADS, "last", [0, 0, 0, 0]).labels[::2]
    masks = {
        ("one", "early"): {"a": (HEADS, np.array([[1, 1, 1, 1], [0, 0, 1, 1]])), "b": ([(3, 3)], np.array([[0]]))},
        ("two", "early"): {"a": (HEADS[:2], np.array([[0, 0.5]]))},
        ("two", "last"): {"c": (HEADS, np.zeros((1, 4)))},
    }
    expected = {
        (name, role): {key: dcm.accuracy(model, desiderata[name], *some, role) for key, some in sets.items()}
        for (name, role), sets in masks.items()
    }
    monkeypatch.setattr(memory, "CPU_BUDGET", budget)
    found = dcm.accuracies(model, desiderata, masks)
    assert found.keys() == expected.keys()
    for at, sets in expected.items():
        assert found[at].keys() == sets.keys()
        for key, accuracy in sets.items():
            np.testing.assert_array_equal(found[at][key], accuracy)
    assert found["one", "early"]["a"][1] == 1 and found["two", "last"]["c"][0] >= 0.5
    desiderata["two"] = desiderata["two"][::-1]  # other base prompts: each is run by itself
    np.testing.assert_equal(dcm.accuracies(model, desiderata, masks), expected)


def test_runs_are_selected_together_as_one_by_one(model, pairs):
    pairs = answering(model, pairs, HEADS, "query_box", [0, 1, 1, 0])
    other = jm.Pairs(pairs.clean, pairs.corrupt[::-1], pairs.labels, pairs.positions, pairs.positions)
    desiderata, groups = {"one": pairs, "two": other}, {"a": HEADS, "b": [(3, 3), (0, 1)]}
    runs = dcm.train_many(model, desiderata, groups, "query_box", batch_size=2, epochs=3)
    runs = {(name, group): run for (name, group, *_), run in runs.items()}
    found = dcm.select_many(model, runs, desiderata, "query_box", every=2)
    for key, run in runs.items():
        alone = dcm.select(model, run, desiderata[key[0]], "query_box", every=2)
        assert (found[key].step, found[key].validation_accuracy) == (alone.step, alone.validation_accuracy)
        np.testing.assert_array_equal(found[key].mask, alone.mask)


def run_with(masks) -> dcm.Run:
    masks = np.asarray(masks, np.float32)
    rows = np.tile(np.arange(4), (len(masks), 1))
    return dcm.Run(
        HEADS, [("last",)] * len(HEADS), masks[-1], dcm.History(np.zeros(len(masks)), masks, rows), len(masks)
    )


def test_runs_are_shown_in_one_line():
    run = run_with(np.ones((3, 4)) * [1, 1, 0.4, 0])
    assert repr(run) == "Run(2 of 4 heads selected, step 3)"
    chosen = dataclasses.replace(run, step=2, validation_accuracy=0.5)
    assert repr(chosen) == "Run(2 of 4 heads selected, step 2, validation accuracy 0.500)"
    history = run.history._replace(loss=np.array([2.5, 1, 0.25]))
    assert repr(history) == "History(3 steps, loss 2.5 to 0.25)"
    assert repr(history._replace(loss=np.zeros(0))) == "History(0 steps)"


def test_ties_of_validation_go_to_fewer_heads_and_those_of_the_paper_to_more(model, pairs, monkeypatch):

    def half(model, pairs, masks):
        return {key: {name: np.full(len(x), 0.5) for name, (_, x) in sets.items()} for key, sets in masks.items()}

    monkeypatch.setattr(selection, "accuracies", half)
    run = run_with([[1, 1, 1, 0.2], [1, 0.4, 0.3, 0.2], [1, 1, 0.1, 0.3], [0.9, 0.8, 0.7, 0.2]])
    assert dcm.select(model, run, pairs, every=1).step == 1  # as many as step 4, and earlier
    assert dcm.select(model, run, pairs, every=1, compat="paper").step == 2


def test_the_most_accurate_mask_is_selected(model, pairs):
    masks = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0.3]], np.float32)
    pairs = answering(model, pairs, HEADS, "last", np.round(masks[2]))
    run = dcm.select(model, run_with(masks[[0, 2, 1]]), pairs, every=1)
    assert (run.step, run.validation_accuracy) == (2, 1.0)
    assert run.selected == [(2, 1), (3, 1)]
    np.testing.assert_array_equal(run.mask, masks[2])


@pytest.mark.parametrize("every", [2, 3, 4, 5, 7])
def test_the_mask_after_the_last_step_is_tried_whatever_the_number_of_steps(model, pairs, every):
    masks = np.array([[1, 1, 1, 1], [1, 1, 1, 0.9], [1, 1, 0.8, 1], [1, 0.7, 1, 1], [0, 1, 1, 0]], np.float32)
    pairs = answering(model, pairs, HEADS, "last", masks[-1])
    run = dcm.select(model, run_with(masks), pairs, every=every)
    assert (run.step, run.validation_accuracy) == (5, 1.0)


def test_paper_validation_takes_prev_query_box_from_the_training_batch(model, pairs, monkeypatch):
    def renamed(pairs):
        roles = [{**r, "prev_query_box": r["early"]} for r in (pairs.positions, pairs.corrupt_positions)]
        return jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, *roles)

    train_pairs, validation = renamed(pairs[:4]), renamed(pairs[4:])
    seen = []
    monkeypatch.setattr(selection, "accuracy", lambda model, pairs, *rest: seen.append(pairs) or np.array([0.5]))
    run = run_with([[1, 1, 1, 0.2], [1, 1, 1, 0.2]])
    dcm.select(model, run, validation, "prev_query_box", every=1, compat="paper", train_pairs=train_pairs)
    expected = np.resize(train_pairs.positions["prev_query_box"], len(validation))
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0].positions["prev_query_box"], expected)
    with pytest.raises(ValueError, match="give train_pairs"):
        dcm.select(model, run, validation, "prev_query_box", compat="paper")


def test_training_compiles_once_for_all_groups_that_begin_in_one_layer(random_model, random_pairs):
    model = random_model(vocab_size=59)
    pairs = random_pairs(model, count=6)
    before = steps._train._cache_size()
    for heads in ([(1, 0), (3, 1)], [(1, 2), (2, 0), (3, 3)]):
        dcm.train(model, pairs, heads, "query_box", batch_size=3)
    assert steps._train._cache_size() == before + 1


def test_training_lowers_for_every_platform(random_model, random_pairs):
    model = random_model(num_kv_heads=2, dtype="bfloat16")
    pairs = random_pairs(model, count=4)
    place = prompts.Place(["query_box"], 1)
    base = prompts.BasePrompts(model, [pairs], [place], [np.arange(4)]).run(0)[0]
    found = targets.Counterfactuals(model, [pairs], ["query_box"], [3], [np.arange(4)]).run(0)
    data = steps._stacked(found, roles=(0,), first_layer=1)
    zero = np.zeros(1, int)
    group = groups.masked(model.config, HEADS, ["query_box"])
    member = steps.GroupsAt(place, 1, {"": group}).members(model.config)[""][None]
    arguments = steps._Arguments(zero, zero, member, np.ones(1, np.float32), zero)
    orders = np.arange(4).reshape(1, 2, 2)
    inputs = base, data, arguments, np.arange(4), orders, steps._unpatched(member, 0.1, optimizer=None), 0.1
    static = {"first_layer": 1, "capacity": 6, "optimizer": None, "metric": "target_logit"}
    traced = steps._train.trace(model.config, model.weights, *inputs, **static)
    assert "bf16" in traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [(0, 0), (0, 0)]}, r"Head \(0, 0\) is named twice"),
        ({"heads": []}, "No heads given"),
        ({"heads": [(4, 0)]}, r"Head \(4, 0\) does not exist"),
        ({"role": "first"}, "Unknown role 'first'"),
        ({"batch_size": 11}, "batch_size=11, but there are 10 pairs"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"lam": np.nan}, r"lams=\[nan\]"),
        ({"metric": "accuracy"}, "metric='accuracy'; expected one of target_logit, probability, log_probability"),
        ({"metric": "logit_difference"}, "needs wrong_labels.* the pairs have none"),
        ({"metric": lambda logits: logits[:, 0]}, "metric <lambda>.*expected a function"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, change, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        dcm.train(model, random_pairs(model, count=10), **{"heads": HEADS, "batch_size": 5, **change})


def test_nothing_to_train_is_refused(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    for given in ({"lams": ()}, {"seeds": ()}, {"groups": {}}):
        with pytest.raises(ValueError, match=f"train_many has no {next(iter(given))}"):
            dcm.train_many(model, {"a": pairs}, **{"groups": {"x": HEADS}, "batch_size": 2, **given})
    with pytest.raises(ValueError, match=r"masks has shape \(4,\); expected \[M, 4\], of one mask \[1, 4\]"):
        dcm.accuracy(model, pairs, HEADS, np.ones(4))


def test_desiderata_of_unequal_size_are_refused(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    with pytest.raises(ValueError, match=r"equally many pairs for each desideratum; found \[2, 5\]"):
        dcm.train_many(model, {"a": pairs, "b": pairs[:2]}, {"x": HEADS}, batch_size=2)
