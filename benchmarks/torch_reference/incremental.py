"""Path patching by the causal cone, in PyTorch: the algorithm without the compiler.

For a sender at the last token only that token can change. The frozen stream is then one token carried through the MLPs
above the sender, no attention; the live stream is one token that attends to the clean keys and values of the prompt and
to its own. All heads of a layer and all examples go through one large matmul. Definition and scores are those of
`path_patching`; this covers the sweeps with the sender at the last token, to the logits and through receivers' q.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .hooks import capture, indices
from .path_patching import Head, Prompts, check_receivers, unembed_probability


class Cache(NamedTuple):
    """The clean run. Fields from `cos` on serve the live stream and are None where none runs."""

    resid_pre: Tensor  # [L, B, D], at the last token
    attn_out: Tensor  # [L, B, D], at the last token
    delta_z: Tensor  # [L, B, N, H], corrupt - clean at the last token
    cos: Tensor | None = None  # [B, 1, H], rotation at the last token
    sin: Tensor | None = None  # [B, 1, H]
    k: Tensor | None = None  # [L, B, K, T, H], rotated
    v: Tensor | None = None  # [L, B, K, T, H]
    prefix: Tensor | None = None  # bool [B, 1, 1, T], tokens left of the last


@torch.inference_mode()
def path_patch(
    model: LlamaForCausalLM,
    clean,
    corrupt,
    labels,
    position,
    corrupt_position,
    last,
    receivers: Iterable[Head] | None = None,
    via: str | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Scores float32 [L, N, B] of all heads as senders at the last token; arguments as in `path_patching.path_patch`.

    Raises:
      ValueError: a sender that is not at the last token, receivers via k or v, or what `path_patching.path_patch`
        refuses.
    """
    prompts = Prompts(*(indices(model, x) for x in (clean, corrupt, labels, position, corrupt_position, last)))
    reads = check_receivers(model, prompts, receivers, via)
    if via not in (None, "q") or (prompts.position != prompts.last).any():
        raise ValueError(
            f"via={via!r}: incremental path patching needs senders at the last token, via 'q' or the logits."
        )
    size = chunk or len(prompts.clean)
    parts = zip(*(x.split(size) for x in prompts), strict=True)
    return torch.cat([_scores(model, Prompts(*part), reads) for part in parts], dim=-1)


def _scores(model: LlamaForCausalLM, prompts: Prompts, reads: dict[int, Tensor]) -> Tensor:
    """Scores [L, N, B] of one chunk of examples."""
    config = model.config
    cache = _clean_cache(model, prompts, live=bool(reads))
    scores = torch.zeros(config.num_hidden_layers, config.num_attention_heads, len(prompts.clean), device=model.device)
    for sender in range(max(reads, default=config.num_hidden_layers)):
        frozen = _start(model.model.layers[sender], cache, sender)
        x = _advance(model, cache, frozen, sender, reads) if reads else _freeze(model, cache, frozen, sender + 1)
        probability = unembed_probability(model, x, prompts.labels)  # [B, 1 + N]
        scores[sender] = ((probability[:, 1:] - probability[:, :1]) / probability[:, :1]).T
    return scores


def _clean_cache(model: LlamaForCausalLM, prompts: Prompts, live: bool) -> Cache:
    last, length = prompts.last, prompts.clean.shape[1]
    sites: dict[str, Tensor | None] = {"resid_pre": last, "attn_out": last, "z": last}
    kept = capture(model, prompts.clean, sites | ({"k": None, "v": None} if live else {}))
    delta_z = capture(model, prompts.corrupt, {"z": prompts.corrupt_position})["z"] - kept["z"]
    cache = Cache(kept["resid_pre"], kept["attn_out"], delta_z)
    if not live:
        return cache
    tokens = torch.arange(length, device=model.device)
    k, v = kept["k"].transpose(2, 3), kept["v"].transpose(2, 3)  # [L, B, K, T, H]
    k = apply_rotary_pos_emb(k, k, *model.model.rotary_emb(k, tokens[None]))[1]
    cos, sin = model.model.rotary_emb(k, last[:, None])
    return cache._replace(cos=cos, sin=sin, k=k, v=v, prefix=(tokens < last[:, None])[:, None, None])


def _start(layer: nn.Module, cache: Cache, sender: int) -> Tensor:
    """The frozen stream [B, 1 + N, D] after the sender's layer: row 0 unpatched, row 1 + n with head n patched."""
    delta_z = cache.delta_z[sender]
    weight = layer.self_attn.o_proj.weight.unflatten(1, delta_z.shape[1:])  # [D, N, H]
    delta = torch.einsum("bnh,dnh->bnd", delta_z, weight)
    delta = nn.functional.pad(delta, (0, 0, 1, 0))
    return _mlp_half(layer, (cache.resid_pre[sender] + cache.attn_out[sender])[:, None] + delta)


def _freeze(model: LlamaForCausalLM, cache: Cache, frozen: Tensor, start: int, stop: int | None = None) -> Tensor:
    """The frozen stream [B, R, D] sent through layers start..stop-1."""
    for index, layer in list(enumerate(model.model.layers))[start:stop]:
        frozen = _mlp_half(layer, frozen + cache.attn_out[index][:, None])
    return frozen


def _advance(model: LlamaForCausalLM, cache: Cache, frozen: Tensor, sender: int, reads: dict[int, Tensor]) -> Tensor:
    """The live stream [B, R, D] after the last layer, its receivers' q read from the frozen stream on the way."""
    first, end = min(layer for layer in reads if layer > sender), max(reads)
    frozen = _freeze(model, cache, frozen, sender + 1, first)
    live = cache.resid_pre[first][:, None].expand_as(frozen)
    for index, layer in list(enumerate(model.model.layers))[first:]:
        q, k, v = _project(layer, live)
        if index in reads:
            q[:, :, reads[index]] = _project(layer, frozen, "q")[0][:, :, reads[index]]
        live = _mlp_half(layer, live + _attend(layer.self_attn, cache, index, q, k, v))
        if index < end:
            frozen = _mlp_half(layer, frozen + cache.attn_out[index][:, None])
    return live


def _project(layer: nn.Module, x: Tensor, sites: str = "qkv") -> list[Tensor]:
    """q, k, v [B, R, N or K, H] before RoPE of the residual stream x [B, R, D]."""
    normed, attention = layer.input_layernorm(x), layer.self_attn
    return [getattr(attention, f"{site}_proj")(normed).unflatten(-1, (-1, attention.head_dim)) for site in sites]


def _attend(attention: nn.Module, cache: Cache, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attn_out [B, R, D] of one token per row over the clean prefix, shared by the rows, and the row's own k and v."""
    rows, groups = q.shape[1], attention.num_key_value_groups
    q, k = apply_rotary_pos_emb(q, k, cache.cos, cache.sin, unsqueeze_dim=2)
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4)  # [B, K, R, G, H]
    k, v = k.permute(0, 2, 1, 3)[..., None, :], v.permute(0, 2, 1, 3)[..., None, :]  # [B, K, R, 1, H]
    scores = (q.flatten(2, 3) @ cache.k[index].mT).masked_fill(~cache.prefix, -torch.inf)  # [B, K, R * G, T]
    own = (q * k).sum(-1).flatten(2)[..., None]
    pattern = (torch.cat([scores, own], dim=-1).float() * attention.scaling).softmax(-1).to(q.dtype)
    z = pattern[..., :-1] @ cache.v[index]  # [B, K, R * G, H]
    z = z.unflatten(2, (rows, groups)) + pattern[..., -1:].unflatten(2, (rows, groups)) * v
    return attention.o_proj(z.permute(0, 2, 1, 3, 4).flatten(2))


def _mlp_half(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer.mlp(layer.post_attention_layernorm(x))
