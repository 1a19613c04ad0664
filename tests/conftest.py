"""What all tests share: JAX settings, the tolerance table and small models with random weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

# Most of the time of the tests is compilation of programs that run once: as little optimization as XLA offers, and the
# emitters that compile fastest, which only jaxlib 0.10 still has. Processes that tests start inherit this. XLA_FLAGS
# in the environment replaces it; the empty string tests what users run.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech.model import abstract_params  # noqa: E402

NEEDS_TORCH = (
    "test_adapters.py",
    "test_bad_checkpoints.py",
    "test_convert.py",
    "test_family_parity.py",
    "test_formats.py",
    "test_multimodal.py",
    "test_parity.py",
    "test_peers.py",
    "test_published_configs.py",
    "test_rope.py",
    "test_ropes_by_layer.py",
    "test_torch_reference.py",
    "test_verify.py",
)
collect_ignore = [] if find_spec("torch") else list(NEEDS_TORCH)


def pytest_configure(config: pytest.Config) -> None:
    """Random prompts may begin with a token twice, and some tests patch prompts from themselves."""
    config.addinivalue_line("filterwarnings", "ignore:.*This looks like padding on the left")
    config.addinivalue_line("filterwarnings", "ignore:Up to 'last', the clean and the corrupt prompts are the same")


def pytest_report_header() -> str:
    """Says which tests are left out where PyTorch is not installed."""
    return f"PyTorch is not installed; left out: {', '.join(NEEDS_TORCH)}" if collect_ignore else "with PyTorch"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: pytest-xdist gives a process whole files, and all should end at the same time."""
    items.sort(key=lambda item: item.path.name not in ("test_cli.py", "test_study.py"))


@dataclass(frozen=True)
class Tolerances:
    """Largest difference allowed, relative to the largest value compared."""

    parity: float = 1e-4  # float32 logits against transformers: two BLAS libraries, other orders of summation
    cone: float = 1e-4  # float32 scores, causal cone against full forward: other shapes, other orders of summation
    rope: float = 1.2e-7  # float32 frequencies against transformers: the last bit, as machines' powers may differ
    angle: float = 2e-3  # cos and sin at positions up to 16384: the last bit of a frequency times the position
    recompiled: float = 1e-5  # float32, the same arithmetic compiled into another program: other fusions and orders
    bfloat16: float = 3e-2  # bfloat16 logits against transformers: 8 bits, rounded at other places, over a few layers
    gradient: float = 1e-2  # float32 gradient against central differences: truncation and cancellation
    exact: float = 0.0  # the same arithmetic on the same numbers


TOLERANCES = Tolerances()


def assert_close(found, expected, tolerance: float) -> None:
    """|found - expected| <= tolerance * max |expected| everywhere; the expected values must not all be zero."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = np.abs(expected).max()
    assert scale > 0, "nothing to compare: every expected value is zero"
    worst = np.abs(found - expected).max()
    assert worst <= tolerance * scale, f"largest difference {worst:.3g}, allowed {tolerance * scale:.3g}"


def right_in_turn(pairs: jm.Pairs, *answers: np.ndarray) -> jm.Pairs:
    """The pairs with the first of `answers` [B] for the first label, and so on; after the last, with what none says.

    So each of them is right somewhere and wrong somewhere, if there are more examples than answers.
    """
    none = [min(set(range(len(answers) + 1)) - set(said)) for said in zip(*answers, strict=True)]
    return replace(pairs, labels=np.choose(np.arange(len(pairs)) % (len(answers) + 1), [*answers, none]))


def assert_correct(found: jm.Predictions, expected: np.ndarray, pairs: jm.Pairs) -> None:
    """Right where the expected logits [..., B, V] are, which is neither nowhere nor everywhere."""
    correct = np.argmax(expected, -1) == pairs.labels
    assert np.all((correct.mean(-1) > 0) & (correct.mean(-1) < 1)), f"accuracies {correct.mean(-1)} say little"
    np.testing.assert_array_equal(found.correct, correct)
    np.testing.assert_allclose(found.accuracy, correct.mean(-1))


@pytest.fixture(scope="module", autouse=True)
def forget_compilations():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530: too few for all tests together."""
    yield
    jax.clear_caches()


@pytest.fixture
def random_model() -> Callable[..., jm.Model]:
    """A function that makes a small model with random weights; keywords change its Config.

    Biases and norm weights are random as well, so that a forgotten one shows.
    """

    def make(seed: int = 4, **changes) -> jm.Model:
        sizes = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "width": 24, "mlp_width": 40}
        config = jm.Config(**{"vocab_size": 50, **sizes, **changes})
        rng = np.random.default_rng(seed)

        def draw(path, x):
            name = path[-1].key
            mean = 1.0 if name.endswith("norm") else 0.0
            # Attention and embeddings that matter, so that effects are far above rounding.
            scale = {"o": 0.7, "embed": 0.5}.get(name, 0.35)
            return jnp.asarray(rng.normal(mean, scale, x.shape), x.dtype)

        return jm.Model(config, jax.tree_util.tree_map_with_path(draw, abstract_params(config)))

    return make


@pytest.fixture
def random_pairs() -> Callable[..., jm.Pairs]:
    """A function that makes random prompts with roles `early` < `query_box` < `last`, of unequal lengths."""

    def make(model: jm.Model, count: int = 5, length: int = 12, seed: int = 0, unequal: bool = True) -> jm.Pairs:
        rng = np.random.default_rng(seed)
        vocab = model.config.vocab_size

        def prompts(length):
            last = rng.integers(length - 3, length, count) if unequal else np.full(count, length - 1)
            roles = {"last": last, "query_box": last - 2, "early": rng.integers(1, length - 6, count)}
            return rng.integers(0, vocab, (count, length)), roles

        clean, positions = prompts(length)
        corrupt, corrupt_positions = prompts(length + 2 if unequal else length)
        return jm.Pairs(clean, corrupt, rng.integers(0, vocab, count), positions, corrupt_positions)

    return make
