"""The Llama-family decoder: pure functions for the mathematics, a Linen module that declares its parameters.

There is one norm, one attention (`jaxmech.attention`) and one MLP in the code base; the cone engine uses them too.

Axes, one letter each, in every shape and einsum of the project:
  B batch   T query token   S key token   D embed   N query heads   K kv heads   G = N / K query heads per kv head
  H head dim   F mlp   V vocab   L layers   P patched positions of one prompt   R roles
  I interventions that run together (senders, heads, first layers)

Functions take `...` leading axes, so that the same function serves a batch and, vmapped, one example.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from jaxmech import rope
from jaxmech.arithmetic import affine, capped, einsum
from jaxmech.attention import attention_pattern, mix_values, per_query_head, visible
from jaxmech.config import Config
from jaxmech.interventions import SITES, Interventions, apply_patch, knocked_out

Params = Mapping[str, Any]


class Llama(nn.Module):
    """A Llama-family decoder with explicit interventions. Linen only declares the parameters; see `forward`."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        interventions: Interventions | None = None,
        capture: Sequence[str] = (),
        *,
        capture_at: jax.Array | None = None,
        logits_at: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and captured activations of `tokens` [B, T].

        Args:
          tokens: token ids, int [B, T], right-padded.
          interventions: what to patch or knock out.
          capture: sites to return (see `jaxmech.interventions.SITES`).
          capture_at: int [B, P]; return activations at these positions of each prompt only.
          logits_at: int [B]; compute logits at this position of each prompt only.
          remat: keep each layer's input alone for the backward pass, which computes the layer again (`jax.checkpoint`).

        Returns:
          logits float32 [B, T, V], or [B, V] with `logits_at`, and {site: activation [L, B, T or P, ...]} after
          patching: [..., N, H] for q, k, v, z (k and v per query head), [..., N, S] for pattern, [..., D] for residual
          sites. An id outside the vocabulary makes all of its prompt nan.

        Raises:
          ValueError: an unknown site, or an intervention that fails `Interventions.check`.
        """
        shapes = parameter_shapes(self.config)
        params = {name: self.param(name, _init, shape, self.config) for name, shape in shapes.items()}
        options = {"capture": capture, "capture_at": capture_at, "logits_at": logits_at, "remat": remat}
        return forward(self.config, params, tokens, interventions, **options)


def parameter_shapes(config: Config) -> dict[str, Any]:
    """Shape of every parameter, as the nested dictionary that `Llama` declares; blocks are stacked over L."""
    L, D, N, K, H, F = (
        config.num_layers,
        config.width,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.mlp_width,
    )
    blocks = {
        "q": (L, D, N, H),
        "k": (L, D, K, H),
        "v": (L, D, K, H),
        "o": (L, N, H, D),
        "gate": (L, D, F),
        "up": (L, D, F),
        "down": (L, F, D),
    }
    if config.pre_norm:
        blocks |= {"attn_norm": (L, D), "mlp_norm": (L, D)}
    if config.post_norm:
        blocks |= {"attn_post_norm": (L, D), "mlp_post_norm": (L, D)}
    if config.qk_norm != "none":
        heads = config.qk_norm == "all"
        blocks |= {"q_norm": (L, N, H) if heads else (L, H), "k_norm": (L, K, H) if heads else (L, H)}
    if config.attention_bias:
        blocks |= {"q_bias": (L, N, H), "k_bias": (L, K, H), "v_bias": (L, K, H)}
    if config.output_bias:
        blocks |= {"o_bias": (L, D)}
    if config.mlp_bias:
        blocks |= {"gate_bias": (L, F), "up_bias": (L, F), "down_bias": (L, D)}
    top = {"embed": (config.vocab_size, D), "blocks": blocks, "final_norm": (D,)}
    return top if config.tie_embeddings else top | {"unembed": (D, config.vocab_size)}


@cache
def abstract_params(config: Config) -> dict[str, Any]:
    """What `Llama(config).init` returns, {"params": tree}, as shapes and dtypes without any data."""
    return jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def check_params(config: Config, params: Any, *, dtypes: bool = True) -> None:
    """Compares `params` (arrays or their shapes) with `abstract_params`; Linen itself ignores unknown parameters.

    Raises:
      ValueError: the first parameter, by name, that is missing, unknown or of another shape or (if `dtypes`) dtype.
    """
    expected, found = (
        {keystr(path, simple=True, separator="."): x for path, x in tree_leaves_with_path(tree)}
        for tree in (abstract_params(config), params)
    )
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"Parameter {name} is {'missing' if name in expected else 'unknown to the model'}.")
        want, have = (f"{x.dtype if dtypes else ''}{list(x.shape)}" for x in (expected[name], found[name]))
        if want != have:
            raise ValueError(f"Parameter {name} is {have}; the model's config calls for {want}.")


def _init(key: jax.Array, shape: Any, config: Config) -> Any:
    """Norms scale by one, biases are zeros, matrices normal with variance 1 / fan-in; `shape` may be a dictionary."""
    if isinstance(shape, dict):
        keys = jax.random.split(key, len(shape))
        return {n: _init_block(k, n, s, config) for k, (n, s) in zip(keys, shape.items(), strict=True)}
    if len(shape) == 1:
        return _init_block(key, "final_norm", shape, config)
    return jax.random.normal(key, shape, config.param_dtype) * config.width**-0.5  # embed, unembed


def _init_block(key: jax.Array, name: str, shape: tuple[int, ...], config: Config) -> jax.Array:
    dtype = config.param_dtype
    if name.endswith("norm"):
        return jnp.full(shape, 0 if config.norm_style == "gemma" else 1, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    fan_in = shape[1] * shape[2] if name == "o" else shape[1]  # [L, N, H, D]; the others are [L, fan-in, ...]
    return jax.random.normal(key, shape, dtype) * fan_in**-0.5


def forward(
    config: Config,
    params: Params,
    tokens: jax.Array,
    interventions: Interventions | None = None,
    *,
    capture: Sequence[str] = (),
    capture_at: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The plain forward pass, layers scanned over their stacked parameters.

    Args:
      tokens: int [B, T].
      capture: sites to return, stacked over layers.
      capture_at: int [B, P]; activations are returned at these positions of each prompt only, [L, B, P, ...].
      logits_at: int [B]; logits are computed at this position of each prompt only.
      remat: keep each layer's input alone for the backward pass.

    Returns:
      logits float32 [B, T, V], or [B, V] with `logits_at`; and {site: activation [L, B, T, ...]} of `capture`.
    """
    interventions = interventions or Interventions()
    interventions.check(config, tokens.shape)
    keep = _captor(config, check_capture(capture), capture_at)
    positions = jnp.arange(tokens.shape[1])
    rotations = rope.rotations(config, positions, length=tokens.shape[1])

    def layer(x, index_and_weights):
        index, weights = index_and_weights
        x, sites = block(config, weights, x, rope.of_layer(config, index, rotations), interventions, index)
        return x, keep(sites)

    x = embed(config, params, tokens)
    run = jax.checkpoint(layer, prevent_cse=False) if remat else layer  # nothing is shared across steps of a scan
    x, captured = jax.lax.scan(run, x, (jnp.arange(config.num_layers), params["blocks"]))
    if logits_at is not None:
        x = x[jnp.arange(x.shape[0]), logits_at]
    return unembed(config, params, x), captured


def block(
    config: Config,
    weights: Params,
    x: jax.Array,
    rotation: rope.Rotation,
    interventions: Interventions,
    index: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Decoder layer `index` on x [B, T, D]: its output and the activation at every site, after patching."""
    sites: dict[str, jax.Array] = {}

    def site(name: str, activation: jax.Array) -> jax.Array:
        patch = getattr(interventions, name)
        if patch is not None:
            if name in ("k", "v"):
                activation = per_query_head(config, activation)
            activation = apply_patch(activation, patch, index)
        sites[name] = activation
        return activation

    x = site("resid_pre", x)
    normed = attention_input(config, weights, x)
    q, k, v = (site(name, project(config, weights, name, normed)) for name in ("q", "k", "v"))
    forbidden = knocked_out(interventions, index)
    position = jnp.arange(x.shape[-2])
    allowed = visible(config, index, position, position)
    if forbidden is not None:
        allowed = allowed & ~jnp.swapaxes(forbidden, -3, -2)
    (pattern,) = attention_pattern(config, rope.rotate(q, rotation), [(rope.rotate(k, rotation), allowed)])
    if forbidden is not None:
        pattern = jnp.where(allowed, pattern, 0)  # a query with no key left attends to nothing, not to all alike
    pattern = jnp.swapaxes(site("pattern", jnp.swapaxes(pattern, -3, -2)), -3, -2)
    z = site("z", mix_values(config, [(pattern, v)]))
    x = site("resid_mid", x + site("attn_out", attention_output(config, weights, z)))
    x = site("resid_post", x + site("mlp_out", mlp(config, weights, x)))
    return x, sites


def layer_weights(params: Params, index: jax.Array | int) -> Params:
    """The parameters of one layer, in loops whose bounds are traced; `jax.lax.scan` slices them itself."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), params["blocks"])


def embed(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """Token ids [...] to the residual stream [..., D]."""
    known = (tokens >= 0) & (tokens < config.vocab_size)  # JAX would take others for the nearest that there is
    x = jnp.where(known[..., None], params["embed"][tokens], jnp.nan).astype(config.compute_dtype)
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, x.dtype)


def unembed(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """Residual stream after the last layer [..., D] to float32 logits [..., V]; includes the final norm."""
    x = norm(config, params["final_norm"], x)
    if config.tie_embeddings:
        return _logits(config, einsum(config, "...d,vd->...v", x, params["embed"], out=jnp.float32))
    return _logits(config, einsum(config, "...d,dv->...v", x, params["unembed"], out=jnp.float32))


def label_logits(config: Config, params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The float32 logits [...] of the tokens `labels` [...] alone: `unembed` without the rest of the vocabulary."""
    x = norm(config, params["final_norm"], x)
    rows = params["embed"][labels] if config.tie_embeddings else jnp.moveaxis(params["unembed"][:, labels], 0, -1)
    return _logits(config, jnp.sum(x.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1))


def _logits(config: Config, products: jax.Array) -> jax.Array:
    return capped(config.logit_cap, products / config.logit_divisor)


def norm(config: Config, weight: jax.Array, x: jax.Array) -> jax.Array:
    """RMSNorm of x [..., D], normalised in float32; `config.norm_style` says where it is cast back.

    HF `LlamaRMSNorm`, `Olmo2RMSNorm` and `GemmaRMSNorm`.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_style == "llama":
        return weight.astype(x.dtype) * x32.astype(x.dtype)
    offset = 1 if config.norm_style == "gemma" else 0
    return ((offset + weight.astype(jnp.float32)) * x32).astype(x.dtype)


def attention_input(config: Config, weights: Params, x: jax.Array) -> jax.Array:
    """What a layer's projections read of its residual stream resid_pre [..., D]."""
    return norm(config, weights["attn_norm"], x) if config.pre_norm else x


def project(config: Config, weights: Params, site: str, x: jax.Array) -> jax.Array:
    """q, k or v of the normed stream x [..., T, D]: [..., T, N, H], or K heads for k and v.

    q and k are as attention takes them but for RoPE: where the family norms them, they are normed.
    """
    y = affine(config, "...td,dnh->...tnh", x, weights[site], weights.get(f"{site}_bias"))
    if config.qk_norm == "none" or site == "v":
        return y
    weight = weights[f"{site}_norm"]
    if config.qk_norm == "head":
        return norm(config, weight, y)
    return norm(config, weight.reshape(-1), y.reshape(*y.shape[:-2], weight.size)).reshape(y.shape)


def rotated_qkv(
    config: Config, weights: Params, x: jax.Array, rotation: rope.Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v of the normed stream x [..., T, D], as `project` has them, but q and k rotated."""
    q, k, v = (project(config, weights, site, x) for site in ("q", "k", "v"))
    return rope.rotate(q, rotation), rope.rotate(k, rotation), v


def attention_output(config: Config, weights: Params, z: jax.Array) -> jax.Array:
    """attn_out [..., T, D], what all heads' z [..., T, N, H] add to the residual stream."""
    return added(config, weights, "attn", heads_output(config, weights, z))


def heads_output(config: Config, weights: Params, z: jax.Array) -> jax.Array:
    """The sum over heads of z W_O, [..., T, D], which is linear in z; `added` makes attn_out of it."""
    return affine(config, "...tnh,nhd->...td", z, weights["o"], weights.get("o_bias"))


def added(config: Config, weights: Params, branch: str, y: jax.Array) -> jax.Array:
    """What the branch "attn" or "mlp" adds to the residual stream if its last product is y [..., D]."""
    if config.post_norm:
        y = norm(config, weights[f"{branch}_post_norm"], y)
    return y if config.residual_scale == 1 else (y.astype(jnp.float32) * config.residual_scale).astype(y.dtype)


def mlp_half(config: Config, weights: Params, x: jax.Array) -> jax.Array:
    """The second half of a layer: resid_mid [..., D] to resid_post [..., D]."""
    return x + mlp(config, weights, x)


def mlp(config: Config, weights: Params, x: jax.Array) -> jax.Array:
    """mlp_out [..., D] of resid_mid x [..., D]: down(act(gate(normed)) * up(normed)), as added to the stream."""
    normed = norm(config, weights["mlp_norm"], x) if config.pre_norm else x
    gate = affine(config, "...d,df->...f", normed, weights["gate"], weights.get("gate_bias"))
    up = affine(config, "...d,df->...f", normed, weights["up"], weights.get("up_bias"))
    hidden = (jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
    down = affine(config, "...f,fd->...d", hidden, weights["down"], weights.get("down_bias"))
    return added(config, weights, "mlp", down)


def check_capture(capture: Sequence[str]) -> tuple[str, ...]:
    """The sites to capture as a tuple. ValueError names the unknown ones."""
    if isinstance(capture, str):
        raise ValueError(f"capture is the string {capture!r}; expected a tuple of sites such as ({capture!r},).")
    if unknown := [site for site in capture if site not in SITES]:
        raise ValueError(f"Unknown sites to capture: {unknown}; the sites are {', '.join(SITES)}.")
    return tuple(capture)


def _captor(
    config: Config, capture: tuple[str, ...], positions: jax.Array | None
) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    def keep(sites: dict[str, jax.Array]) -> dict[str, jax.Array]:
        kept = {s: per_query_head(config, sites[s]) if s in ("k", "v") else sites[s] for s in capture}
        if positions is None:
            return kept
        return {s: x[jnp.arange(len(positions))[:, None], positions] for s, x in kept.items()}

    return keep
