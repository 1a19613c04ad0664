"""The sweeps through TransformerLens and nnsight in `benchmarks/peers` against the PyTorch reference."""

import importlib

import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.torch_reference import path_patching  # noqa: E402

LAYERS, HEADS, VOCAB = 3, 4, 50
SWEEPS = {"logits": (None, None), "q": ([(1, 3), (2, 0), (2, 1)], "q")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["transformer_lens", "nnsight"])
def peer(request):
    """The module of one peer; skipped where its library is not installed (extra `bench-peers`)."""
    pytest.importorskip(request.param)
    return importlib.import_module(f"benchmarks.peers.{request.param}_sweep")


@pytest.fixture(scope="module", params=[HEADS, 2], ids=["mha", "gqa"])
def model(request) -> LlamaForCausalLM:
    """A small model whose weights are large enough for heads to matter; no bias is zero and no norm weight one."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=request.param,
        head_dim=8,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3 * noise)
        if name.endswith("norm.weight"):
            parameter.add_(1)
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple:
    """Prompts of unequal lengths; the sender is at the last token."""
    rng = np.random.default_rng(0)
    last, corrupt_last = rng.integers(6, 10, 5), rng.integers(8, 12, 5)
    clean, corrupt = rng.integers(0, VOCAB, (5, 10)), rng.integers(0, VOCAB, (5, 12))
    return clean, corrupt, rng.integers(0, VOCAB, 5), last, corrupt_last, last


@pytest.mark.parametrize("receivers, via", SWEEPS.values(), ids=SWEEPS)
def test_scores_through_a_peer_equal_the_reference(peer, model, inputs, receivers, via):
    expected = path_patching.path_patch(model, *inputs, receivers, via)
    found = peer.path_patch(peer.load(model), *inputs, receivers, via)
    assert expected.abs().max() > 0.05
    assert found.dtype == torch.float32
    assert_close(found, expected, TOLERANCES.cone)


@pytest.mark.parametrize("receivers, via", SWEEPS.values(), ids=SWEEPS)
def test_chosen_senders_and_chunks_do_not_change_the_scores(peer, model, inputs, receivers, via):
    options = {"senders": [(1, 2), (0, 0)], "chunk": 2}
    expected = path_patching.path_patch(model, *inputs, receivers, via, **options)
    found = peer.path_patch(peer.load(model), *inputs, receivers, via, **options)
    assert_close(found.isnan(), expected.isnan(), TOLERANCES.exact)
    assert_close(found.nan_to_num(), expected.nan_to_num(), TOLERANCES.cone)


def test_a_peer_leaves_the_model_as_it_was(peer, model, inputs):
    tokens = torch.as_tensor(inputs[0])
    before = model(tokens).logits
    peer.path_patch(peer.load(model), *inputs, *SWEEPS["q"])
    assert torch.equal(model(tokens).logits, before)


def test_a_peer_keeps_the_dtype_and_shares_the_weights(peer, model):
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    wrapped = peer.load(half)
    inner = getattr(wrapped, "original_model", wrapped)
    assert {parameter.dtype for parameter in inner.parameters()} == {torch.bfloat16}
    assert {id(parameter) for parameter in inner.parameters()} == {id(parameter) for parameter in half.parameters()}


@pytest.mark.parametrize("receivers, via", [(None, "q"), ([(2, 0)], "v"), ([(0, HEADS)], "q"), ([], "q")])
def test_a_peer_refuses_what_has_no_meaning(peer, model, inputs, receivers, via):
    with pytest.raises(ValueError):
        peer.path_patch(peer.load(model), *inputs, receivers, via)
