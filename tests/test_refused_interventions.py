"""Interventions, captures and tokens that cannot be meant are refused, and the message says what is wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech import Interventions, Patch, Rope
from jaxmech.loading import _warn_of_length

B, T, L, N, H, D = 2, 6, 4, 4, 8, 24
TOKENS = np.arange(B * T).reshape(B, T)
Z = np.ones((L, B, T, N, H), np.float32)
TWO = Z[:, :, :2]
VALUE = Z[:, :, :1]  # of any number of positions
NOTHING = np.zeros((L, 1, 1, N), np.float32)
FUTURE = np.triu(np.ones((T, T), bool), 1)[:, None]  # [T, 1, S]


@pytest.fixture
def model(random_model) -> jm.Model:
    return random_model()


REFUSED = {
    "every weight 0": (Interventions(z=Patch(NOTHING, Z)), ["z", "every weight is 0", "Leave the site out"]),
    "position past the prompt": (Interventions(z=Patch(1.0, TWO, np.array([[0, 6], [1, 2]]))), ["0 to 6", "0..5"]),
    "negative position": (Interventions(z=Patch(1.0, TWO, np.array([[0, -1], [1, 2]]))), ["-1", "0..5"]),
    "position named twice": (Interventions(z=Patch(1.0, TWO, np.array([[0, 1], [2, 2]]))), ["twice", "example 1"]),
    "positions of one example": (Interventions(z=Patch(1.0, TWO, np.array([[0, 1]]))), ["(1, 2)", "B=2"]),
    "no positions": (Interventions(z=Patch(1.0, Z[:, :, :0], np.zeros((2, 0), int))), ["(2, 0)", "P >= 1"]),
    "a scalar position": (Interventions(z=Patch(1.0, TWO, np.array(3))), ["()", "[B, P]"]),
    "positions that are floats": (
        Interventions(z=Patch(1.0, TWO, np.array([[0.0, 1], [2, 3]]))),
        ["float", "integers"],
    ),
    "value of another length": (
        Interventions(z=Patch(1.0, Z[:, :, :4])),
        ["z.value", "(4, 2, 4, 4, 8)", "(4, 2, 6, 4, 8)"],
    ),
    "value with a head dim for a residual site": (Interventions(resid_pre=Patch(1.0, Z)), ["resid_pre.value", "24"]),
    "weight of another rank": (Interventions(mlp_out=Patch(Z, Z[..., 0, :1])), ["mlp_out.weight", "(4, 2, 6)"]),
    "pattern without keys": (Interventions(pattern=Patch(1.0, Z)), ["pattern.value", "(4, 2, 6, 4, 6)"]),
    "weights by layer that could be by position": (
        Interventions(z=Patch(NOTHING[:, 0, 0] + 1, Z[:, :, :L], np.array([[0, 1, 2, 3]] * B))),
        ["z.weight", "(4, 4)", "as many positions as layers", "[L, 1, 1, N]"],
    ),
    "lists": (Interventions(z=Patch([[1.0]], Z)), ["z.weight is a list", "expected an array"]),
    "knockout of floats": (Interventions(knockout=np.ones((T, 1, T), np.float32)), ["knockout", "float32", "bool"]),
    "knockout of another length": (Interventions(knockout=np.ones((5, 1, 5), bool)), ["knockout", "(5, 1, 5)"]),
    "knockout of nothing": (Interventions(knockout=np.zeros((T, 1, T), bool)), ["knockout", "nothing"]),
    "knockout of later keys only": (Interventions(knockout=FUTURE), ["knockout", "nothing", "order of the axes"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_interventions_that_cannot_be_meant_are_refused(model, case):
    interventions, words = REFUSED[case]
    for run in (lambda: model(TOKENS, interventions), lambda: model.module.apply(model.params, TOKENS, interventions)):
        with pytest.raises(ValueError, match="Interventions") as error:
            run()
        assert all(word in str(error.value) for word in words), str(error.value)


def test_shapes_are_checked_inside_jit_too(model):
    def run(value):
        return model.module.apply(model.params, TOKENS, Interventions(z=Patch(jnp.ones(()), value)))[0]

    jax.jit(run)(Z)
    with pytest.raises(ValueError, match=r"z\.value has shape \(4, 2, 5, 4, 8\)"):
        jax.jit(run)(Z[:, :, :5])


@pytest.mark.parametrize(
    ("capture", "words"),
    [(("z", "resid"), ["'resid'", "resid_pre"]), ("z", ["string 'z'", "('z',)"])],
)
def test_unknown_sites_are_refused(model, capture, words):
    for run in (
        lambda: model(TOKENS, capture=capture),
        lambda: model.module.apply(model.params, TOKENS, None, capture),
    ):
        with pytest.raises(ValueError) as error:
            run()
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (TOKENS + 45, ["45", "56", "0..49", "tokenizer"]),
        (TOKENS - 1, ["-1", "0..49"]),
        (TOKENS[0], ["(6,)", "[B, T]"]),
        (TOKENS * 1.0, ["float64", "integers"]),
    ],
)
def test_tokens_that_are_not_ids_of_the_vocabulary_are_refused(model, tokens, words):
    with pytest.raises(ValueError) as error:
        model(tokens)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([(0, 4)], ["(0, 4)", "heads 0..3"]),
        ([(-1, 0)], ["(-1, 0)", "layers 0..3"]),
        ([], ["selects nothing"]),
        ((3, 2), ["of one head [(3, 6)]"]),
        ([(2.0, 1)], ["(2.0, 1)", "written (layer, head)"]),
    ],
)
def test_heads_that_do_not_exist_are_refused(model, heads, words):
    with pytest.raises(ValueError) as error:
        jm.head_weights(model.config, heads)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_bare_patch_is_no_interventions(model):
    with pytest.raises(TypeError, match=r"interventions is a Patch; expected jm.Interventions\(z=jm.Patch"):
        model(TOKENS, Patch(1.0, Z))


def test_a_model_is_called_inside_jit_too(model):
    np.testing.assert_allclose(jax.jit(lambda tokens: model(tokens)[0])(TOKENS), model(TOKENS)[0], rtol=1e-4, atol=1e-5)


CLOSED_OVER = {
    "logits_at": ([5, 4], [5, 6]),
    "capture_at": ([[5], [4]], [[5], [-1]]),
    "weight": (np.ones((L, 1, 1, N)), np.zeros((L, 1, 1, N))),
    "positions": ([[0, 5], [2, 1]], [[0, 6], [2, 1]]),
    "knockout": (np.ones((T, 1, T), bool), np.zeros((T, 1, T), bool)),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_arrays_closed_over_inside_jit_are_checked_and_used(model, name):
    right, wrong = map(jnp.asarray, CLOSED_OVER[name])

    def run(given, tokens):
        if name in ("logits_at", "capture_at"):
            return model(tokens, capture=("z",), **{name: given})
        if name == "knockout":
            return model(tokens, Interventions(knockout=given))
        return model(tokens, Interventions(z=Patch(**{"weight": np.float32(1), "value": VALUE, name: given})))

    for found, expected in zip(
        *map(jax.tree.leaves, (jax.jit(partial(run, right))(TOKENS), run(right, TOKENS))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="from|every weight is 0|forbids nothing"):
        jax.jit(partial(run, wrong))(TOKENS)


def test_weights_closed_over_inside_jit_are_those_of_apply_too(model):
    weight = jnp.ones((L, 1, 1, N))

    def run(value):
        return model.module.apply(model.params, TOKENS, Interventions(z=Patch(weight, value)))[0]

    np.testing.assert_allclose(jax.jit(run)(Z), run(Z), rtol=1e-4, atol=1e-5)


def test_prompts_beyond_the_context_are_warned_of_once(random_model):
    model = random_model(max_positions=T - 1)
    words = "prompts have 6 tokens, more than the context of 5 .*shorten the prompts"
    _warn_of_length.cache_clear()
    with pytest.warns(UserWarning, match=words) as found:
        for _ in range(2):
            model(TOKENS)
    assert len(found) == 1 and found[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_prompts_within_the_context_and_inside_jit_are_not_warned_of(random_model):
    _warn_of_length.cache_clear()
    random_model(max_positions=T)(TOKENS)
    short = random_model(max_positions=T - 1)
    jax.jit(lambda tokens: short(tokens)[0])(TOKENS)
    for kind in ("linear", "yarn"):  # configs that state the context before it is scaled
        rope = Rope(kind=kind, factor=2.0, original_max_positions=T - 1)
        random_model(max_positions=T - 1, rope=rope)(TOKENS)
