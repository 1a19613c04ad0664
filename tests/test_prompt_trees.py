"""Prompts run as a tree: the same activations as one by one, with fewer tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import dcm, memory
from jaxmech.compiled_sizes import few_sizes
from jaxmech.dcm import targets
from jaxmech.prompt_trees import Layout, PromptTrees, pack, run_stretch, stretches

LLAMA_7B = {"width": 4096, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "mlp_width": 11008}
COUNT, SEVERAL, LENGTH = 6, 4, 14
FEATURES = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "two RoPEs": {"other_rope": jm.Rope(kind="none"), "other_rope_layers": (0, 2)},
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


def layout_of(sizes: np.ndarray, way: str) -> Layout:
    """A way to pack trees of such sizes [pieces, B]; as planned where LITTLE is 0."""
    (count, widest), total = (sizes.shape[1], int(sizes.max())), int(sizes.sum(axis=1).max())
    half = count // 2
    return {
        "as planned": Layout.of(sizes, 1, SEVERAL),
        "two pieces": Layout.of(sizes, 8, SEVERAL),
        "one bucket": Layout(total, [(0, count, widest)], padded=False),
        "filled up": Layout(
            total + 7, [(0, half, int(sizes[:, :half].max()) + 2), (half, count, widest + 9)], padded=False
        ),
        "padded": Layout(count * (widest + 3), [(0, count, widest + 3)], padded=True),
    }[way]


def run_packed(model: jm.Model, route: list, way: str) -> np.ndarray:
    """z [L, B, P, N, H] of trees that go through the stretches of a route."""
    order = np.argsort(route[0].trees.sizes, kind="stable")
    examples = np.stack([order[::2], order[1::2]]) if way == "two pieces" else order[None]
    x = z = trees = None
    for stretch in route:
        layout = layout_of(stretch.trees.sizes[examples], way)
        trees = pack(stretch.trees, examples, layout, before=trees)
        assert jax.tree.map(lambda x: x[0], trees).padded == layout.padded
        x, z = run_stretch(model.config, model.weights, trees, stretch.start, stretch.stop, x, z)
    assert np.isfinite(x).all() and np.isfinite(z).all()
    return np.concatenate(z, axis=1)[:, np.argsort(examples.reshape(-1))]


WAYS = ["as planned", "one bucket", "filled up", "padded", "two pieces"]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("way", WAYS)
def test_activations_in_a_tree_are_those_of_the_prompts_alone(random_model, prompts, features, way, monkeypatch):
    monkeypatch.setattr("jaxmech.prompt_trees.LITTLE", 0)
    model = random_model(**FEATURES[features])
    tokens, _, positions = prompts
    found = run_packed(model, stretches(PromptTrees.grow(*prompts), [model.config.num_layers - 1] * SEVERAL), way)
    for s in range(SEVERAL):
        _, captured = model(tokens[:, s], capture=("z",), capture_at=positions[:, s])
        assert_close(found[:, :, 2 * s : 2 * s + 2], captured["z"], TOLERANCES.recompiled)


def test_trees_are_packed_tightly_in_few_shapes():
    """Many trees in calls of similar sums: little is filled up, and buckets are as wide as their widest tree needs."""
    rng = np.random.default_rng(0)
    layouts = []
    for _ in range(20):
        sizes = np.sort(rng.normal(470, 40, (8, 64)).astype(int), axis=1)
        layout = Layout.of(sizes, 8, 14)
        assert sizes.sum(axis=1).max() <= layout.capacity <= 1.04 * sizes.sum(axis=1).max() and not layout.padded
        assert [span[0] for span in layout.spans] == [0, *(span[1] for span in layout.spans[:-1])]
        assert layout.spans[-1][1] == 64 and 2 <= len(layout.spans) <= 4
        for start, stop, width in layout.spans:
            assert sizes[:, start:stop].max() <= width <= 1.125 * sizes[:, start:stop].max()
        layouts.append(str(layout))
    assert len(set(layouts)) < 20
    assert Layout.of(np.array([[10, 20, 30, 70]]), 1, 2) == Layout(4 * 72, [(0, 4, 72)], padded=True)
    assert Layout.of(np.full((3, 50), 57), 1, 2) == Layout(3000, [(0, 50, 60)], padded=True)
    assert not Layout.of(np.full((3, 50), 57), 8, 2).padded
    assert Layout.of(np.array([[10, 3]]), 8, 2) == Layout(2 * 16, [(0, 2, 16)], padded=True)  # the larger first
    for sizes in (np.full((3, 50), 57), np.full((3, 50), 61)):  # single prompts of other lengths compile once
        assert Layout.of(sizes, 8, 1) == Layout(3200, [(0, 50, 64)], padded=True)


def test_few_widths_and_little_to_fill_up():
    widths = np.arange(1, 5000)
    rounded = np.array([few_sizes(int(width), 8) for width in widths])
    assert (rounded >= widths).all() and (rounded[64:] <= widths[64:] * 1.125).all()
    assert len(set(rounded)) < 70 and (rounded % 8 == 0).all()
    counts = np.array([few_sizes(int(width)) for width in widths])
    assert (counts >= widths).all() and (counts <= widths * 1.125).all() and (counts[:15] == widths[:15]).all()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("layers", "way"),
    [*(([0, 3, 1, 2], way) for way in WAYS), *((x, WAYS[0]) for x in ([1, 1, 3, 0], [2, 2, 2, 2], [0, 0, 0, 0]))],
    ids=str,
)
def test_prompts_drop_out_where_no_more_is_asked_of_them(random_model, prompts, features, layers, way, monkeypatch):
    monkeypatch.setattr("jaxmech.prompt_trees.WORTH_DROPPING", 1)
    monkeypatch.setattr("jaxmech.prompt_trees.LITTLE", 0)
    model = random_model(**FEATURES[features])
    tokens, length, positions = prompts
    parts = stretches(PromptTrees.grow(*prompts), layers)
    assert [part.stop for part in parts] == sorted(set(layers))
    for part in parts:
        left = np.asarray(layers) >= part.stop
        assert part.trees.sizes.tolist() == prefixes(tokens[:, left], length[:, left])
    z = run_packed(model, parts, way)
    for s, last in enumerate(layers):
        _, captured = model(tokens[:, s], capture=("z",), capture_at=positions[:, s])
        found = z[:, :, 2 * s : 2 * s + 2]
        assert_close(found[: last + 1], captured["z"][: last + 1], TOLERANCES.recompiled)
        assert not found[last + 1 :].any()


def test_prompts_stay_where_few_tokens_would_go_with_them(prompts):
    tokens, length, positions = prompts
    tokens[:, 1], length[:, 1] = tokens[:, 0], length[:, 0]
    positions[:, 1] = positions[:, 0]
    parts = stretches(PromptTrees.grow(tokens, length, positions), [1, 3, 3, 3])
    assert [(part.start, part.stop) for part in parts] == [(0, 3)]


def boxes_pairs(tokenizer, count: int) -> list[jm.Pairs]:
    """Of all desiderata of the boxes task, which tell of one scene."""
    examples = jm.boxes.make(n_scenes=4, n_boxes=4, seed=0)
    return [jm.boxes.desideratum(name, examples, tokenizer, count, seed=1) for name in jm.boxes.DESIDERATA]


def collected(model: jm.Model, pairs: list[jm.Pairs], roles: list[str], layers: list[int]) -> list[targets.Targets]:
    """All in one part."""
    return targets.Counterfactuals(model, pairs, roles, layers, [np.arange(len(pairs[0]))]).run(0)


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_counterfactuals_are_collected_in_trees_as_in_full_forward_passes(random_model, monkeypatch, budget, alone):
    """A budget of one byte runs tree by tree."""
    base, calls = jm.load(jm.demo.path("base")), []
    model = random_model(vocab_size=base.config.vocab_size)
    pairs, roles = boxes_pairs(base.tokenizer, 5), ["last", "prev_query_box"]
    layers = [3, 1, 2] + [0] * 11
    monkeypatch.setattr(memory, "CPU_BUDGET", budget)
    monkeypatch.setattr(targets, "_work", lambda config, trees: (-1 if alone else 1) * trees.sizes.sum())

    def recorded(config, weights, trees, start, stop, x, z):
        calls.append((trees.kept.shape[2] // 2, trees.kept.shape[1], trees.tokens.size, x is None))
        return run_stretch(config, weights, trees, start, stop, x, z)

    monkeypatch.setattr(targets, "run_stretch", recorded)
    found = collected(model, pairs, roles, layers)
    assert {several for several, *_ in calls} == {1 if alone else 14}
    assert {count for _, count, *_ in calls} == {5 if budget > 1 else 1}
    computed, one_by_one = sum(tokens for *_, tokens, first in calls if first), sum(x.corrupt.size for x in pairs)
    assert alone or computed < 0.8 * one_by_one
    for one, x, last in zip(found, pairs, layers, strict=True):
        assert one.z.shape == (5, 4, 2, 4, 8)
        at = np.stack([x.corrupt_position(role) for role in roles], axis=1)
        z = np.moveaxis(np.asarray(model(x.corrupt, capture=("z",), capture_at=at)[1]["z"]), 0, 1)
        assert_close(one.z[:, : last + 1], z[:, : last + 1], TOLERANCES.recompiled)
        np.testing.assert_array_equal(one.labels, x.labels)


def test_calls_of_trees_are_smaller_where_more_is_kept_of_them(random_model, monkeypatch):
    """What is kept is z of all layers: of many tokens of a deep model, more than a layer takes."""
    model, roles = random_model(num_layers=8), ["last", *(f"role {i}" for i in range(9))]
    rng, at = np.random.default_rng(0), {role: np.full(40, 11 - i) for i, role in enumerate(roles)}
    pairs = jm.Pairs(rng.integers(0, 50, (40, 12)), rng.integers(0, 50, (40, 12)), np.ones(40, int), at, at)
    config, counted, rows = model.config, memory.of_forward(model.config, 12), []
    monkeypatch.setattr(memory, "CPU_BUDGET", int(20 * counted))
    monkeypatch.setattr(targets, "run_stretch", lambda *x: rows.append(x[2].kept.shape[:2]) or run_stretch(*x))
    for some in (roles[:1], roles):
        rows.clear()
        collected(model, [pairs], some, [7])
        each = counted + memory.of_heads(config, len(some), 8)
        assert all(copies * count * each <= 20 * counted for copies, count in rows) and rows


def test_trees_that_change_places_as_prompts_drop_out_are_packed_whole(random_model, monkeypatch):
    """Of two trees the smaller is the larger behind the stretch in which the other's long prompt ends."""
    monkeypatch.setattr(targets, "_work", lambda config, trees: trees.sizes.sum())
    model, rng = random_model(), np.random.default_rng(0)
    long, short = rng.integers(0, 50, (2, 2, 20))
    short[:, 0] = long[:, 0]
    long_ends, short_ends = np.array([9, 2]), np.array([2, 15])  # the first tree has 12 tokens, then 10; 18, then 3
    clean, labels, roles = np.zeros((2, 3), int), [1, 2], {"last": [2, 2]}
    pairs = [jm.Pairs(clean, x, labels, roles, {"last": at}) for x, at in ((long, long_ends), (short, short_ends))]
    found = collected(model, pairs, ["last"], [3, 0])
    for one, x, last in zip(found, pairs, [3, 0], strict=True):
        at = x.corrupt_position("last")[:, None]
        z = np.moveaxis(np.asarray(model(x.corrupt, capture=("z",), capture_at=at)[1]["z"]), 0, 1)
        assert_close(one.z[:, : last + 1], z[:, : last + 1], TOLERANCES.recompiled)


def test_parts_of_examples_are_those_of_all(random_model, monkeypatch):
    """In some order, with examples twice, in calls of one shape."""
    base, shapes = jm.load(jm.demo.path("base")), set()
    model = random_model(vocab_size=base.config.vocab_size)
    pairs, parts = boxes_pairs(base.tokenizer, 12)[:4], [np.array([7, 0, 3, 3, 11]), np.array([1, 10, 2, 6, 5])]
    expected = collected(model, pairs, ["last"], [3] * 4)
    monkeypatch.setattr("jaxmech.prompt_trees.LITTLE", 0)
    monkeypatch.setattr(targets, "TOKENS_PER_CALL", 150)
    monkeypatch.setattr(targets, "_work", lambda config, trees: trees.sizes.sum())
    monkeypatch.setattr(
        targets, "run_stretch", lambda *x: shapes.add(str(jax.tree.map(np.shape, x[2:]))) or run_stretch(*x)
    )
    found = targets.Counterfactuals(model, pairs, ["last"], [3] * 4, parts)
    for i, rows in enumerate(parts):
        for one, whole in zip(found.run(i), expected, strict=True):
            assert_close(one.z, np.asarray(whole.z)[rows], TOLERANCES.recompiled)
            np.testing.assert_array_equal(one.labels, whole.labels[rows])
    assert len(shapes) == 1


@pytest.mark.parametrize(("shape", "alone"), [(LLAMA_7B, False), ({}, True)], ids=["7B", "demo"])
def test_trees_are_worth_it_but_in_small_models(shape, alone):
    """In which attention, that a tree has more of, takes longer than the rest."""
    base, several = jm.load(jm.demo.path("base")), len(jm.boxes.DESIDERATA)
    config = dataclasses.replace(base.config, **shape)
    prompts = [pairs.corrupt for pairs in boxes_pairs(base.tokenizer, 5)]
    together = np.stack([np.pad(x, ((0, 0), (0, 99 - x.shape[1]))) for x in prompts], axis=1)
    length = np.stack([np.full(5, x.shape[1]) for x in prompts], axis=1)
    given = together, length, length[..., None] - 1
    work = targets._work(config, PromptTrees.grow(*given))
    one_by_one = [targets._work(config, PromptTrees.grow(*(x[:, [s]] for x in given))) for s in range(several)]
    assert (sum(one_by_one) < work) == alone


@pytest.mark.parametrize(("seeds", "several"), [((0, 1), 1), ((0, 0), 2)], ids=["alone", "a tree"])
def test_prompts_that_share_nothing_are_no_tree(random_model, random_pairs, monkeypatch, seeds, several):
    model, calls = random_model(), []
    pairs = [random_pairs(model, seed=seed) for seed in seeds]
    monkeypatch.setattr(
        targets, "run_stretch", lambda *x: calls.append(x[2].buckets[0].member.shape[2]) or run_stretch(*x)
    )
    collected(model, pairs, ["last"], [3, 3])
    assert set(calls) == {several}


def test_trees_lower_for_every_platform(random_model, prompts):
    model = random_model(dtype="bfloat16")
    trees, order = PromptTrees.grow(*prompts), np.arange(COUNT)[None]
    packed = pack(trees, order, Layout.of(trees.sizes[order], 8, SEVERAL), before=None)
    traced = run_stretch.trace(model.config, model.weights, packed, 0, 2)
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
