"""Heads that send at several roles at once: equal to full forward passes, also where roles are one token."""

import dataclasses

import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from full_forward import path_patch as full_path_patch
from test_path_patching import GQA, MHA, RECEIVERS

import jaxmech as jm


def with_a_twin(pairs: jm.Pairs) -> jm.Pairs:
    """Another role, which is the token of `early` in some examples, and that of `query_box` in others."""
    even = np.arange(len(pairs)) % 2 == 0
    clean, corrupt = (
        dict(roles) | {"twin": np.where(even, roles["early"], roles["query_box"])}
        for roles in (pairs.positions, pairs.corrupt_positions)
    )
    return dataclasses.replace(pairs, positions=clean, corrupt_positions=corrupt)


@pytest.mark.parametrize("shape", [MHA, GQA], ids=["MHA", "GQA"])
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    ("sender", "via"),
    [
        (["early", "query_box"], "v"),
        (("query_box", "last"), "q"),
        (["last", "early"], "k"),
        (["early", "twin"], "v"),
        (["last", "twin", "early"], "q"),
        (["query_box"], "v"),
    ],
    ids=str,
)
def test_senders_at_several_roles_equal_full_forwards(random_model, random_pairs, shape, sender, via, batch_size):
    model = random_model(num_layers=5, **shape)
    pairs = with_a_twin(random_pairs(model))
    expected = full_path_patch(model, pairs, sender, RECEIVERS, via)
    assert np.abs(expected).max() > 0.1, "scores too small to compare"
    found = jm.path_patch(model, pairs, sender, RECEIVERS, via, batch_size=batch_size)
    assert_close(found.per_example, expected, TOLERANCES.cone)
    alone = [jm.path_patch(model, pairs, role, RECEIVERS, via).per_example for role in sender]
    assert len(sender) == 1 or np.abs(found.per_example - sum(alone)).max() > 0.01, "more than a sum"


def test_roles_that_would_give_a_token_two_values_are_refused(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = with_a_twin(random_pairs(model))
    moved = dict(pairs.corrupt_positions) | {"twin": pairs.corrupt_positions["last"]}
    with pytest.raises(ValueError, match=r"in example 0, 'early' and 'twin' are one token of the clean prompt \(\d+\)"):
        jm.path_patch(model, dataclasses.replace(pairs, corrupt_positions=moved), ["early", "twin"], RECEIVERS, "v")
    with pytest.raises(ValueError, match=r"sender is \[\]; expected the name of a role, or of several"):
        jm.path_patch(model, pairs, [], RECEIVERS, "v")
    with pytest.raises(ValueError, match="not the last token alone, so it has no direct path"):
        jm.path_patch(model, pairs, ["last", "early"])


def test_roles_that_are_all_the_last_token_have_a_direct_effect(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    same = dataclasses.replace(
        pairs,
        positions=dict(pairs.positions) | {"end": pairs.positions["last"]},
        corrupt_positions=dict(pairs.corrupt_positions) | {"end": pairs.corrupt_positions["last"]},
    )
    twice, once = (jm.path_patch(model, same, sender).per_example for sender in (["last", "end"], "last"))
    assert_close(twice, once, TOLERANCES.cone)
