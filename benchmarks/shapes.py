"""The shapes that benchmarks run, and the work of the four stages on them.

`1b`, `7b` and `8b` are those of Llama-3.2-1B, Llama-7B and Llama-3.1-8B (their config.json on Hugging Face).
"""

from dataclasses import dataclass

import numpy as np

import jaxmech as jm


@dataclass(frozen=True)
class Shape:
    """A model with random weights and prompts of the boxes task's structure."""

    config: jm.Config
    prompts: int
    tokens: int


def _config(vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, dtype: str) -> jm.Config:
    return jm.Config(
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp,
        dtype=dtype,
        param_dtype=dtype,
    )


SHAPES = {
    "tiny": Shape(_config(256, 64, 4, 4, 4, 128, "float32"), prompts=8, tokens=57),
    "small": Shape(_config(32000, 512, 8, 8, 8, 1376, "float32"), prompts=16, tokens=57),
    "1b": Shape(_config(128256, 2048, 16, 32, 8, 8192, "bfloat16"), prompts=300, tokens=57),
    "7b": Shape(_config(32000, 4096, 32, 32, 32, 11008, "bfloat16"), prompts=300, tokens=57),
    "8b": Shape(_config(128256, 4096, 32, 32, 8, 14336, "bfloat16"), prompts=300, tokens=57),
}


@dataclass(frozen=True)
class Stage:
    """One sweep of the benchmark."""

    name: str
    sender: str
    receivers: list[tuple[int, int]] | None
    via: str | None


def groups(config: jm.Config) -> dict[str, list[tuple[int, int]]]:
    """Heads spread over layers as deep as the paper's circuit of Llama-7B has those that are receivers.

    Fractions of the depth: value fetchers 0.5 to 1, position transmitters 0.45 to 0.65, position detectors 0.35 to
    0.55; structure readers, which no stage reads, 0.25 to 0.45.
    """

    def spread(low: float, high: float, count: int) -> list[tuple[int, int]]:
        layers = np.linspace(low * config.num_layers, high * config.num_layers - 1, count).round().astype(int)
        return sorted({(int(layer), i % config.num_heads) for i, layer in enumerate(layers)})

    return {
        "value_fetcher": spread(0.5, 1.0, 20),
        "pos_transmitter": spread(0.45, 0.65, 5),
        "pos_detector": spread(0.35, 0.55, 10),
        "struct_reader": spread(0.25, 0.45, 5),
    }


def stages(config: jm.Config) -> list[Stage]:
    """The paper's four stages, which read `groups`."""
    heads = groups(config)
    return [
        Stage(f"{i} {stage.group}", stage.sender, heads.get(str(stage.receivers)), stage.via)
        for i, stage in enumerate(jm.PAPER_CHAIN, 1)
    ]


def pairs(shape: Shape, *, boxes: bool = True, seed: int = 0) -> jm.Pairs:
    """Random token ids in the structure of the boxes task: seven boxes, seven queries a scene.

    A prompt is a scene of T - 6 tokens, labels seven apart, and a query of six whose label is third from the end.

    Args:
      boxes: prompts of a scene share it, as in the task; False: every prompt is random throughout.
    """
    rng = np.random.default_rng(seed)
    vocab, count, length = shape.config.vocab_size, shape.prompts, shape.tokens
    scenes = -(-count // 7) if boxes else count
    text = rng.integers(0, vocab, (max(scenes, 2), length))
    scene = np.arange(count) // 7 if boxes else np.arange(count)
    clean, corrupt = text[scene].copy(), text[(scene + 1) % len(text)].copy()
    if not boxes:
        corrupt = rng.integers(0, vocab, (count, length))
    last = np.full(count, length - 1)
    earlier = 6 + 7 * (np.arange(count) % 7)
    clean[:, -3] = clean[np.arange(count), earlier]
    corrupt[:, -3] = rng.integers(0, vocab, count)
    positions = {"last": last, "query_box": last - 2, "prev_query_box": earlier}
    sources = positions | {"prev_query_box": 6 + 7 * rng.integers(0, 7, count)}
    return jm.Pairs(clean, corrupt, rng.integers(0, vocab, count), positions, sources)


def random_model(config: jm.Config, seed: int = 0) -> jm.Model:
    """A model with random weights, made leaf by leaf in the parameters' dtype.

    Variance 1 / fan-in, but for q and k (x 2) and o (x 4): heads attend to few tokens and matter, so that scores stand
    well above the rounding of the log-probabilities that they are differences of.
    """
    import jax
    import jax.numpy as jnp

    from jaxmech.model import abstract_params

    def draw(path, x):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(x.shape, x.dtype)
        if name == "o":
            fan_in = x.shape[1] * x.shape[2]  # [L, N, H, D]; the other blocks are [L, fan-in, ...]
        else:
            fan_in = {"embed": x.shape[1], "unembed": x.shape[0]}.get(name, x.shape[1])
        key = jax.random.fold_in(jax.random.key(seed), hash_name(name))
        scale = {"q": 2, "k": 2, "o": 4}.get(name, 1) * fan_in**-0.5
        return (jax.random.normal(key, x.shape, x.dtype) * scale).astype(x.dtype)

    return jm.Model(config, jax.tree_util.tree_map_with_path(draw, abstract_params(config)))


def hash_name(name: str) -> int:
    """A number that depends on the name alone."""
    return int.from_bytes(name.encode()[:4].ljust(4), "little") & 0x7FFFFFFF
