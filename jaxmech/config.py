"""The model's configuration: every number that the mathematics in `model.py` reads.

Owns `Config` and `Rope`. It does not know Hugging Face's names; `convert.hf_config` translates them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

ROPE_KINDS = ("default", "none", "linear", "dynamic", "llama3", "yarn", "longrope")
# JAX's `jax.lax.Precision`, and its dot algorithms (`jax.lax.DotAlgorithmPreset`) of float32 numbers.
PRECISIONS = (
    *("default", "high", "highest"),
    *("TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6"),
)
COARSE = ("default", "high", "TF32_TF32_F32", "BF16_BF16_F32")  # on some device, products of fewer bits than bf16x3's
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu_tanh")
NORM_STYLES = ("llama", "float32", "gemma")
QK_NORMS = ("none", "head", "all")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

    Attributes:
      theta: base of the frequencies.
      kind: "default"; "none" (nothing is rotated: NoPE; Kazemnejad et al. 2023, arXiv:2305.19466); "linear"
        (frequencies / factor); "dynamic" (a larger base for prompts over `original_max_positions`, by their length);
        "llama3" (Llama 3.1, section 3.4 of Dubey et al. 2024); "yarn" (Peng et al. 2023, arXiv:2309.00071); "longrope"
        (Ding et al. 2024, arXiv:2402.13753).
      factor: how many times longer the context is than `original_max_positions` ("linear", "dynamic", "llama3",
        "yarn").
      low_freq_factor, high_freq_factor: wavelengths above original_max_positions / low are divided by
        `factor`, those below original_max_positions / high are kept, between them interpolated ("llama3").
      original_max_positions: context length before scaling, in tokens (all but "default" and "linear").
      beta_fast, beta_slow: frequencies that turn more often than beta_fast in the original context are kept, those that
        turn less often than beta_slow are divided by `factor`, between them interpolated ("yarn").
      truncate: round the bounds of that band to whole dimensions ("yarn").
      short_factors, long_factors: divisor of each frequency for prompts up to `original_max_positions`, and for longer
        ones ("longrope"); float [H fraction / 2].
      attention_factor: cos and sin are multiplied by it ("yarn", "longrope").
      fraction: the leading part of each head that is rotated; the rest is left alone.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    fraction: float = 1.0

    def __post_init__(self):
        _check_known("RoPE", "type", self.kind, ROPE_KINDS)
        numbers = "theta factor low_freq_factor high_freq_factor original_max_positions beta_fast beta_slow"
        for name in (*numbers.split(), "attention_factor", "fraction"):
            _check_positive("RoPE", name, getattr(self, name), (int, float))
        for number in (*self.short_factors, *self.long_factors):
            _check_positive("RoPE", "a factor of longrope", number, (int, float))
        if self.fraction > 1:
            raise ValueError(f"RoPE: fraction is {self.fraction}; expected at most 1, all of a head.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"RoPE: high_freq_factor={self.high_freq_factor} must be larger than "
                f"low_freq_factor={self.low_freq_factor}."
            )

    @property
    def longest(self) -> float:
        """Length of the longest prompt, in tokens, whose frequencies do not depend on its length."""
        return self.original_max_positions if self.kind in ("dynamic", "longrope") else float("inf")

    def rotated(self, head_dim: int) -> int:
        """How many of a head's `head_dim` dimensions are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class Config:
    """Shape and numerics of a Llama-family decoder. Hashable, so that it can be a static jit argument.

    Configs are equal if the mathematics of their models is: `family` and `max_positions` do not count, so that a model
    and its fine-tune share what is compiled.

    Attributes:
      vocab_size, width, num_layers, num_heads, num_kv_heads, head_dim, mlp_width: the axes V, D, L, N, K, H
        and F of `model.py`. head_dim is independent of width.
      family: name of the checkpoint's architecture, Hugging Face's model_type; `convert` reads and writes its layout.
        The mathematics does not read it: all of that is in the fields below.
      norm_eps: epsilon of RMSNorm.
      norm_style: where RMSNorm casts back from float32: "llama" before the product with the weight, "float32" after it
        (OLMo), "gemma" after the product with 1 + weight.
      pre_norm: attention and MLP read the norm of the residual stream, not the stream itself.
      post_norm: what they put out is normed before it is added to the stream (Gemma 2 and 3, OLMo).
      qk_norm: norm of q and k before RoPE: "none", of each "head" (Qwen3, Gemma 3), or of "all" heads together (OLMo).
      max_positions: context length that the checkpoint states, in tokens; longer prompts are warned of.
      rope: rotary embedding.
      other_rope, other_rope_layers: that of some layers, if it is another one (Gemma 3 and OLMo 3, where they have a
        window; SmolLM3, which does not rotate there).
      window: a query attends to this many tokens at most, itself included; 0: to all.
      full_layers: layers that have no window.
      attention_bias: q, k and v projections have a bias.
      output_bias: o projections have a bias.
      mlp_bias: gate, up and down projections have a bias.
      activation: "silu" or "gelu_tanh", of the gate.
      embed_scale: factor of the embedding, rounded to the compute dtype.
      residual_scale: factor of what attention and MLP add to the residual stream (Granite).
      score_scale: factor of q k; 0: 1 / sqrt(H).
      logit_divisor: what logits are divided by (Granite).
      score_cap, logit_cap: attention scores and logits x become cap tanh(x / cap) (Gemma 2); 0: they stay.
      tie_embeddings: the unembedding is the transposed embedding.
      param_dtype: dtype in which parameters are stored.
      dtype: dtype of the activations; norms, softmax, RoPE angles and logits are float32 in any case.
      precision: how products of float32 numbers are computed, as JAX names it; those of other dtypes know one way.
        "highest" is float32. "high" is three bfloat16 products on TPUs, but TF32 on GPUs. "default" leaves it to JAX
        (`jax.default_matmul_precision`): TF32 on recent NVIDIA GPUs, bfloat16 on TPUs. The names of dot algorithms
        ("BF16_BF16_F32_X3": three bfloat16 products, about 16 bits; "TF32_TF32_F32_X3") mean the same on every device
        that has them: TPUs have the BF16 ones alone, CPUs compute these in float32. docs/precision.md compares them.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    family: str = field(default="llama", compare=False)
    norm_eps: float = 1e-6
    norm_style: str = "llama"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = "none"
    max_positions: int = field(default=2048, compare=False)
    rope: Rope = field(default_factory=Rope)
    other_rope: Rope | None = None
    other_rope_layers: tuple[int, ...] = ()
    window: int = 0
    full_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    score_scale: float = 0.0
    logit_divisor: float = 1.0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    tie_embeddings: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        for name in (*sizes, "max_positions"):
            _check_positive("Config", name, getattr(self, name), int)
        for name in ("norm_eps", "embed_scale", "residual_scale", "logit_divisor"):
            _check_positive("Config", name, getattr(self, name), (int, float))
        for name, kind in (("window", int), *((n, (int, float)) for n in ("score_scale", "score_cap", "logit_cap"))):
            if getattr(self, name) != 0:
                _check_positive("Config", name, getattr(self, name), kind)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
            )
        for rope in self.ropes:
            _check_rope(rope, self.head_dim)
        if (self.other_rope is None) != (not self.other_rope_layers):
            raise ValueError(
                f"Config: other_rope={self.other_rope} and other_rope_layers={self.other_rope_layers}; expected both "
                "or neither."
            )
        if len({rope.rotated(self.head_dim) for rope in self.ropes}) > 1:
            raise ValueError("Config: rope and other_rope rotate parts of different sizes; expected one fraction.")
        for name in ("full_layers", "other_rope_layers"):
            if not all(0 <= layer < self.num_layers for layer in getattr(self, name)):
                raise ValueError(f"Config: {name}={getattr(self, name)}; the layers are 0..{self.num_layers - 1}.")
        known = {"param_dtype": DTYPES, "dtype": DTYPES, "precision": PRECISIONS, "activation": ACTIVATIONS}
        for name, values in (known | {"norm_style": NORM_STYLES, "qk_norm": QK_NORMS}).items():
            _check_known("Config", name, getattr(self, name), values)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings of all layers: `rope` and, if some have another one, `other_rope`."""
        return (self.rope,) if self.other_rope is None else (self.rope, self.other_rope)

    def rope_of(self, layer: int) -> Rope:
        """The rotary embedding of layer number `layer`."""
        return self.other_rope if self.other_rope and layer in self.other_rope_layers else self.rope

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a NumPy dtype."""
        return jnp.dtype(self.dtype)

    @property
    def patched_shape(self) -> tuple[int, int, int, int]:
        """(layers, heads, head_dim, vocabulary): what models share whose heads are patched into each other."""
        return self.num_layers, self.num_heads, self.head_dim, self.vocab_size

    @property
    def coarse(self) -> bool:
        """Whether activations or products are rounded so that rounding can be seen in scores."""
        return self.dtype != "float32" or self.precision in COARSE

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed: `changes` are their new values, by name."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Reads `values`, the output of `to_dict`. ValueError names any field that is missing or unknown here."""
        _check_fields(cls, values)
        ropes = {name: values[name] for name in ("rope", "other_rope") if values[name] is not None}
        for rope in ropes.values():
            _check_fields(Rope, rope)
        return cls(**_tuples(values | {name: Rope(**_tuples(rope)) for name, rope in ropes.items()}))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, as JSON has them, to tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_rope(rope: Rope, head_dim: int) -> None:
    """Raises ValueError if the embedding cannot rotate a head of that size."""
    rotated = rope.rotated(head_dim)
    if rotated % 2:
        part = "" if rope.fraction == 1 else f", of which {rotated} are rotated,"
        raise ValueError(f"Config: head_dim={head_dim}{part} is odd; RoPE rotates pairs of dimensions.")
    if rope.kind == "dynamic" and rotated == 2:
        raise ValueError("Config: dynamic RoPE of one pair of dimensions is not defined; expected more in a head.")
    for name in ("short_factors", "long_factors"):
        if rope.kind == "longrope" and len(getattr(rope, name)) != rotated // 2:
            raise ValueError(
                f"Config: RoPE has {len(getattr(rope, name))} {name}; expected one for each of the {rotated // 2} "
                f"pairs of dimensions that are rotated."
            )


def _check_known(owner: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}: {name} is {value!r}; expected one of {', '.join(known)}.")


def _check_positive(owner: str, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        number = "integer" if kind is int else "number"
        raise ValueError(f"{owner}: {name} is {value!r}; expected a positive {number}.")


def _check_fields(cls: type, values: dict[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{cls.__name__}: unknown fields {unknown}; was this saved by a newer jaxmech?")
    if missing := sorted(known - values.keys()):
        raise ValueError(
            f"{cls.__name__}: fields {missing} are missing; if an older jaxmech saved this, convert it again."
        )
