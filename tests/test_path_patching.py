"""The causal cone against plain full forwards, identities, and a model small enough to work out by hand."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from full_forward import path_patch as full_path_patch

import jaxmech as jm
from jaxmech import compiled_sizes, path_patching

MHA = {"num_kv_heads": 4}
GQA = {"num_kv_heads": 2}
MQA = {"num_kv_heads": 1, "attention_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True}
LLAMA3 = {"num_kv_heads": 2, "rope": jm.Rope(kind="llama3", factor=8.0, original_max_positions=4)}
RECEIVERS = [(2, 1), (2, 3), (4, 0)]  # heads of one group under GQA, a layer between, and the last layer


@pytest.mark.parametrize(
    "shape", [MHA, GQA, MQA, LLAMA3], ids=["MHA", "GQA", "MQA with biases", "GQA with llama3 RoPE"]
)
@pytest.mark.parametrize(
    ("sender", "receivers", "via"),
    [
        ("last", None, None),
        ("last", RECEIVERS, "q"),
        ("last", RECEIVERS, "v"),
        ("query_box", RECEIVERS, "v"),
        ("query_box", RECEIVERS, "q"),
        ("early", RECEIVERS, "v"),
        ("early", RECEIVERS, "k"),
        ("early", [(1, 2)], "v"),
    ],
)
def test_causal_cone_equals_full_forwards(random_model, random_pairs, shape, sender, receivers, via):
    model = random_model(num_layers=5, **shape)
    pairs = random_pairs(model)
    expected = full_path_patch(model, pairs, sender, receivers, via)
    found = jm.path_patch(model, pairs, sender, receivers, via)
    assert np.abs(expected).max() > 0.1, "scores too small to compare"
    assert_close(found.per_example, expected, TOLERANCES.cone)


@pytest.mark.parametrize("tokens", [1, 60], ids=["a layer a call", "calls across layers"])
@pytest.mark.parametrize(("sender", "receivers", "via"), [("last", None, None), ("early", RECEIVERS, "v")])
def test_a_sweep_of_several_calls_equals_full_forwards(
    random_model, random_pairs, monkeypatch, sender, receivers, via, tokens
):
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": tokens, "live": 100 * tokens})
    model = random_model(num_layers=5, **GQA)
    pairs = random_pairs(model)
    calls = []
    found = jm.path_patch(model, pairs, sender, receivers, via, progress=lambda done, total: calls.append(total))
    assert 1 < len(calls) == calls[-1]
    assert_close(found.per_example, full_path_patch(model, pairs, sender, receivers, via), TOLERANCES.cone)


@pytest.mark.parametrize(("sender", "receivers", "via"), [("last", None, None), ("last", [(1, 1), (5, 1)], "v")])
def test_rounding_of_low_precision_does_not_pass_for_an_effect(
    random_model, random_pairs, monkeypatch, sender, receivers, via
):
    """Corrupt prompts like the clean ones change nothing, whatever layer a call starts at.

    The model is wide: sums of few numbers round alike, however they are computed.
    """
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 1, "live": 1})
    sizes = {"num_layers": 6, "width": 512, "head_dim": 32, "mlp_width": 512}
    model = random_model(**sizes, dtype="bfloat16", param_dtype="bfloat16")
    pairs = random_pairs(model, count=16)
    same = jm.Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.positions, pairs.positions)
    assert not jm.path_patch(model, same, sender, receivers, via).per_example.any()


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"precision": "BF16_BF16_F32"}], ids=str)
def test_receivers_in_the_first_layer_are_reached_by_no_head(random_model, random_pairs, how):
    model = random_model(**how)
    with pytest.warns(UserWarning, match="No head has a path"):
        found = jm.path_patch(model, random_pairs(model), "early", [(0, 1)], "v")
    assert not found.per_example.any() and (found.probability > 0).all()


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ({}, 1),
        ({"precision": "BF16_BF16_F32_X3"}, 1),
        ({"precision": "TF32_TF32_F32"}, 5),
        ({"precision": "default"}, 5),
        ({"dtype": "bfloat16"}, 5),
    ],
    ids=str,
)
def test_calls_have_clean_rows_of_their_own_where_rounding_is_coarse(
    random_model, random_pairs, monkeypatch, how, rows
):
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 1, "live": 1})
    model = random_model(num_layers=5, **how)
    calls = path_patching.plan(model, random_pairs(model)).calls
    assert len(calls) == 5
    assert sum(path_patching.CLEAN in call.senders for call in calls) == rows


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("via", ["k", "v"])
def test_sizes_rounded_up_as_on_accelerators_change_nothing(random_model, random_pairs, monkeypatch, via, step):
    model = random_model(num_layers=5, **GQA)
    pairs = random_pairs(model)
    exact = path_patching.plan(model, pairs, "early", RECEIVERS, via, batch_size=3).batches
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, jax.default_backend(), step)
    rounded = path_patching.plan(model, pairs, "early", RECEIVERS, via, batch_size=3).batches
    assert rounded.capacity > exact.capacity or rounded.spans != exact.spans
    assert all(size % step == 0 for size in (rounded.capacity, *(span.width for span in rounded.spans)))
    found = jm.path_patch(model, pairs, "early", RECEIVERS, via, batch_size=3)
    assert_close(found.per_example, full_path_patch(model, pairs, "early", RECEIVERS, via), TOLERANCES.cone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_scores_do_not_depend_on_the_batch_size(random_model, random_pairs, batch_size):
    model = random_model(num_layers=5, **GQA)
    pairs = random_pairs(model)
    whole = jm.path_patch(model, pairs, "early", RECEIVERS, "v")
    parts = jm.path_patch(model, pairs, "early", RECEIVERS, "v", batch_size=batch_size)
    assert_close(parts.per_example, whole.per_example, TOLERANCES.cone)
    assert_close(parts.probability, whole.probability, TOLERANCES.cone)


def test_scores_do_not_depend_on_the_padding(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    longer = jm.Pairs(
        np.pad(pairs.clean, ((0, 0), (0, 5)), constant_values=7),
        np.pad(pairs.corrupt, ((0, 0), (0, 3)), constant_values=9),
        pairs.labels,
        pairs.positions,
        pairs.corrupt_positions,
    )
    short, long = (jm.path_patch(model, p, "early", RECEIVERS, "v").per_example for p in (pairs, longer))
    assert_close(long, short, TOLERANCES.cone)


def test_scores_do_not_depend_on_the_order_of_the_examples(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    order = np.array([3, 0, 4, 1, 2])
    forth = jm.path_patch(model, pairs, "early", RECEIVERS, "v").per_example
    assert_close(
        jm.path_patch(model, pairs[order], "early", RECEIVERS, "v").per_example, forth[..., order], TOLERANCES.cone
    )


@pytest.mark.parametrize(("receivers", "via"), [(None, None), (RECEIVERS, "q"), (RECEIVERS, "v")])
def test_patching_from_the_clean_prompt_itself_changes_nothing(random_model, random_pairs, receivers, via):
    """But the last bit, on CPUs whose products sum the rows of a batch in other orders."""
    model = random_model(num_layers=5, **GQA)
    pairs = random_pairs(model)
    itself = jm.Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.positions, pairs.positions)
    changes = jm.path_patch(model, itself, "last", receivers, via).per_example
    effects = jm.path_patch(model, pairs, "last", receivers, via).per_example
    assert np.abs(changes).max() <= TOLERANCES.recompiled < np.abs(effects).max()


def test_prompts_that_are_the_same_up_to_the_sender_are_warned_of(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    corrupt = pairs.corrupt.copy()
    corrupt[:, : pairs.clean.shape[1]] = pairs.clean
    rows = np.arange(len(pairs))
    corrupt[rows, pairs.positions["early"] + 1] = (corrupt[rows, pairs.positions["early"] + 1] + 1) % 50
    later = dataclasses.replace(pairs, corrupt=corrupt, corrupt_positions=pairs.positions)
    with pytest.warns(UserWarning, match="Up to 'early', the clean and the corrupt prompts are the same, all of them"):
        found = jm.path_patch(model, later, "early", RECEIVERS, "v")
    assert not found.per_example.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jm.path_patch(model, later, "query_box", RECEIVERS, "v").per_example.any()
    corrupt[0, 0] = (corrupt[0, 0] + 1) % 50  # in one example
    some = dataclasses.replace(later, corrupt=corrupt)
    with pytest.warns(UserWarning, match="4 of 5 clean and corrupt prompts are the same, first those of example 1, so"):
        found = jm.path_patch(model, some, "early", RECEIVERS, "v")
    assert found.per_example[..., 0].any() and not found.per_example[..., 1:].any()


def test_probability_is_that_of_the_plain_forward(random_model, random_pairs):
    model = random_model(num_layers=5)
    pairs = random_pairs(model)
    logits, _ = model(pairs.clean)
    rows = np.arange(len(pairs))
    plain = jax.nn.softmax(logits[rows, pairs.positions["last"]])[rows, pairs.labels]
    for receivers, via in ((None, None), (RECEIVERS, "q")):
        assert_close(jm.path_patch(model, pairs, "last", receivers, via).probability, plain, TOLERANCES.cone)


def test_heads_at_or_above_the_last_receiver_score_exactly_zero(random_model, random_pairs):
    model = random_model()
    scores = jm.path_patch(model, random_pairs(model), "query_box", [(1, 0), (2, 3)], "v").per_example
    assert not scores[2:].any() and scores[0].any() and scores[1].any()


def test_patching_every_head_of_a_one_layer_model_gives_the_corrupt_run(random_model, random_pairs):
    """With one layer and prompts that end alike, the senders' direct paths are all that differs at the last token."""
    model = random_model(num_layers=1)
    pairs = random_pairs(model, unequal=False)
    clean, corrupt = pairs.clean.copy(), pairs.corrupt.copy()
    corrupt[:, -1] = clean[:, -1]
    _, seen = model(corrupt, capture=("z",))
    every = jm.Interventions(z=jm.Patch(1.0, seen["z"]))
    assert_close(model(clean, every)[0][:, -1], model(corrupt)[0][:, -1], TOLERANCES.cone)


def test_patching_every_head_everywhere_gives_the_corrupt_run(random_model, random_pairs):
    model = random_model(num_layers=5, **GQA)
    pairs = random_pairs(model, unequal=False)
    sources, seen = model(pairs.corrupt, capture=("z", "resid_pre"))
    first_layer = (np.arange(5) == 0)[:, None, None]
    everything = jm.Interventions(z=jm.Patch(1.0, seen["z"]), resid_pre=jm.Patch(first_layer, seen["resid_pre"]))
    assert_close(model(pairs.clean, everything)[0], sources, TOLERANCES.cone)


# A model to work out by hand. Two layers, two heads of two dimensions, width and vocabulary of four, no MLP, and
# attention that is uniform because all queries are zero. Token t is embedded as 2 e_t, whose RMS is 1, so the norm of
# layer 0 leaves it as it is. In layer 0, head 0 moves dimensions 0, 1 to 2, 3 and head 1 moves 2, 3 to 0, 1. In layer
# 1, head 0 moves dimensions 2, 3 to 0, 1, and head 1 does nothing.
#
# clean [0, 1], corrupt [2, 1], label 1. At the last token, layer 0: z_0 = mean((2, 0), (0, 2)) = (1, 1) and
# z_1 = (0, 0) in the clean run; z_0 = (0, 1) and z_1 = (1, 0) in the corrupt one.
HAND = {"vocab_size": 4, "width": 4, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 2, "mlp_width": 1}


def hand_model() -> jm.Model:
    config = jm.Config(**HAND, norm_eps=1e-12)
    identity = np.eye(4)
    lower, upper = identity[:, :2], identity[:, 2:]  # read dimensions 0, 1 and 2, 3
    v = np.zeros((2, 4, 2, 2))
    v[0, :, 0], v[0, :, 1], v[1, :, 0] = lower, upper, upper
    o = np.zeros((2, 2, 2, 4))
    o[0, 0], o[0, 1], o[1, 0] = upper.T, lower.T, lower.T
    zeros = {"q": (2, 4, 2, 2), "k": (2, 4, 2, 2), "gate": (2, 4, 1), "up": (2, 4, 1), "down": (2, 1, 4)}
    blocks = {name: np.zeros(shape) for name, shape in zeros.items()} | {"v": v, "o": o}
    blocks |= {"attn_norm": np.ones((2, 4)), "mlp_norm": np.ones((2, 4))}
    tree = {"embed": 2 * identity, "blocks": blocks, "final_norm": np.ones(4), "unembed": identity}
    return jm.Model(config, {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)})


def hand_pairs() -> jm.Pairs:
    return jm.Pairs(
        np.array([[0, 1]]), np.array([[2, 1]]), np.array([1]), {"last": np.array([1])}, {"last": np.array([1])}
    )


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def label_probability(resid) -> float:
    logits = np.asarray(resid, float) / rms(resid)
    return float(np.exp(logits[1]) / np.exp(logits).sum())


def test_direct_effects_of_the_hand_computed_model():
    # Layer 0 at token 0 of the clean prompt: x = (2, 0, 0, 0) + z_0 -> (2, 0, 2, 0), since token 0 sees itself alone.
    # At the last token: (0, 2, 1, 1). Layer 1, head 0 reads dimensions 2, 3 of both, each over its RMS:
    first, second = np.array([2, 0, 2, 0]), np.array([0, 2, 1, 1])
    moved = (first[2:] / rms(first) + second[2:] / rms(second)) / 2
    moved = np.array([*moved, 0, 0])
    clean = label_probability(second + moved)
    # Direct effects add the sender's change alone; head 0 of layer 1 stays frozen.
    head_0 = label_probability(second + moved + [0, 0, -1, 0]) / clean - 1
    head_1 = label_probability(second + moved + [1, 0, 0, 0]) / clean - 1
    # Layer 1, head 0 in the corrupt run: token 0 is 2 e_2, which head 1 copies to dimension 0; z_0 is (0, 0) there. The
    # last token is 2 e_1 + (0, 0, 0, 1) + (1, 0, 0, 0).
    first, second = np.array([2, 0, 2, 0]), np.array([1, 2, 0, 1])
    corrupt_moved = (first[2:] / rms(first) + second[2:] / rms(second)) / 2
    late = label_probability(np.array([0, 2, 1, 1]) + [*corrupt_moved, 0, 0]) / clean - 1
    found = jm.path_patch(hand_model(), hand_pairs()).per_example[..., 0]
    assert_close(found, [[head_0, head_1], [late, 0.0]], 1e-5)


def test_effects_through_the_value_of_the_hand_computed_model():
    # The sender's change at the last token reaches dimensions 2, 3 only from head 0: the last token's v of layer 1,
    # head 0 becomes (0, 1) / rms(0, 2, 0, 1) in place of (1, 1) / rms(0, 2, 1, 1). Head 1 writes to dimension 0, which
    # that v does not read, but which changes the RMS: (1, 1) / rms(1, 2, 1, 1).
    token_0, clean_v = np.array([2, 0]) / rms([2, 0, 2, 0]), np.array([1, 1]) / rms([0, 2, 1, 1])

    def patched(v) -> float:
        return label_probability(np.array([0, 2, 1, 1]) + [*((token_0 + v) / 2), 0, 0])

    clean = patched(clean_v)
    head_0 = patched(np.array([0, 1]) / rms([0, 2, 0, 1])) / clean - 1
    head_1 = patched(np.array([1, 1]) / rms([1, 2, 1, 1])) / clean - 1
    found = jm.path_patch(hand_model(), hand_pairs(), "last", [(1, 0)], "v").per_example[..., 0]
    assert_close(found, [[head_0, head_1], [0.0, 0.0]], 1e-5)


def test_queries_of_the_hand_computed_model_change_nothing():
    found = jm.path_patch(hand_model(), hand_pairs(), "last", [(1, 0)], "q").per_example
    assert not found.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sender": "first"}, "Unknown role 'first'.*'last'"),
        ({"receivers": [(4, 0)], "via": "q"}, r"Head \(4, 0\) does not exist.*layers 0..3"),
        ({"receivers": [(2, 4)], "via": "q"}, r"Head \(2, 4\) does not exist"),
        ({"receivers": [], "via": "q"}, "No heads given"),
        ({"receivers": [(2, 0)]}, "via=None; with receivers, expected"),
        ({"receivers": [(2, 0)], "via": "z"}, "via='z'"),
        ({"via": "q"}, "via='q' without receivers"),
        ({"sender": "query_box"}, "no direct path to the logits"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, arguments, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        jm.path_patch(model, random_pairs(model), **arguments)


def test_missing_corrupt_prompts_are_named(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    with pytest.raises(ValueError, match="no corrupt prompts"):
        jm.path_patch(model, jm.Pairs(pairs.clean, None, pairs.labels, pairs.positions))


def test_tokens_outside_the_vocabulary_are_named(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(random_model(vocab_size=5000))
    with pytest.raises(ValueError, match="vocabulary has ids 0..49"):
        jm.path_patch(model, pairs)


def test_top_is_sorted_and_leaves_out_weak_heads():
    mean = np.array([[-0.5, 0.2], [-0.0005, -0.9]], np.float32)
    scores = jm.PathScores(mean[..., None], np.ones(1, np.float32))
    assert scores.top(4, min_effect=1e-3) == [(1, 1), (0, 0)]
    assert scores.top(1) == [(1, 1)]
    assert scores.top(4, min_effect=0.5) == [(1, 1), (0, 0)], "a head whose mean is -min_effect itself"
    with pytest.raises(ValueError, match="k=5, but the model has 4 heads"):
        scores.top(5)


def test_the_cache_of_a_batch_is_freed_before_the_next_is_made(random_model, random_pairs, monkeypatch):
    model, alive, shapes = random_model(), [], set()
    pairs = random_pairs(model, count=6)
    real = path_patching.prepare

    def prepare(*arguments, **options):
        alive.append(sum(x.shape in shapes for x in jax.live_arrays()))
        inputs = real(*arguments, **options)
        shapes.add(inputs.clean.k.shape)
        return inputs

    monkeypatch.setattr(path_patching, "prepare", prepare)
    jm.path_patch(model, pairs, "query_box", [(2, 1)], "v", batch_size=2)
    assert alive == [0, 0, 0]
