"""Prompts run as a tree: the same activations as one by one, with fewer tokens."""

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import dcm, memory
from jaxmech.dcm import prompts as dcm_prompts
from jaxmech.prompt_trees import PromptTrees, head_values
from jaxmech.shared_prefix import rounded_up

COUNT, SEVERAL, LENGTH = 6, 4, 14
FEATURES = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "windows": {"num_kv_heads": 2, "window": 4, "full_layers": (1,), "qk_norm": "head", "post_norm": True},
}


@pytest.fixture
def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [B, S, T] that part somewhere, their lengths, and two positions of each: the last and an earlier one."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (COUNT, SEVERAL, LENGTH))
    length = rng.integers(LENGTH - 5, LENGTH + 1, (COUNT, SEVERAL))
    for example in range(COUNT):
        for s in range(1, SEVERAL):
            common, like = rng.integers(0, LENGTH), rng.integers(s)
            tokens[example, s, :common] = tokens[example, like, :common]
    tokens[1, 2], length[1, 2] = tokens[1, 0], length[1, 0]  # the same prompt twice
    tokens[2, 3], length[2, 3] = tokens[2, 1], length[2, 1] - 2  # one that another goes on
    return tokens, length, np.stack([length - 1, rng.integers(0, LENGTH - 6, length.shape)], axis=2)


def prefixes(tokens: np.ndarray, length: np.ndarray) -> list[int]:
    """Distinct beginnings of each example's prompts."""
    count = []
    for several, ends in zip(tokens.tolist(), length, strict=True):
        count.append(len({tuple(row[:n]) for row, end in zip(several, ends, strict=True) for n in range(1, end + 1)}))
    return count


def test_a_tree_has_a_token_for_every_distinct_beginning(prompts):
    trees = PromptTrees.grow(*prompts)
    assert trees.sizes.tolist() == prefixes(*prompts[:2])
    assert trees.sizes.sum() < 0.9 * prompts[1].sum(), "or the test proves little"
    tokens, length, positions = prompts
    for example, s in np.ndindex(COUNT, SEVERAL):
        path = np.flatnonzero(trees.member[example, s])
        path = path[np.argsort(trees.position[example, path])]
        np.testing.assert_array_equal(trees.tokens[example, path], tokens[example, s, : length[example, s]])
        np.testing.assert_array_equal(trees.kept[example, 2 * s : 2 * s + 2], path[positions[example, s]])


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("fill", [0, 9])
def test_activations_in_a_tree_are_those_of_the_prompts_alone(random_model, prompts, features, fill):
    model = random_model(**FEATURES[features])
    tokens, _, positions = prompts
    trees = PromptTrees.grow(*prompts)
    trees = trees.of(np.arange(COUNT), int(trees.sizes.max()) + fill)
    found = head_values(model.config, model.weights, trees)
    assert np.isfinite(found).all()
    for s in range(SEVERAL):
        _, captured = model(tokens[:, s], capture=("z",), capture_at=positions[:, s])
        assert_close(found[:, :, 2 * s : 2 * s + 2], captured["z"], TOLERANCES.recompiled)


def test_few_widths_and_little_to_fill_up():
    widths = np.arange(1, 5000)
    rounded = np.array([rounded_up(int(width), 8) for width in widths])
    assert (rounded >= widths).all() and (rounded[64:] <= widths[64:] * 1.125).all()
    assert len(set(rounded)) < 70 and (rounded % 8 == 0).all()
    counts = np.array([rounded_up(int(width)) for width in widths])
    assert (counts >= widths).all() and (counts <= widths * 1.125).all() and (counts[:15] == widths[:15]).all()


@pytest.mark.parametrize("budget", [2**30, 1])
def test_counterfactuals_of_desiderata_are_collected_in_trees_as_one_by_one(random_model, monkeypatch, budget):
    """Of the boxes task, whose desiderata tell of one scene; a budget of one byte runs tree by tree."""
    base = jm.load(jm.demo.path("base"))
    model = random_model(vocab_size=base.config.vocab_size)
    examples = jm.boxes.make(n_scenes=4, n_boxes=4, seed=0)
    pairs = [jm.boxes.desideratum(name, examples, base.tokenizer, 5, seed=1) for name in jm.boxes.DESIDERATA]
    roles, calls = ["last", "prev_query_box"], []
    with monkeypatch.context() as alone:
        alone.setattr(dcm_prompts, "WORTH_A_TREE", 0)
        expected = dcm_prompts.collect_targets(model, pairs, roles)
    monkeypatch.setattr(memory, "CPU_BUDGET", budget)
    monkeypatch.setattr(dcm_prompts, "head_values", lambda *x: calls.append(x[2].tokens.shape) or head_values(*x))
    found = dcm_prompts.collect_targets(model, pairs, roles)
    assert len(calls) == (1 if budget > 1 else 5)
    for one, other in zip(found, expected, strict=True):
        assert one.z.shape == (5, 4, 2, 4, 8)
        assert_close(one.z, other.z, TOLERANCES.recompiled)
        np.testing.assert_array_equal(one.labels, other.labels)
    one_by_one = sum(x.corrupt.size for x in pairs)
    assert sum(a * b for a, b in calls) < (0.8 if budget > 1 else 0.7) * one_by_one


def test_prompts_that_share_nothing_are_no_tree(random_model, random_pairs, monkeypatch):
    model = random_model()
    pairs = [random_pairs(model, seed=seed) for seed in range(2)]
    monkeypatch.setattr(dcm_prompts, "head_values", None)
    found = dcm_prompts.collect_targets(model, pairs, ["last"])
    for x, one in zip(pairs, found, strict=True):
        z = model(x.corrupt, capture=("z",), capture_at=x.corrupt_position("last")[:, None])[1]["z"]
        assert_close(one.z, np.moveaxis(np.asarray(z), 0, 1), TOLERANCES.recompiled)


def test_trees_lower_for_every_platform(random_model, prompts):
    model = random_model(dtype="bfloat16")
    traced = head_values.trace(model.config, model.weights, PromptTrees.grow(*prompts))
    assert "stablehlo" in traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()


def test_trees_share_the_copies_of_a_model(random_model):
    """Eight devices, four copies of the model: each runs its part of the trees."""
    base = jm.load(jm.demo.path("base"))
    model = random_model(vocab_size=base.config.vocab_size)
    mesh = jm.make_mesh(rows=4)
    split = jm.Model(
        model.config, {"params": jax.device_put(model.weights, jm.parameter_shardings(model.config, mesh))}
    )
    examples = jm.boxes.make(n_scenes=4, n_boxes=4, seed=0)
    pairs = {
        name: jm.boxes.desideratum(name, examples, base.tokenizer, 6, seed=1) for name in ("positional", "add_seg_end")
    }
    masks = {(name, "last"): {"": ([(1, 2), (2, 0)], np.zeros((1, 2)))} for name in pairs}
    found, expected = (dcm.accuracies(x, pairs, masks) for x in (split, model))
    np.testing.assert_equal(found, expected)
