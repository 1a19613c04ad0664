"""Attention knockout: equal to full forward passes with a mask, for every kind of target and window."""

import dataclasses
from collections.abc import Sequence
from importlib import import_module

import full_forward
import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close, assert_correct, right_in_turn

import jaxmech as jm
from jaxmech import compiled_sizes

KNOCKOUT = import_module("jaxmech.knockout")  # the function jm.knockout has the name of its module


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request, random_model) -> jm.Model:
    return random_model(4, num_kv_heads=request.param)


@pytest.fixture
def pairs(model, random_pairs) -> jm.Pairs:
    return random_pairs(model)


def keys_at(pairs: jm.Pairs, *positions: np.ndarray) -> np.ndarray:
    """The tokens at these positions [B] of the clean prompts, bool [B, T]."""
    keys = np.zeros(pairs.clean.shape, bool)
    for position in positions:
        keys[np.arange(len(pairs)), position] = True
    return keys


def expected_logits(
    model: jm.Model, pairs: jm.Pairs, source: str | Sequence[str], keys: np.ndarray, window: int | None = None
) -> np.ndarray:
    """Logits [L, B, V] by a full forward pass for every first layer."""
    starts = range(model.config.num_layers)
    layers = [slice(start, None if window is None else start + window) for start in starts]
    at = [pairs.position(role) for role in ([source] if isinstance(source, str) else source)]
    return np.stack([full_forward.knocked_out(model, pairs, at, keys, span) for span in layers])


@pytest.mark.parametrize("target", ["early", "random"])
@pytest.mark.parametrize("source", ["last", "query_box"])
@pytest.mark.parametrize(("batch_size", "multiple"), [(None, 1), (None, 2), (2, 1)])
def test_knockouts_equal_full_forwards_with_a_mask(model, pairs, source, target, batch_size, multiple, monkeypatch):
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, jax.default_backend(), multiple)
    monkeypatch.setattr(KNOCKOUT, "TOKENS_PER_CALL", 10)  # several calls
    target = jm.random_target(pairs, source) if target == "random" else target
    at = pairs.position(target) if isinstance(target, str) else target
    expected = expected_logits(model, pairs, source, keys_at(pairs, at))
    pairs = right_in_turn(pairs, *np.argmax(expected, -1))
    found = jm.knockout(model, pairs, source, target, batch_size=batch_size)
    assert_close(found.logits, expected, TOLERANCES.cone)
    assert_correct(found, expected, pairs)
    clean = full_forward.last_logits(model, pairs)
    assert np.abs(found.logits[0] - clean).max() > 0.01
    reaches = source == "last"  # in the last layer, what another token reads is lost
    assert (np.abs(found.logits[-1] - clean).max() > 1e-3) == reaches


@pytest.mark.parametrize("batch_size", [None, 2])
def test_targets_are_one_or_more_roles_or_any_tokens(model, pairs, batch_size):
    position = pairs.position
    before = np.arange(pairs.clean.shape[1]) < position("query_box")[:, None]
    cases: list[tuple[str | Sequence[str] | np.ndarray, np.ndarray]] = [
        (["early"], keys_at(pairs, position("early"))),
        (("early", "query_box"), keys_at(pairs, position("early"), position("query_box"))),
        (position("early").astype(np.int64), keys_at(pairs, position("early"))),
        (before, before),
    ]
    found = [jm.knockout(model, pairs, "last", target, batch_size=batch_size).logits for target, _ in cases]
    for logits, (_, keys) in zip(found, cases, strict=True):
        assert_close(logits, expected_logits(model, pairs, "last", keys), TOLERANCES.cone)
    assert np.abs(found[1] - found[0]).max() > 1e-2 and np.abs(found[3] - found[1]).max() > 1e-2


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (["last", "query_box"], ["early"]),
        (("query_box", "last"), ["early", "query_box"]),  # one of the sources is a target, of the other one
        (["last", "twin"], ["start", "early"]),
    ],
    ids=str,
)
def test_several_sources_are_blocked_together(model, pairs, source, target, batch_size):
    even = np.arange(len(pairs)) % 2 == 0
    twin = np.where(even, pairs.positions["last"], pairs.positions["query_box"])
    roles = dict(pairs.positions) | {"twin": twin, "start": np.zeros(len(pairs), int)}
    pairs = dataclasses.replace(pairs, positions=roles)
    expected = expected_logits(model, pairs, source, keys_at(pairs, *(pairs.position(role) for role in target)))
    found = jm.knockout(model, pairs, source, target, batch_size=batch_size).logits
    assert_close(found, expected, TOLERANCES.cone)
    alone = jm.knockout(model, pairs, "last", target[:1]).logits
    assert np.abs(found - alone).max() > 0.01


@pytest.mark.parametrize("window", [1, 2, 100])
@pytest.mark.parametrize("source", ["last", "query_box"])
def test_windows_block_so_many_layers(model, pairs, source, window, monkeypatch):
    monkeypatch.setattr(KNOCKOUT, "TOKENS_PER_CALL", 10)  # several calls
    found = jm.knockout(model, pairs, source, "early", window=window).logits
    expected = expected_logits(model, pairs, source, keys_at(pairs, pairs.position("early")), window)
    assert_close(found, expected, TOLERANCES.cone)
    upwards = jm.knockout(model, pairs, source, "early").logits
    same = np.abs(found - upwards).max(axis=(1, 2)) < 1e-5
    layers = np.arange(model.config.num_layers)
    # Blocked alike where the window reaches the top, and where another token reads what is lost in the last layer.
    np.testing.assert_array_equal(same, layers + window >= model.config.num_layers - (source != "last"))


def test_windows_share_a_compilation(model, pairs):
    jm.knockout(model, pairs, "last", "early")
    compiled = KNOCKOUT._answers._cache_size()
    for window in (1, 2, 3):
        jm.knockout(model, pairs, "last", ["early", "query_box"], window=window)
    assert KNOCKOUT._answers._cache_size() == compiled


def test_a_model_of_one_layer_has_a_knockout_too(random_model, random_pairs):
    model = random_model(4, num_layers=1)
    pairs = random_pairs(model)
    found = jm.knockout(model, pairs, "last", "query_box").logits
    expected = expected_logits(model, pairs, "last", keys_at(pairs, pairs.position("query_box")))
    assert_close(found, expected, TOLERANCES.cone)


def test_random_targets_come_before_the_source_and_have_no_role(model, random_pairs):
    pairs = random_pairs(model, count=200)
    target = jm.random_target(pairs, "query_box", seed=1)
    assert (target < pairs.position("query_box")).all() and (target > 0).all()
    assert not any((target == position).any() for position in pairs.positions.values())
    assert len(set(target)) > 5
    np.testing.assert_array_equal(target, jm.random_target(pairs, "query_box", seed=1))


def some_tokens(pairs: jm.Pairs, rows: int | slice) -> np.ndarray:
    """The first token of these prompts, and none of the others."""
    keys = np.zeros(pairs.clean.shape, bool)
    keys[rows, 0] = True
    return keys


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: jm.knockout(m, p, "query_box", "last"), "target='last' is at .* must be before the source"),
        (lambda m, p: jm.knockout(m, p, "last", "last"), "the target must be before the source"),
        (
            lambda m, p: jm.knockout(m, p, "last", ["early", "last"]),
            r"target=\['early', 'last'\] is at .* in example 0",
        ),
        (lambda m, p: jm.knockout(m, p, "last", p.clean >= 0), "target=tokens is at 11 in example 0"),
        (lambda m, p: jm.knockout(m, p, "last", some_tokens(p, slice(2))), "selects no token of example 2"),
        (lambda m, p: jm.knockout(m, p, "last", np.zeros(3, int)), r"target has shape \(3,\)"),
        (lambda m, p: jm.knockout(m, p, "last", np.zeros((5, 3), bool)), r"or which tokens, bool \[5, 12\]"),
        (lambda m, p: jm.knockout(m, p, "last", []), r"target has shape \(0,\)"),
        (lambda m, p: jm.knockout(m, p, "last", np.full(5, -1)), "target holds the position -1"),
        (lambda m, p: jm.knockout(m, p, "last", np.full(5, 12)), "position 12; the prompts have 12 tokens"),
        (lambda m, p: jm.knockout(m, p, target="first"), r"Unknown target 'first'; .*\(early, last, query_box\)"),
        (lambda m, p: jm.knockout(m, p, target=["early", "first"]), "Unknown target 'first'"),
        (lambda m, p: jm.knockout(m, p, window=0), "window=0; expected a number of layers"),
        (lambda m, p: jm.knockout(m, p, window=2.5), "window=2.5; expected a number of layers"),
        (lambda m, p: jm.knockout(m, p, window=True), "window=True; expected a number of layers"),
        (lambda m, p: jm.knockout(m, p, ["last", "early"]), r"'early' is at 1 in example 0, where no target is before"),
        (lambda m, p: jm.knockout(m, p, []), r"source is \[\]; expected the name of a role, or of several"),
        (
            lambda m, p: jm.knockout(m, p, ["query_box", "early"], "last"),
            r"source=\['query_box', 'early'\] at .* before",
        ),
        (lambda m, p: jm.knockout(m, p, batch_size=0), "batch_size=0"),
        (lambda m, p: jm.knockout(m, p, metric="loss"), "metric='loss'; expected one of accuracy, probability"),
        (lambda m, p: jm.random_target(p, "first"), "Unknown role"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, call, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        call(model, random_pairs(model))
