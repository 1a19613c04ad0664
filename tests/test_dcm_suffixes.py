"""DCM on packed suffixes: of very different lengths, in batches of other sums, equal to full forward passes."""

import dataclasses

import jax
import numpy as np
import pytest
import test_dcm_roles as several
from conftest import TOLERANCES, assert_close
from test_dcm import HEADS, answering, patched, trained_by_full_forwards
from test_several_roles import with_a_twin

import jaxmech as jm
from jaxmech import dcm, memory
from jaxmech.dcm import prompts, steps, testing
from jaxmech.suffixes import Span, Suffixes

LENGTH = 26  # suffixes from "early" on are of 4 to 24 tokens


@pytest.fixture
def model(random_model) -> jm.Model:
    return random_model(num_kv_heads=2)


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, int, int]]:
    """(capacity, E, W) of every call that trains masks or tries some; E of the latter are those of a part."""
    seen = []

    def watch(module, name, size):
        run = getattr(module, name)

        def watched(config, weights, base, *inputs, **static):
            seen.append((static["capacity"], size(inputs), base.resid_pre.shape[1]))
            return run(config, weights, base, *inputs, **static)

        monkeypatch.setattr(module, name, watched)

    watch(steps, "_train", lambda inputs: inputs[3].shape[2])
    watch(testing, "_answers", lambda inputs: len(inputs[0].labels))
    return seen


def less_than_padded(packed) -> bool:
    return bool(packed) and all(capacity < 0.9 * count * width for capacity, count, width in packed)


def test_packed_suffixes_are_those_of_the_host(random_pairs, model):
    pairs = random_pairs(model, count=7, length=LENGTH)
    p = np.stack([pairs.position("query_box"), pairs.position("early")], axis=1)
    last = pairs.position("last")
    lengths = last - p.min(axis=1) + 1
    total, width = int(lengths.sum()), int(lengths.max())
    expected = Suffixes.pack(p, last, capacity=total, spans=[Span(0, 7, width, LENGTH)])
    pack = jax.jit(Suffixes.packed, static_argnames=("capacity", "width", "prefix"))
    found = pack(p, last, capacity=total + 5, width=width, prefix=LENGTH)
    for name in ("example", "position", "unpacked"):
        np.testing.assert_array_equal(getattr(found, name)[:total], getattr(expected, name))
        assert (getattr(found, name)[total:] == getattr(expected, name)[-1]).all(), "other tokens than the last"
    for name in ("at_p", "at_last"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("packed", "position", "length", "patched"):
        np.testing.assert_array_equal(getattr(found.buckets[0], name), getattr(expected.buckets[0], name))
    padded, rows = (
        f(p, last, width=width, prefix=LENGTH, **more)
        for f, more in ((Suffixes.packed, {"capacity": 7 * width}), (Suffixes.padded, {}))
    )
    jax.tree.map(np.testing.assert_array_equal, padded, rows)


def test_the_capacity_is_that_of_the_longest_batch(random_pairs, model):
    sets = [random_pairs(model, count=9, length=LENGTH, seed=seed) for seed in range(2)]
    lengths = np.stack([x.position("last") - x.position("early") + 1 for x in sets])
    orders = np.stack([np.pad(np.random.default_rng(i).permutation(9), (0, 3), constant_values=-1) for i in range(3)])
    orders = orders.reshape(3, 3, 4)
    sums = [x[rows[rows >= 0]].sum() + (rows < 0).sum() for x in lengths for order in orders for rows in order]
    found = prompts.suffix_capacity(sets, ["early"], orders)
    assert max(sums) <= found <= 1.125 * max(sums) and found < 4 * lengths.max()
    assert prompts.suffix_capacity(sets, ["query_box"], orders) == 4 * 3
    assert prompts.suffix_capacity(sets, ["last"], orders) == 4


@pytest.mark.parametrize("budget", [None, 6], ids=["at once", "cut"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_on_packed_suffixes_equals_full_forwards(model, random_pairs, monkeypatch, packed, shuffle, budget):
    """Other base prompts, orders and sums of lengths in one call, with shorter batches at the end of each epoch."""
    desiderata = {str(seed): random_pairs(model, 9, length=LENGTH - 2 * seed, seed=seed) for seed in range(2)}
    for name, pairs in desiderata.items():
        logits = patched(model, pairs, HEADS, "early")
        raised = logits(np.zeros(4, np.float32)) - logits(np.ones(4, np.float32))  # by patching
        desiderata[name] = several.answering(pairs, raised)
    if budget:
        kept = 2 * prompts._base_bytes(model.config, list(desiderata.values()), [prompts.Place(["early"], 1)])
        monkeypatch.setattr(memory, "CPU_BUDGET", 2 * budget * kept)
    options = {"lams": [0.05], "seeds": [0, 5], "batch_size": 4, "shuffle": shuffle}
    runs = dcm.train_many(model, desiderata, {"a": HEADS}, "early", **options)
    assert less_than_padded(packed) and len(set(packed)) == 1
    assert len(packed) > 1 if budget else len(packed) == 1
    for (name, _, lam, _), run in runs.items():
        assert (run.history.rows == -1).sum() == 6 and (run.history.rows[[2, 5]] == -1).sum() == 6
        loss, mask = trained_by_full_forwards(model, desiderata[name], HEADS, "early", lam, run.history.rows)
        assert (mask < 0.9).any()
        assert_close(run.history.loss, loss, TOLERANCES.recompiled)
        assert_close(run.history.mask, mask, TOLERANCES.cone)
    if shuffle:
        orders = {run.history.rows.tobytes() for run in runs.values()}
        assert len(orders) == 2


@pytest.mark.parametrize("group", several.GROUPS.values(), ids=several.GROUPS)
def test_packed_suffixes_of_several_roles_equal_full_forwards(model, random_pairs, packed, group):
    pairs = with_a_twin(random_pairs(model, count=9, length=LENGTH))
    logits, count = several.patched(model, pairs, *group), len(several.places(*group)[1])
    masks = np.random.default_rng(0).random((3, count)).astype(np.float32)
    pairs = several.answering(pairs, logits(masks[1]))
    found = dcm.accuracy(model, pairs, group[0], masks, group[1])
    np.testing.assert_allclose(found, [(logits(mask).argmax(-1) == pairs.labels).mean() for mask in masks], atol=1e-6)
    run = dcm.train(model, pairs, *group, batch_size=5, epochs=1)
    assert less_than_padded(packed)
    rows = run.history.rows
    said = [np.asarray(logits(mask))[np.arange(9), pairs.labels] for mask in (np.ones(count), run.history.mask[0])]
    patched_heads = 1 - run.history.mask[0]
    expected = [-said[0][rows[0]].mean(), -said[1][rows[1][:4]].mean() + 0.01 * patched_heads.sum()]
    assert_close(run.history.loss, expected, TOLERANCES.recompiled)


def test_a_step_gathers_the_layers_of_its_own_place_alone(random_model, random_pairs, monkeypatch):
    """Groups at other places, of lower layers, change nothing of what the runs of one hold."""
    model, train, temporary = random_model(num_layers=12, width=8, mlp_width=8), steps._train, []
    pairs = random_pairs(model, count=8, length=LENGTH)

    def measured(*inputs, **static):
        if static["first_layer"] > 0:
            temporary.append(train.lower(*inputs, **static).compile().memory_analysis().temp_size_in_bytes)
        return train(*inputs, **static)

    monkeypatch.setattr(steps, "_train", measured)
    groups = {"top": {"last": [(11, 0), (11, 1)]}, "low": {"early": [(0, 0)]}}
    for some in (["top"], ["top", "low"]):
        options = {"lams": [0.01, 0.1], "batch_size": 8, "epochs": 1}
        dcm.train_many(model, {"x": pairs}, {name: groups[name] for name in some}, **options)
    alone, beside = temporary
    assert beside < 1.5 * alone


@pytest.mark.parametrize("budget", [2**30, 1])
def test_base_prompts_run_once_for_masks_at_several_roles(model, random_pairs, monkeypatch, packed, budget):
    """Their suffixes and first layers differ, and with little memory there are several parts."""
    pairs = random_pairs(model, count=9, length=LENGTH)
    other = dataclasses.replace(pairs, corrupt=pairs.corrupt[::-1].copy())
    heads = {"last": [(3, 0), (2, 1)], "query_box": [(2, 2), (3, 1)], "early": [(1, 3), (2, 0)]}
    desiderata = {"one": answering(model, pairs, heads["early"], "early", [0, 0])}
    desiderata["two"] = answering(model, other, heads["last"], "last", [0, 0.5])
    tried = np.array([[1, 1], [0, 0], [0.5, 0]], np.float32)
    masks = {(name, role): {"a": (some, tried)} for name in desiderata for role, some in heads.items()}
    masks |= {(name, ("early", "query_box")): {"b": ([(0, 1)], np.array([[0], [0.3]]))} for name in desiderata}
    alone = {
        (name, role): {key: dcm.accuracy(model, desiderata[name], *some, role) for key, some in sets.items()}
        for (name, role), sets in masks.items()
    }
    runs, run_base = [], prompts._run_base
    monkeypatch.setattr(
        prompts, "_run_base", lambda *inputs, **static: runs.append(static) or run_base(*inputs, **static)
    )
    monkeypatch.setattr(memory, "CPU_BUDGET", budget)
    packed.clear()
    found = dcm.accuracies(model, desiderata, masks)
    if budget > 1:
        assert [static["first_layers"] for static in runs] == [(2, 2, 1, 0)], "not once for all"
        assert sum(capacity < 0.9 * count * width for capacity, count, width in packed) == 4
    np.testing.assert_equal(found, alone)
    for (name, role), sets in found.items():
        if isinstance(role, str):
            logits = patched(model, desiderata[name], heads[role], role)
            right = [(np.asarray(logits(mask)).argmax(-1) == desiderata[name].labels).mean() for mask in tried]
            np.testing.assert_allclose(sets["a"], right)
    assert found["one", "early"]["a"][1] == 1 and (found["one", "early"]["a"] < 1).any()
    runs.clear()
    some = {key: sets for key, sets in masks.items() if key != ("two", "early")}
    seen: list[tuple[int, int]] = []
    right = dcm.correct(model, desiderata, some, lambda *call: seen.append(call))
    assert budget == 1 or len(runs) == 1, "not once for desiderata at different roles"
    assert seen[-1] == (9, 9) and len(seen) == (1 if budget > 1 else 9)
    for (name, role), sets in some.items():
        for key, (group, tried) in sets.items():
            assert right[name, role][key].shape == (len(tried), 9)
            np.testing.assert_array_equal(right[name, role][key].mean(axis=1), found[name, role][key])
            if isinstance(role, str):
                logits = patched(model, desiderata[name], group, role)
                answers = [np.asarray(logits(mask)).argmax(-1) for mask in tried]
                np.testing.assert_array_equal(right[name, role][key], answers == desiderata[name].labels)
