"""Activations of transformers' own models: where each of our sites lies in their modules, and runs that capture them.

The only module of this package that needs torch, which it imports when it is called. What is compared with what, and
how closely, is said in `jaxmech.verify`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where a decoder layer of transformers holds a site.

    Attributes:
      module: name within the layer; "" is the layer itself.
      side: "input" or "output" of that module.
      item: which of several outputs.
      heads: "q", "k" or "v" where the projections of all three are one (Phi-3).
      heads_first: its axes are [B, N, T, H] (Gemma 3).
      multiplied: the layer multiplies it by residual_multiplier before it adds it (Granite).
    """

    module: str
    side: str = "output"
    item: int = 0
    heads: str | None = None
    heads_first: bool = False
    multiplied: bool = False


LLAMA = {
    "resid_pre": Place("", "input"),
    "q": Place("self_attn.q_proj"),
    "k": Place("self_attn.k_proj"),
    "v": Place("self_attn.v_proj"),
    "pattern": Place("self_attn", item=1),
    "z": Place("self_attn.o_proj", "input"),
    "attn_out": Place("self_attn"),
    "resid_mid": Place("post_attention_layernorm", "input"),
    "mlp_out": Place("mlp"),
    "resid_post": Place(""),
}
NORMED = {"q": Place("self_attn.q_norm"), "k": Place("self_attn.k_norm")}
POST_NORMED = {"attn_out": Place("post_attention_layernorm"), "mlp_out": Place("post_feedforward_layernorm")}
PLACES: dict[str, Mapping[str, Place]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | NORMED,
    "gemma": LLAMA,
    "gemma2": LLAMA | POST_NORMED | {"resid_mid": Place("pre_feedforward_layernorm", "input")},
    "gemma3_text": LLAMA
    | {site: Place(f"self_attn.{site}_norm", heads_first=True) for site in ("q", "k")}
    | POST_NORMED
    | {"resid_mid": Place("pre_feedforward_layernorm", "input")},
    "phi3": LLAMA | {site: Place("self_attn.qkv_proj", heads=site) for site in ("q", "k", "v")},
    "olmo2": LLAMA | NORMED | POST_NORMED | {"resid_mid": Place("mlp", "input")},
    "olmo3": LLAMA | NORMED | POST_NORMED | {"resid_mid": Place("mlp", "input")},
    "smollm3": LLAMA,
    "granite": LLAMA | {"attn_out": Place("self_attn", multiplied=True), "mlp_out": Place("mlp", multiplied=True)},
}


def load_hf(path: Path, dtype: str, rounded_to: str | None = None) -> Any:
    """transformers' model of the checkpoint directory `path`, with eager attention. Runs no code of the checkpoint.

    Args:
      dtype: of parameters and activations.
      rounded_to: a narrower dtype, to which parameters are rounded before they are taken in `dtype`.

    Raises:
      ValueError: transformers cannot load it, or would fill in some of its parameters at random.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "eager"}
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
    except Exception as error:  # it raises errors of many kinds
        raise ValueError(f"transformers cannot load {path} ({str(error)[:300]}); copy its files again.") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} tensors, {missing[0]} the first; transformers would fill them in at random. "
            "Copy all files of the checkpoint."
        )
    if rounded_to is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, rounded_to)).to(parameter.dtype)
    return model.eval()


def has_sdpa(model: Any) -> bool:
    """Whether the model can attend by `scaled_dot_product_attention`; Gemma 2, which caps scores, cannot."""
    return bool(model._supports_sdpa)


def activations(model: Any, tokens: np.ndarray, attention: str = "eager") -> dict[str, np.ndarray]:
    """Runs `tokens` [B, T] and returns logits [B, T, V] and every site [L, B, T, ...], float32, with our axes.

    Args:
      attention: "eager" or "sdpa"; the latter forms no pattern, so that this site is absent.
    """
    import torch  # pyright: ignore[reportMissingImports]

    model.set_attn_implementation(attention)
    places = {
        site: place
        for site, place in PLACES[_decoder(model).config.model_type].items()
        if site != "pattern" or attention == "eager"
    }
    kept: dict[str, list[np.ndarray]] = {site: [] for site in places}
    with ExitStack() as stack, torch.no_grad():
        for layer in _decoder(model).layers:
            for site, place in places.items():
                stack.callback(_hook(layer, site, place, kept[site].append).remove)
        logits = model(torch.tensor(tokens, dtype=torch.int64), use_cache=False).logits
    return {site: np.stack(layers) for site, layers in kept.items()} | {"logits": logits.float().numpy()}


def rotation(model: Any, layer: int, length: int) -> tuple[np.ndarray, float]:
    """Frequencies [H/2] of a layer's RoPE in a prompt of that many tokens, and its factor of cos and sin."""
    import torch  # pyright: ignore[reportMissingImports]

    decoder = _decoder(model)
    rotary = copy.deepcopy(decoder.rotary_emb)  # a long prompt changes its state
    several = hasattr(rotary, "layer_types")  # one for each kind of layer
    kind = [decoder.config.layer_types[layer]] if several else []
    rotary(torch.zeros(1), torch.tensor([[0, length - 1]]), *kind)
    frequency, factor = ("_".join([*kind, name]) for name in ("inv_freq", "attention_scaling"))
    return getattr(rotary, frequency).float().numpy(), float(getattr(rotary, factor))


def _decoder(model: Any) -> Any:
    """The stack of layers, which in multimodal models is one part of the model."""
    return getattr(model.model, "language_model", model.model)


def _hook(layer: Any, site: str, place: Place, keep: Callable[[np.ndarray], None]) -> Any:
    """Has the layer hand `site` to `keep` whenever it runs; returns the handle that ends this."""
    module = layer.get_submodule(place.module)
    factor = layer.residual_multiplier if place.multiplied else None

    def taken(value: Any) -> None:
        value = value[place.item] if isinstance(value, tuple) else value
        value = value if factor is None else value * factor
        keep(_our_axes(layer.self_attn, site, place, value.float().numpy()))

    if place.side == "input":
        return module.register_forward_pre_hook(lambda _, inputs: taken(inputs))
    return module.register_forward_hook(lambda _, inputs, output: taken(output))


def _our_axes(attention: Any, site: str, place: Place, x: np.ndarray) -> np.ndarray:
    """[B, T, N, H] of q, k, v and z, k and v repeated for each query head; [B, T, N, S] of the pattern."""
    if site == "pattern":
        return x.swapaxes(1, 2)
    if site not in ("q", "k", "v", "z"):
        return x
    x = x.swapaxes(1, 2) if place.heads_first else x.reshape(*x.shape[:2], -1, attention.head_dim)
    num_heads, num_kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    if place.heads is not None:
        x = x[:, :, _rows(place.heads, num_heads, num_kv_heads)]
    return x.repeat(num_heads // num_kv_heads, axis=2) if site in ("k", "v") else x


def _rows(part: str, num_heads: int, num_kv_heads: int) -> slice:
    """The heads of q, k or v among those of all three."""
    first = {"q": 0, "k": num_heads, "v": num_heads + num_kv_heads}[part]
    return slice(first, first + (num_heads if part == "q" else num_kv_heads))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing progress and warnings; what is wrong is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
