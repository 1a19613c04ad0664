"""A model in functions of the user's own: an argument under jit, differentiated, and what that takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm

TOKENS = np.arange(24).reshape(2, 12)
VALUE = np.ones(1, np.float32)


@pytest.fixture
def model(random_model) -> jm.Model:
    return random_model()


def answer(model: jm.Model, weight, remat: bool = False):
    """A number of the logits when heads' z are mixed with a constant, by weights [L, N]."""
    patched = jm.Interventions(z=jm.Patch(weight[:, None, None], VALUE))
    return model(TOKENS, patched, remat=remat)[0][:, -1, 0].sum()


def some_heads(model: jm.Model):
    shape = model.config.num_layers, model.config.num_heads
    return jax.random.uniform(jax.random.key(0), shape)


def test_a_model_is_an_argument_of_a_jitted_function_which_holds_none_of_its_weights(model):
    weight, jitted = some_heads(model), jax.jit(answer)
    assert_close(jitted(model, weight), answer(model, weight), TOLERANCES.cone)
    around_it = jax.jit(lambda weight: answer(model, weight))
    sizes = [len(lowered.as_text()) for lowered in (jitted.lower(model, weight), around_it.lower(weight))]
    assert sizes[1] > sizes[0] + sum(x.nbytes for x in jax.tree.leaves(model.weights)), "what the docstring warns of"


def test_models_of_one_config_share_what_is_compiled(model, random_model):
    jitted, weight = jax.jit(answer), some_heads(model)
    other = jm.Model(model.config, random_model(3).params, model.tokenizer)
    first, second = (float(jitted(one, weight)) for one in (model, other))
    assert first != second and jitted._cache_size() == 1
    assert second == pytest.approx(float(answer(other, weight)), rel=1e-4)


def test_fine_tunes_are_trees_like_their_base_whatever_their_tokenizers():
    base, again, tuned = (jm.load(jm.demo.path(name)) for name in ("base", "base", "tuned"))
    assert len({id(model.tokenizer) for model in (base, again, tuned)}) == 3
    squares = jax.jit(lambda model: sum(jnp.vdot(x, x) for x in jax.tree.leaves(model)))
    found = [float(squares(model)) for model in (base, again, tuned)]
    assert squares._cache_size() == 1 and found[0] == found[1] != found[2]
    between = jax.tree.map(lambda a, b: (a + b) / 2, tuned, base)
    np.testing.assert_array_equal(
        between.weights["final_norm"], (base.weights["final_norm"] + tuned.weights["final_norm"]) / 2
    )
    assert between.tokenizer is tuned.tokenizer
    either = jax.lax.cond(True, lambda a, b: a, lambda a, b: b, tuned, base)
    np.testing.assert_array_equal(either.weights["embed"], tuned.weights["embed"])


def test_a_model_is_a_pytree_of_its_parameters(model):
    twice = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(twice, jm.Model) and twice.config == model.config and twice.tokenizer is model.tokenizer
    np.testing.assert_array_equal(twice.weights["embed"], 2 * model.weights["embed"])
    shapes = jax.eval_shape(lambda model: model, model)
    assert shapes.weights["embed"].shape == model.weights["embed"].shape
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(model)
    assert jax.tree_util.keystr(path).startswith(".params['params']")


def test_gradients_by_the_parameters_are_a_model_of_them(model):
    weight = some_heads(model)
    slope = jax.jit(jax.grad(answer))(model, weight)
    assert isinstance(slope, jm.Model)
    step, direction = 1e-3, jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), model)
    ends = [answer(jax.tree.map(lambda x, d, s=s: x + s * step * d, model, direction), weight) for s in (-1, 1)]
    along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True))
    assert float((ends[1] - ends[0]) / (2 * step)) == pytest.approx(float(along), rel=TOLERANCES.gradient)


def test_layers_that_are_computed_again_give_the_same_gradients_in_less_memory(random_model):
    model = random_model(num_layers=8)
    weight = some_heads(model)
    slopes = {remat: jax.jit(jax.grad(lambda m, w, r=remat: answer(m, w, r), argnums=1)) for remat in (False, True)}
    plain, again = (slopes[remat](model, weight) for remat in (False, True))
    assert np.abs(plain).min() > 0
    assert_close(again, plain, TOLERANCES.cone)
    needs = {r: f.lower(model, weight).compile().memory_analysis().temp_size_in_bytes for r, f in slopes.items()}
    assert needs[True] < needs[False] / 2
    assert_close(answer(model, weight, remat=True), answer(model, weight), TOLERANCES.cone)


def test_the_module_takes_remat_too(model):
    logits = [model.module.apply(model.params, TOKENS, remat=remat)[0] for remat in (False, True)]
    np.testing.assert_array_equal(*logits)
