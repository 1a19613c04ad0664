"""How sweeps compile: once each, for every platform, in time and memory that do not depend on the number of layers."""

from importlib import import_module

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import ablation, dcm, memory, path_patching
from jaxmech.batches import Batches
from jaxmech.dcm import prompts, targets
from jaxmech.prompt_trees import run_stretch

SWEEPS = (
    ("last", None, None),
    ("last", [(2, 1), (3, 0)], "q"),
    ("query_box", [(1, 1), (2, 0)], "v"),
    ("early", [(1, 0), (3, 2)], "k"),
)


def compilations(sweep) -> int:
    before = path_patching.sender_outcomes._cache_size()
    sweep()
    return path_patching.sender_outcomes._cache_size() - before


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
@pytest.mark.parametrize("layers", [4, 7])
def test_a_sweep_compiles_once_whatever_the_number_of_layers(random_model, random_pairs, monkeypatch, sweep, layers):
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 1, "live": 1})  # a call for each sender layer
    model = random_model(num_layers=layers, vocab_size=50 + layers)  # a shape of its own, compiled by no other test
    pairs = random_pairs(model, count=6)
    assert compilations(lambda: jm.path_patch(model, pairs, *sweep, batch_size=4)) == 1


def test_other_receivers_up_to_the_same_layer_need_no_new_compilation(random_model, random_pairs):
    model = random_model(num_layers=6, vocab_size=61)
    pairs = random_pairs(model)
    jm.path_patch(model, pairs, "early", [(2, 0), (5, 1)], "v")
    assert compilations(lambda: jm.path_patch(model, pairs, "early", [(1, 2), (3, 1), (5, 0)], "v")) == 0


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_sweeps_lower_for_every_platform(random_model, random_pairs, sweep):
    model = random_model(num_kv_heads=2, dtype="bfloat16")
    sender, receivers, via = sweep
    pairs = random_pairs(model)
    plan = path_patching.plan(model, pairs, sender, receivers, via)
    batch, mask = plan.batch(plan.batches.rows[0]), plan.receivers
    inputs = jax.eval_shape(
        lambda w, b: path_patching.prepare(model.config, w, b, live=mask is not None), model.weights, batch
    )
    platforms = ("cpu", "cuda", "tpu")
    prepare = path_patching.prepare.trace(model.config, model.weights, batch, live=mask is not None)
    step = path_patching.sender_outcomes.trace(model.config, model.weights, inputs, plan.calls[0], mask, via=via)
    for traced in (prepare, step):
        text = traced.lower(lowering_platforms=platforms).as_text()
        assert "stablehlo.dot_general" in text and "bf16" in text


def test_sweeps_split_themselves_to_fit_the_memory_budget(random_model, random_pairs, monkeypatch):
    model = random_model()
    pairs = random_pairs(model, count=12)
    whole = jm.path_patch(model, pairs, "early", [(2, 0)], "v").per_example
    sizes = []
    split = Batches.plan
    monkeypatch.setattr(path_patching.memory, "budget", lambda weights: 2**20)
    monkeypatch.setattr(Batches, "plan", lambda *arguments: sizes.append(arguments[-1]) or split(*arguments))
    parts = jm.path_patch(model, pairs, "early", [(2, 0)], "v").per_example
    assert 1 <= sizes[0] < 12
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_prompts_themselves_fit_the_memory_budget(random_model, monkeypatch):
    """To the logits, senders are one token each: what takes memory is the one forward pass of long prompts."""
    model, tokens, budget = random_model(), np.zeros((64, 200), int), 2**24
    monkeypatch.setattr(path_patching.memory, "budget", lambda weights: budget)
    pairs = jm.Pairs(tokens, tokens, tokens[:, 0], *[{"last": np.full(64, 199)}] * 2)
    batches = path_patching.plan(model, pairs).batches
    forward = path_patching.memory.of_forward(model.config, 200)
    assert 1 <= len(batches.rows[0]) and len(batches.rows[0]) * 2 * forward <= budget < 64 * 2 * forward


@pytest.mark.parametrize(
    ("method", "module", "compiled"),
    [
        (lambda model, pairs: jm.predict(model, pairs).logits, import_module("jaxmech.accuracy"), "_answers"),
        (jm.mean_activations, ablation, "_sum_of_z"),
    ],
    ids=["predict", "mean_activations"],
)
def test_forward_passes_run_as_many_prompts_as_fit_the_memory_budget(
    random_model, random_pairs, monkeypatch, method, module, compiled
):
    model = random_model()
    pairs, sizes, run = random_pairs(model, count=100), [], getattr(module, compiled)

    def watched(config, weights, tokens, *arguments):
        sizes.append(len(tokens))
        return run(config, weights, tokens, *arguments)

    monkeypatch.setattr(module, compiled, watched)
    whole = method(model, pairs)
    budget = 20 * memory.of_forward(model.config, pairs.clean.shape[1])
    monkeypatch.setattr(memory, "budget", lambda weights: budget)
    parts = method(model, pairs)
    assert sizes[0] == 100 and len(sizes) > 5 and set(sizes[1:]) == {sizes[1]} and 10 < sizes[1] < 20
    assert_close(parts, whole, TOLERANCES.recompiled)


def test_other_draws_of_a_desideratum_hardly_compile_anew(random_model):
    """They name other numbers of scenes, and their counterfactual prompts have other lengths."""
    demo = jm.load(jm.demo.path("base"))
    model, examples = random_model(vocab_size=demo.config.vocab_size), jm.boxes.make(n_scenes=40, n_boxes=4, seed=0)
    masks, scenes, before = [(1, 2), (2, 0)], set(), prompts._run_base._cache_size()
    for seed in range(6):
        pairs = jm.boxes.desideratum("positional", examples, demo.tokenizer, 60, seed)
        scenes.add(len(np.unique(pairs.clean[:, :-6], axis=0)))
        dcm.accuracy(model, pairs, masks, np.zeros((1, 2)))
    assert prompts._run_base._cache_size() - before <= 2 < len(scenes)


@pytest.mark.parametrize("rope", [{}, {"kind": "dynamic", "original_max_positions": 15, "factor": 2.0}], ids=str)
def test_counterfactual_prompts_of_similar_lengths_compile_once(random_model, random_pairs, rope):
    """Also for heads in other layers, and where what fills them up is over the length from which RoPE changes."""
    model = random_model(vocab_size=62 + len(rope), rope=jm.Rope(**rope))
    before = run_stretch._cache_size()
    for length, last in ((9, 0), (10, 1), (12, 2), (13, 3)):  # the counterfactual prompts have two tokens more
        desiderata = [random_pairs(model, length=length - i, seed=i) for i in range(2)]
        collected = targets.Counterfactuals(model, desiderata, ["last"], [last] * 2, [np.arange(5)]).run(0)
        for pairs, found in zip(desiderata, collected, strict=True):
            z = model(pairs.corrupt, capture=("z",), capture_at=pairs.corrupt_position("last")[:, None])[1]["z"]
            expected = np.moveaxis(np.asarray(z), 0, 1)[:, : last + 1]
            assert_close(found.z[:, : last + 1], expected, TOLERANCES.recompiled)
    assert run_stretch._cache_size() - before == 1
