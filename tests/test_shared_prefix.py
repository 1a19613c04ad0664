"""Prompts that share prefixes: one pass with the shared part computed once equals plain forward passes."""

import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import rope
from jaxmech.shared_prefix import SharedPrompts, observe_prompts, shared_length


def prompts(shared: int = 7, total: int = 12) -> np.ndarray:
    """Nine prompts that begin with one of three prefixes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (9, total))
    tokens[:, :shared] = rng.integers(0, 50, (3, shared))[np.arange(9) % 3]
    return tokens


@pytest.mark.parametrize("length", [0, 3, 7, 11])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_site_equals_that_of_the_plain_forward(random_model, length, kv_heads):
    model = random_model(num_kv_heads=kv_heads)
    tokens = prompts()
    count = len(np.unique(tokens[:, :length], axis=0)) + 1 if length else 1  # one more prefix than there are
    split = SharedPrompts.split(tokens, length, count)
    found = observe_prompts(
        model.config, model.weights, split, lambda sites: {s: sites.whole(s) for s in sites.suffixes}
    )
    _, plain = model(tokens, capture=("resid_pre", "k", "v", "z", "attn_out"))
    for site, name in (("resid_pre", "resid_pre"), ("z", "z"), ("attn_out", "heads_out")):  # Llama adds what heads sum
        assert_close(found[name], plain[site], TOLERANCES.cone)
    first_of_group = np.arange(0, 4, 4 // kv_heads)
    assert_close(found["v"], plain["v"][..., first_of_group, :], TOLERANCES.cone)
    rotated = rope.rotate(plain["k"], rope.rotations(model.config, np.arange(tokens.shape[1]))[0])
    assert_close(found["rotated_k"], rotated[..., first_of_group, :], TOLERANCES.cone)


def test_prompts_are_split_where_the_fewest_tokens_are_computed():
    assert shared_length([prompts(shared=7)]) == (7, 3)
    assert shared_length([prompts(shared=7)[:4], prompts(shared=7)[4:8]]) == (7, 3)


def test_prompts_with_nothing_in_common_are_not_split():
    tokens = np.random.default_rng(1).integers(0, 50, (6, 10))
    assert shared_length([tokens]) == (0, 1)
    split = SharedPrompts.split(tokens, 0, 1)
    np.testing.assert_array_equal(split.suffixes, tokens)


def test_scores_of_prompts_that_share_prefixes_are_those_of_full_forwards(random_model):
    from full_forward import path_patch as full_path_patch

    model = random_model(num_layers=5)
    tokens = prompts()
    last, early = np.full(9, 11), np.full(9, 4)
    positions = {"last": last, "early": early}
    pairs = jm.Pairs(tokens, tokens[[1, 2, 0, 4, 5, 3, 7, 8, 6]], tokens[:, 0], positions, positions)
    for arguments in (("last",), ("last", [(2, 1), (4, 0)], "q"), ("early", [(2, 1), (4, 0)], "v")):
        expected = full_path_patch(model, pairs, *arguments)
        assert_close(jm.path_patch(model, pairs, *arguments).per_example, expected, TOLERANCES.cone)


def test_prompts_are_not_split_behind_a_token_that_is_patched():
    assert shared_length([prompts(shared=7)], most=9) == (7, 3)
    assert shared_length([prompts(shared=7)], most=5) == (5, 3)
    assert shared_length([prompts(shared=7)], most=0) == (0, 1)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("position", [4, 7, 11])
@pytest.mark.parametrize("components", [("z",), ("q", "k", "v")])
def test_patched_prompts_that_share_prefixes_are_those_of_full_forwards(random_model, position, components, batch_size):
    base, tuned = random_model(num_kv_heads=2), random_model(num_kv_heads=2, seed=1)
    tokens, heads = prompts(), [(0, 1), (1, 3), (2, 0)]
    at = np.where(np.arange(9) % 2, position, 11)
    positions = {"last": np.full(9, 11), "here": at}
    pairs = jm.Pairs(tokens, tokens[::-1], tokens[:, 0], positions, {"last": np.full(9, 11), "here": at[::-1]})

    def full(values):
        weight = jm.head_weights(base.config, heads)
        patches = {site: jm.Patch(weight, value, at[:, None]) for site, value in values.items()}
        return base(tokens, jm.Interventions(**patches), logits_at=positions["last"])[0]

    _, theirs = tuned(tokens, capture=components, capture_at=at[:, None])
    found = jm.cmap(base, tuned, pairs, {"here": heads}, components, batch_size=batch_size)
    assert_close(found.logits, full(theirs), TOLERANCES.cone)
    collected = jm.collect(tuned, pairs, ["here"], components, batch_size=batch_size)
    for site, values in theirs.items():
        assert_close(collected.values[site], values, TOLERANCES.cone)
    if components == ("z",):
        _, own = base(tokens[::-1], capture=components, capture_at=at[::-1, None])
        found = jm.patch_activations(base, pairs, {"here": heads}, batch_size=batch_size)
        assert_close(found.logits, full(own), TOLERANCES.cone)
