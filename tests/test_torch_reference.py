"""jaxmech against the PyTorch reference in `benchmarks/`, and the reference against jaxmech's plain forward pass."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TOLERANCES, assert_close, assert_correct, right_in_turn

import jaxmech as jm
from jaxmech.model import forward

torch = pytest.importorskip("torch")

from hf_families import family_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.torch_reference import (  # noqa: E402
    circuits,
    cmap,
    dcm,
    hooks,
    incremental,
    knockout,
    path_patching,
)

LAYERS, HEADS, HEAD_DIM, VOCAB = 4, 4, 8, 50
RECEIVERS = [(1, 3), (3, 0), (3, 1)]  # heads 0 and 1 share a kv head in the grouped-query model, heads 2 and 3 another
CIRCUIT = {"last": [(0, 1), (2, 3), (2, 0)], "query_box": [(1, 2), (2, 3)], "early": [(0, 0)]}


def make_llama(kv_heads: int, seed: int) -> LlamaForCausalLM:
    """A small model whose weights are large enough for heads to matter; no bias is zero and no norm weight one."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3 * noise)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(1)
    return model


@dataclass(frozen=True)
class Twins:
    """The same model in PyTorch and in jaxmech."""

    torch: Any
    jax: jm.Model


def convert(model: LlamaForCausalLM, directory) -> Twins:
    model.save_pretrained(directory)
    return Twins(model, jm.load(directory, precision="highest"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[HEADS, 2], ids=["mha", "gqa"])
def twins(request, tmp_path_factory) -> Twins:
    return convert(make_llama(request.param, seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tuned(twins, tmp_path_factory) -> Twins:
    """A second model of the same shape."""
    return convert(make_llama(twins.jax.config.num_kv_heads, seed=7), tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def pairs(twins, random_pairs) -> jm.Pairs:
    return random_pairs(twins.jax)


def sweep_inputs(pairs: jm.Pairs, sender: str) -> tuple:
    positions = (pairs.position(sender), pairs.corrupt_position(sender), pairs.position("last"))
    return (pairs.clean, pairs.corrupt, pairs.labels, *positions)


def at_role(pairs: jm.Pairs, role: str) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(pairs)), pairs.position(role)


def last_logits(model: jm.Model, pairs: jm.Pairs, interventions: jm.Interventions | None = None) -> np.ndarray:
    logits, _ = model(pairs.clean, interventions)
    return np.asarray(logits)[at_role(pairs, "last")]


SWEEPS = {
    "logits": ("last", None, None),
    "q": ("last", RECEIVERS, "q"),
    "v at query_box": ("query_box", RECEIVERS, "v"),
    "k at query_box": ("query_box", RECEIVERS, "k"),
    "v at an earlier token": ("early", RECEIVERS, "v"),
    "k at an earlier token": ("early", RECEIVERS, "k"),
}


@pytest.fixture(scope="module", params=["mistral", "qwen2", "qwen3", "gemma2", "smollm3"])
def family_twins(request, tmp_path_factory) -> Twins:
    """Models with windows, q/k norms, soft-caps and post-norms, in which heads matter."""
    model = family_model(request.param, noise=0.3, initializer_range=0.4).requires_grad_(False)
    return convert(model, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sweep", ["logits", "q", "v at query_box", "k at query_box"])
def test_path_patching_of_other_families_equals_that_of_pytorch(family_twins, random_pairs, sweep):
    sender, _, via = SWEEPS[sweep]
    receivers = None if via is None else [(1, 3), (2, 0), (2, 1)]
    pairs = random_pairs(family_twins.jax)
    found = jm.path_patch(family_twins.jax, pairs, sender, receivers, via)
    inputs = sweep_inputs(pairs, sender)
    expected = path_patching.path_patch(family_twins.torch, *inputs, receivers, via, frozen="hooks")
    assert expected.abs().max() > 0.02
    assert_close(found.per_example, expected, TOLERANCES.cone)


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
def test_path_patching_equals_one_forward_pass_per_head_in_pytorch(twins, pairs, sweep):
    sender, receivers, via = sweep
    found = jm.path_patch(twins.jax, pairs, sender, receivers, via)
    expected = path_patching.path_patch(twins.torch, *sweep_inputs(pairs, sender), receivers, via)
    assert expected.abs().max() > 0.05
    assert_close(found.per_example, expected, TOLERANCES.cone)


@pytest.mark.parametrize("receivers, via", [(None, None), (RECEIVERS, "q")], ids=["logits", "q"])
def test_incremental_path_patching_equals_the_reference(twins, pairs, receivers, via):
    inputs = sweep_inputs(pairs, "last")
    found = incremental.path_patch(twins.torch, *inputs, receivers, via, chunk=3)
    expected = path_patching.path_patch(twins.torch, *inputs, receivers, via)
    assert_close(found, expected, TOLERANCES.cone)


def test_incremental_refuses_what_its_cone_does_not_cover(twins, pairs):
    with pytest.raises(ValueError, match="last token"):
        incremental.path_patch(twins.torch, *sweep_inputs(pairs, "last"), RECEIVERS, "v")
    with pytest.raises(ValueError, match="last token"):
        incremental.path_patch(twins.torch, *sweep_inputs(pairs, "query_box"), RECEIVERS, "q")


@pytest.mark.parametrize(
    "sender, receivers, via",
    [
        ("query_box", None, None),
        ("last", None, "q"),
        ("last", RECEIVERS, None),
        ("last", [], "q"),
        ("last", [(0, 4)], "q"),
    ],
)
def test_reference_refuses_what_has_no_meaning(twins, pairs, sender, receivers, via):
    with pytest.raises(ValueError):
        path_patching.path_patch(twins.torch, *sweep_inputs(pairs, sender), receivers, via)


def test_patching_a_prompt_from_itself_scores_exactly_zero(twins, pairs):
    same = jm.Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.positions, pairs.positions)
    for sender, receivers, via in (("last", None, None), ("query_box", RECEIVERS, "v")):
        scores = path_patching.path_patch(twins.torch, *sweep_inputs(same, sender), receivers, via)
        assert not scores.any()


def test_chosen_senders_and_chunks_do_not_change_the_scores(twins, pairs):
    inputs = sweep_inputs(pairs, "last")
    every = path_patching.path_patch(twins.torch, *inputs, [(2, 1)], "q")
    some = path_patching.path_patch(twins.torch, *inputs, [(2, 1)], "q", senders=[(1, 2), (0, 0)], chunk=2)
    chosen = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    chosen[1, 2] = chosen[0, 0] = True
    assert_close(some[chosen], every[chosen], TOLERANCES.cone)
    assert some[:2][~chosen[:2]].isnan().all()
    assert not every[2:].any() and not some[2:].any()


@pytest.mark.parametrize(("sender", "receivers", "via"), [("last", None, None), ("query_box", [(1, 0), (2, 1)], "v")])
def test_the_frozen_pass_by_hooks_gives_the_scores_of_the_lean_one(twins, pairs, sender, receivers, via):
    inputs = sweep_inputs(pairs, sender)
    lean, hooks = (
        path_patching.path_patch(twins.torch, *inputs, receivers, via, frozen=frozen) for frozen in ("lean", "hooks")
    )
    assert_close(hooks, lean, TOLERANCES.cone)


def test_heads_that_reach_no_receiver_score_zero_when_they_are_run(twins, pairs):
    inputs, receivers = sweep_inputs(pairs, "query_box"), [(0, 0), (1, 1)]
    skipped, run = (
        path_patching.path_patch(twins.torch, *inputs, receivers, "v", every_head=every) for every in (False, True)
    )
    assert not run[1:].any(), "what stands at or above the last receiver has no path"
    assert_close(run, skipped, TOLERANCES.cone)


def test_frozen_pass_without_a_sender_is_the_clean_pass(twins, pairs):
    prompts = path_patching.Prompts(*(hooks.indices(twins.torch, x) for x in sweep_inputs(pairs, "last")))
    attn_out = hooks.capture(twins.torch, prompts.clean, {"attn_out": None})["attn_out"]
    hidden, _ = path_patching._frozen_pass(twins.torch, prompts, attn_out, None, {}, None)
    expected = twins.torch(prompts.clean).logits
    assert_close(twins.torch.lm_head(twins.torch.model.norm(hidden)), expected, TOLERANCES.parity)


def test_captured_activations_equal_those_of_jaxmech(twins, pairs):
    sites = ("resid_pre", "q", "k", "v", "z", "attn_out")
    found = hooks.capture(twins.torch, hooks.indices(twins.torch, pairs.clean), dict.fromkeys(sites))
    _, expected = twins.jax(pairs.clean, capture=sites)
    for site in sites:
        activation = hooks.per_query_head(twins.torch, found[site]) if site in ("k", "v") else found[site]
        assert_close(activation, expected[site], TOLERANCES.parity)


@pytest.mark.parametrize("site", ["k", "v"])
def test_patching_one_head_of_a_group_leaves_the_others_alone(twins, pairs, site):
    tokens = hooks.indices(twins.torch, pairs.clean)
    positions = hooks.indices(twins.torch, pairs.position("early"))
    value = torch.ones(len(tokens), 1, HEAD_DIM)
    clean = hooks.capture(twins.torch, tokens, {"z": None})["z"]
    with hooks.edited(twins.torch, [(site, 1, hooks.replace(positions, torch.tensor([2]), value))]):
        patched = hooks.capture(twins.torch, tokens, {"z": None})["z"]
    change = (patched - clean)[1].abs().amax((0, 1, 3))  # [N], of layer 1
    assert change[2] > 0.01
    assert change[[0, 1, 3]].max() < 1e-5
    assert_close(hooks.capture(twins.torch, tokens, {"z": None})["z"], clean, TOLERANCES.exact)  # all hooks are gone


def test_mean_activations_are_means_at_each_position(twins, pairs):
    z = hooks.capture(twins.torch, hooks.indices(twins.torch, pairs.clean), {"z": None})["z"]  # [L, B, T, N, H]
    found = circuits.mean_activations(twins.torch, pairs.clean, chunk=2)
    assert_close(found, z.numpy().mean(1).swapaxes(0, 1), TOLERANCES.parity)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_circuit_evaluation_equals_z_patched_with_its_means(twins, pairs, random_pairs, elsewhere):
    means = circuits.mean_activations(twins.torch, random_pairs(twins.jax, count=9, seed=5).clean)
    found = circuits.evaluate(twins.torch, pairs.clean, pairs.positions, CIRCUIT, means, ablate_elsewhere=elsewhere)
    weight = np.full((LAYERS, *pairs.clean.shape, HEADS), float(elsewhere))
    for role in CIRCUIT:
        weight[:, *at_role(pairs, role)] = 1
    for role, heads in CIRCUIT.items():
        for layer, head in heads:
            weight[layer, *at_role(pairs, role), head] = 0
    value = means.numpy().swapaxes(0, 1)[:, None]  # [L, 1, T, N, H]
    assert_close(found, last_logits(twins.jax, pairs, jm.Interventions(z=jm.Patch(weight, value))), TOLERANCES.parity)


def test_a_circuit_of_all_heads_at_its_roles_alone_is_the_model(twins, pairs):
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    means = circuits.mean_activations(twins.torch, pairs.clean)
    whole = {"last": every, "early": every}
    found = circuits.evaluate(twins.torch, pairs.clean, pairs.positions, whole, means, ablate_elsewhere=False)
    assert_close(found, last_logits(twins.jax, pairs), TOLERANCES.parity)


@pytest.mark.parametrize("components", [("z",), ("q",), ("k", "v")], ids="+".join)
def test_cross_model_patching_equals_patches_from_the_tuned_model(twins, tuned, pairs, components):
    found = cmap.cmap(twins.torch, tuned.torch, pairs.clean, pairs.positions, CIRCUIT, components)
    _, captured = tuned.jax(pairs.clean, capture=components)
    weight = np.zeros((LAYERS, *pairs.clean.shape, HEADS))
    for role, heads in CIRCUIT.items():
        for layer, head in heads:
            weight[layer, *at_role(pairs, role), head] = 1
    patches = {site: jm.Patch(weight, captured[site]) for site in components}
    expected = last_logits(twins.jax, pairs, jm.Interventions(**patches))
    assert np.abs(expected - last_logits(twins.jax, pairs)).max() > 0.01
    assert_close(found, expected, TOLERANCES.parity)


def test_dcm_steps_equal_adam_on_the_gradient_of_a_patched_forward(twins, pairs):
    heads, lam, steps = [(2, 1), (0, 3), (2, 0), (1, 1)], 0.05, 3
    layers, numbers = np.array(heads).T
    position, corrupt_position = pairs.position("query_box"), pairs.corrupt_position("query_box")
    rows = np.arange(len(pairs))
    z = np.asarray(twins.jax(pairs.corrupt, capture=("z",))[1]["z"])[:, rows, corrupt_position][:, :, None]

    @jax.jit
    @jax.value_and_grad
    def loss(mask):
        weight = jnp.zeros((LAYERS, 1, 1, HEADS)).at[layers, 0, 0, numbers].set(1 - mask)
        patch = jm.Interventions(z=jm.Patch(weight, z, position[:, None]))
        model = twins.jax
        logits, _ = forward(model.config, model.weights, pairs.clean, patch, logits_at=pairs.position("last"))
        return -logits[rows, pairs.labels].mean() + lam * (1 - mask).sum()

    adam, expected = optax.adam(0.1), jnp.array([0.95, 0.3, 0.6, 0.95])
    state = adam.init(expected)
    mask = torch.tensor(np.asarray(expected), requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    inputs = (pairs.clean, pairs.corrupt, pairs.labels, position, corrupt_position, pairs.position("last"))
    for _ in range(steps):
        found_loss = dcm.step(twins.torch, *inputs, heads, mask, optimizer, lam=lam)
        expected_loss, gradient = loss(expected)
        assert_close(mask.grad, gradient, TOLERANCES.parity)
        assert_close(found_loss, expected_loss, TOLERANCES.parity)
        updates, state = adam.update(gradient, state)
        expected = jnp.clip(optax.apply_updates(expected, updates), 0, 1)
    assert (expected == 1).any() and (expected < 1).any()  # some are clipped
    assert_close(mask.detach(), expected, TOLERANCES.parity)


def test_dcm_refuses_a_model_whose_parameters_take_gradients(twins, pairs):
    mask = dcm.new_mask(twins.torch, [(0, 0)])
    inputs = (pairs.clean, pairs.corrupt, pairs.labels, *(pairs.position("last"),) * 3)
    weight = twins.torch.lm_head.weight
    try:
        weight.requires_grad_(True)
        with pytest.raises(ValueError, match="require gradients"):
            dcm.step(twins.torch, *inputs, [(0, 0)], mask, torch.optim.Adam([mask], lr=0.1))
    finally:
        weight.requires_grad_(False)


@pytest.mark.parametrize("first", [False, True], ids=["query_box", "no key left"])
def test_knockout_equals_a_mask_on_the_attention_of_jaxmech(twins, pairs, first):
    source, target, last = (pairs.position(role) for role in ("last", "query_box", "last"))
    if first:
        source = target = np.zeros_like(last)
    labels = last_logits(twins.jax, pairs).argmax(-1)
    labels[0] = (labels[0] + 1) % VOCAB
    accuracy, logits = knockout.knockout(twins.torch, pairs.clean, labels, source, target, last)
    for layer in range(LAYERS):
        length = pairs.clean.shape[1]
        mask = np.zeros((LAYERS, len(pairs), length, 1, length), bool)
        mask[layer:, np.arange(len(pairs)), source, 0, target] = True
        expected = last_logits(twins.jax, pairs, jm.Interventions(knockout=mask))
        assert_close(logits[layer], expected, TOLERANCES.parity)
        assert accuracy[layer] == pytest.approx((expected.argmax(-1) == labels).mean())
    clean = last_logits(twins.jax, pairs)
    assert np.abs(logits[0].numpy() - clean).max() > 0.01


# The methods of jaxmech, each as a user calls it, against the reference.

CIRCUITS = (CIRCUIT, {"last": [(3, 2), (1, 0)], "early": []}, {"query_box": [(0, 0), (1, 1), (3, 3)]}, {"last": []})


def test_means_of_jaxmech_equal_those_of_pytorch(twins, pairs):
    assert_close(
        jm.mean_activations(twins.jax, pairs.clean),
        circuits.mean_activations(twins.torch, pairs.clean),
        TOLERANCES.parity,
    )


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_circuits_of_jaxmech_equal_one_forward_pass_per_circuit_in_pytorch(twins, pairs, random_pairs, elsewhere):
    means = circuits.mean_activations(twins.torch, random_pairs(twins.jax, count=9, seed=5).clean)
    inputs = [(pairs.clean, pairs.positions, circuit, means) for circuit in CIRCUITS]
    expected = np.stack([circuits.evaluate(twins.torch, *each, ablate_elsewhere=elsewhere) for each in inputs])
    pairs = right_in_turn(pairs, *expected.argmax(-1))
    found = jm.evaluate(twins.jax, pairs, CIRCUITS, means.numpy(), elsewhere)
    assert_close(found.logits, expected, TOLERANCES.parity)
    assert_correct(found, expected, pairs)


@pytest.mark.parametrize("components", [("z",), ("q",), ("k", "v")], ids="+".join)
def test_cross_model_patching_of_jaxmech_equals_pytorch(twins, tuned, pairs, components):
    expected = cmap.cmap(twins.torch, tuned.torch, pairs.clean, pairs.positions, CIRCUIT, components).numpy()
    pairs = right_in_turn(pairs, expected.argmax(-1))
    found = jm.cmap(twins.jax, tuned.jax, pairs, CIRCUIT, components)
    assert np.abs(expected - last_logits(twins.jax, pairs)).max() > 0.01
    assert_close(found.logits, expected, TOLERANCES.parity)
    assert_correct(found, expected, pairs)


def test_the_sweep_over_heads_of_jaxmech_equals_one_forward_pass_per_head_in_pytorch(twins, tuned, pairs):
    role, components = "early", ("k", "v")
    pairs = right_in_turn(pairs, last_logits(twins.jax, pairs).argmax(-1))
    found = jm.cmap_heads(twins.jax, tuned.jax, pairs, role, components, metric="log_probability")
    labels = torch.as_tensor(pairs.labels).long()
    tokens, last = (hooks.indices(twins.torch, x) for x in (pairs.clean, pairs.position("last")))
    clean = hooks.last_logits(twins.torch, tokens, last).log_softmax(-1)
    expected = np.zeros((LAYERS, HEADS, len(pairs)))
    accuracy = np.zeros((LAYERS, HEADS))
    for head in np.ndindex(LAYERS, HEADS):
        logits = cmap.cmap(twins.torch, tuned.torch, pairs.clean, pairs.positions, {role: [head]}, components)
        expected[head] = hooks.at(logits.log_softmax(-1) - clean, labels)
        accuracy[head] = (logits.argmax(-1) == labels).float().mean()
    assert np.abs(expected).max() > 0.1 and len(np.unique(accuracy)) > 2
    assert_close(found.scores.per_example, expected, TOLERANCES.cone)
    np.testing.assert_allclose(found.accuracy, accuracy, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [("last", "query_box"), ("query_box", "early")])
def test_knockouts_of_jaxmech_equal_one_forward_pass_per_layer_in_pytorch(twins, pairs, source, target):
    labels = last_logits(twins.jax, pairs).argmax(-1)
    pairs = jm.Pairs(pairs.clean, None, np.where(np.arange(len(pairs)) == 1, labels + 1, labels), pairs.positions)
    found = jm.knockout(twins.jax, pairs, source, target)
    inputs = (pairs.labels, *(pairs.position(role) for role in (source, target, "last")))
    accuracy, logits = knockout.knockout(twins.torch, pairs.clean, *inputs)
    assert_close(found.logits, logits, TOLERANCES.parity)
    np.testing.assert_allclose(found.accuracy, accuracy, atol=1e-6)
    assert (logits[0] - logits[-1]).abs().max() > 0.01


def patched_from_corrupt(model: LlamaForCausalLM, pairs: jm.Pairs, heads_by_role) -> torch.Tensor:
    """Logits [B, V] in PyTorch with the z that heads have at their roles in the corrupt prompts."""
    clean, corrupt, last = (hooks.indices(model, x) for x in (pairs.clean, pairs.corrupt, pairs.position("last")))
    edits = []
    for role, heads in heads_by_role.items():
        position, source = (hooks.indices(model, x) for x in (pairs.position(role), pairs.corrupt_position(role)))
        z = hooks.capture(model, corrupt, {"z": source})["z"]  # [L, B, N, H]
        for layer, chosen in hooks.by_layer(model, heads).items():
            edits.append(("z", layer, hooks.replace(position, chosen, z[layer][:, chosen])))
    with hooks.edited(model, edits):
        return hooks.last_logits(model, clean, last)


def test_activation_patching_of_jaxmech_equals_hooks_in_pytorch(twins, pairs):
    expected = patched_from_corrupt(twins.torch, pairs, CIRCUIT).numpy()
    assert np.abs(expected - last_logits(twins.jax, pairs)).max() > 0.1
    pairs = right_in_turn(pairs, expected.argmax(-1))
    found = jm.patch_activations(twins.jax, pairs, CIRCUIT)
    assert_close(found.logits, expected, TOLERANCES.parity)
    assert_correct(found, expected, pairs)


def test_dcm_of_jaxmech_takes_the_steps_of_pytorch(twins, random_pairs):
    """Six batches of different examples, the last one shorter; labels are what three of the heads make likelier."""
    heads, lam, role = [(2, 1), (0, 3), (2, 0), (1, 1)], 0.05, "query_box"
    pairs = random_pairs(twins.jax, count=22)
    change = patched_from_corrupt(twins.torch, pairs, {role: heads[:3]}).numpy() - last_logits(twins.jax, pairs)
    pairs = jm.Pairs(pairs.clean, pairs.corrupt, change.argmax(-1), pairs.positions, pairs.corrupt_positions)
    run = jm.dcm.train(twins.jax, pairs, heads, role, lam, epochs=1, batch_size=4)
    mask = dcm.new_mask(twins.torch, heads)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    losses, masks = [], []
    for start in range(0, 22, 4):
        batch = pairs[start : start + 4]
        inputs = (batch.position(role), batch.corrupt_position(role), batch.position("last"))
        prompts = (batch.clean, batch.corrupt, batch.labels)
        losses.append(dcm.step(twins.torch, *prompts, *inputs, heads, mask, optimizer, lam=lam))
        masks.append(mask.detach().clone())
    assert len(losses) == len(run.history.loss) == 6
    assert mask.min() < 0.7, "no mask moves"
    assert_close(run.history.loss, losses, TOLERANCES.parity)
    assert_close(run.history.mask, torch.stack(masks), TOLERANCES.parity)
    assert_close(run.mask, mask.detach(), TOLERANCES.parity)
