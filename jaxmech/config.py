"""The model's configuration: every number that the mathematics in `model.py` reads.

Owns `Config` and `Rope`. It does not know Hugging Face's names; `convert.hf_config` translates them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

ROPE_KINDS = ("default", "linear", "llama3")
PRECISIONS = ("default", "high", "highest")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

    Attributes:
      theta: base of the frequencies.
      kind: "default"; "linear" (frequencies / factor); "llama3" (Llama 3.1, section 3.4 of Dubey et al. 2024).
      factor: how many times longer the context is than `original_max_positions` ("linear", "llama3").
      low_freq_factor, high_freq_factor: wavelengths above original_max_positions / low are divided by
        `factor`, those below original_max_positions / high are kept, between them interpolated ("llama3").
      original_max_positions: context length before scaling, in tokens ("llama3").
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"Unsupported RoPE type {self.kind!r}; supported are {', '.join(ROPE_KINDS)}.")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            _check_positive("RoPE", name, getattr(self, name), (int, float))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"RoPE: high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}."
            )


@dataclass(frozen=True)
class Config:
    """Shape and numerics of a Llama-family decoder. Hashable, so that it can be a static jit argument.

    Attributes:
      vocab_size, width, num_layers, num_heads, num_kv_heads, head_dim, mlp_width: the axes V, D, L, N, K, H
        and F of `model.py`. head_dim is independent of width.
      norm_eps: epsilon of RMSNorm.
      max_positions: context length that the checkpoint states, in tokens; no limit here, only written back on export.
      rope: rotary embedding.
      attention_bias: q, k, v and o projections have a bias.
      mlp_bias: gate, up and down projections have a bias.
      tie_embeddings: the unembedding is the transposed embedding.
      param_dtype: dtype in which parameters are stored.
      dtype: dtype of the activations; norms, softmax, RoPE angles and logits are float32 in any case.
      precision: precision of matmuls. On GPU and TPU JAX's default float32 product is not float32; "highest" is.
        "default" leaves the choice to JAX (`jax.default_matmul_precision`).
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-6
    max_positions: int = 2048
    rope: Rope = field(default_factory=Rope)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    precision: str = "default"

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        for name in (*sizes, "max_positions"):
            _check_positive("Config", name, getattr(self, name), int)
        _check_positive("Config", "norm_eps", self.norm_eps, (int, float))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"Config: head_dim={self.head_dim} is odd; RoPE rotates pairs of dimensions.")
        for name, known in (("param_dtype", DTYPES), ("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Config: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a NumPy dtype."""
        return jnp.dtype(self.dtype)

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Reads `to_dict`'s output. ValueError names any field that is missing or that this version does not know."""
        _check_fields(cls, values)
        _check_fields(Rope, values["rope"])
        return cls(**{**values, "rope": Rope(**values["rope"])})


def _check_positive(owner: str, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        number = "integer" if kind is int else "number"
        raise ValueError(f"{owner}: {name} is {value!r}; expected a positive {number}.")


def _check_fields(cls: type, values: dict[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{cls.__name__}: unknown fields {unknown}; was this saved by a newer jaxmech?")
    if missing := sorted(known - values.keys()):
        raise ValueError(f"{cls.__name__}: fields {missing} are missing; was this saved by an older jaxmech?")
