"""Reading and changing the activations of a Hugging Face Llama by forward hooks.

Owns the sites and where each lies in `transformers.models.llama.modeling_llama`, and in families whose modules have the
same names: Mistral, Qwen2, Qwen3, Gemma 1 and 2. Knows no method.

Sites, q, k and v before RoPE:
  z          input of o_proj        [B, T, N, H]
  q, k, v    output of *_proj, or of *_norm (Qwen3)  [B, T, N, H]; k and v [B, T, K, H], or N heads while edited
  attn_out   output of self_attn    [B, T, D]
  resid_pre  input of the layer     [B, T, D]
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

Edit = Callable[[Tensor], Tensor]
HEAD_SITES = ("z", "q", "k", "v")


def capture(model: LlamaForCausalLM, tokens: Tensor, sites: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Runs the prompts once and returns activations.

    Args:
      tokens: int64 [B, T].
      sites: what to keep: site -> positions, int64 [B] or [B, P], or None for all of them.

    Returns:
      site -> [L, B, ...] in the model's dtype, the token axis gone for positions [B] and of length P for [B, P]; k and
      v per kv head.
    """
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str, activation: Tensor) -> None:
        positions = sites[site]
        kept[site].append(activation if positions is None else at(activation, positions))

    with ExitStack() as stack:
        for layer in model.model.layers:
            for site in sites:
                stack.callback(_watch(layer, site, partial(keep, site)).remove)
        model.model(tokens, use_cache=False)
    return {site: torch.stack(layers) for site, layers in kept.items()}


@contextmanager
def edited(model: LlamaForCausalLM, edits: Iterable[tuple[str, int, Edit]]) -> Iterator[None]:
    """While active, every forward pass of the model sends the activations named in `edits` through their functions.

    k and v are edited per *query* head: in a layer with such an edit, the outputs of k_proj and v_proj are repeated for
    each query head of their group and the layer is told that it has N kv heads (`num_key_value_groups = 1`). The
    attention that follows is the same, but one head of a group can be changed alone.

    Args:
      edits: (site, layer, function), site one of z, q, k, v. The function takes the activation [B, T, N, H] and returns
        its replacement. Several edits of one activation apply in order.
    """
    edits = list(edits)
    with ExitStack() as stack:
        for index in sorted({index for site, index, _ in edits if site in ("k", "v")}):
            stack.enter_context(_unshared(model.model.layers[index].self_attn))
        for site, index, function in edits:
            stack.callback(_change(model.model.layers[index].self_attn, site, function).remove)
        yield


def replace(positions: Tensor, heads: Tensor, value: Tensor) -> Edit:
    """An edit that puts `value` [B, n, H] in place of the heads [n] at `positions` [B]."""
    rows = torch.arange(len(positions), device=positions.device)
    return lambda x: x.index_put((rows[:, None], positions[:, None], heads), value.to(x.dtype))


def at(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, ...] at positions [B] or [B, P] of each example: [B, ...] or [B, P, ...]."""
    rows = torch.arange(len(x), device=x.device)
    return x[rows.view(-1, *[1] * (positions.ndim - 1)), positions]


def per_query_head(model: LlamaForCausalLM, x: Tensor) -> Tensor:
    """k or v [..., K, H] repeated for each query head of its group, [..., N, H]; does nothing to N heads."""
    return x.repeat_interleave(model.config.num_attention_heads // x.shape[-2], dim=-2)


def by_layer(model: LlamaForCausalLM, heads: Iterable[tuple[int, int]]) -> dict[int, Tensor]:
    """The (layer, head) pairs as {layer: int64 [n]}, both ascending; ValueError for one that does not exist."""
    layers, count = model.config.num_hidden_layers, model.config.num_attention_heads
    grouped: dict[int, set[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise ValueError(f"Head ({layer}, {head}) does not exist; the model has {layers} layers of {count} heads.")
        grouped.setdefault(int(layer), set()).add(int(head))
    return {layer: indices(model, sorted(grouped[layer])) for layer in sorted(grouped)}


def indices(model: LlamaForCausalLM, values) -> Tensor:
    """Token ids, positions or head numbers (tensor, array or list) as int64 on the model's device."""
    return torch.as_tensor(values).to(model.device, torch.int64)


def last_logits(model: LlamaForCausalLM, tokens: Tensor, last: Tensor) -> Tensor:
    """Logits of a forward pass at `last` [B] only, float32 [B, V]; the unembedding sees one token per prompt."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    return unembed(model, at(hidden, last))


def unembed(model: LlamaForCausalLM, normed: Tensor) -> Tensor:
    """Logits, float32 [..., V], of the stream [..., D] after the final norm."""
    logits = model.lm_head(normed).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def project(attention: nn.Module, site: str, normed: Tensor) -> Tensor:
    """q, k or v [..., N or K, H] of the normed stream [..., D]."""
    x = _heads(attention, getattr(attention, f"{site}_proj")(normed))
    norm = getattr(attention, f"{site}_norm", None)
    return x if norm is None else norm(x)


def maker(attention: nn.Module, site: str) -> nn.Module:
    """The module whose output is q, k or v."""
    return getattr(attention, f"{site}_norm", None) or getattr(attention, f"{site}_proj")


def _watch(layer: nn.Module, site: str, see: Callable[[Tensor], None]):
    attention = layer.self_attn
    if site == "resid_pre":
        return layer.register_forward_pre_hook(lambda module, args: see(args[0]))
    if site == "attn_out":
        return attention.register_forward_hook(lambda module, args, output: see(output[0]))
    _check_site(site)
    if site == "z":
        return attention.o_proj.register_forward_pre_hook(lambda module, args: see(_heads(attention, args[0])))
    return maker(attention, site).register_forward_hook(lambda module, args, output: see(_heads(attention, output)))


def _change(attention: nn.Module, site: str, function: Edit):
    _check_site(site)

    def change(x: Tensor) -> Tensor:
        return function(_heads(attention, x)).reshape(x.shape)

    if site == "z":
        return attention.o_proj.register_forward_pre_hook(lambda module, args: (change(args[0]),))
    return maker(attention, site).register_forward_hook(lambda module, args, output: change(output))


@contextmanager
def _unshared(attention: nn.Module) -> Iterator[None]:
    """While active, each query head of the layer has keys and values of its own."""
    groups = attention.num_key_value_groups

    def repeat(module, args, output):
        return _heads(attention, output).repeat_interleave(groups, dim=-2).flatten(-2)

    handles = [projection.register_forward_hook(repeat) for projection in (attention.k_proj, attention.v_proj)]
    attention.num_key_value_groups = 1
    try:
        yield
    finally:
        attention.num_key_value_groups = groups
        for handle in handles:
            handle.remove()


def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    """Activations [B, T, N H], or with the heads on an axis already, as [B, T, N, H]."""
    return x.reshape(*x.shape[:2], -1, attention.head_dim)


def _check_site(site: str) -> None:
    if site not in HEAD_SITES:
        raise ValueError(f"Unknown site {site!r}; expected one of {', '.join(HEAD_SITES)}.")
