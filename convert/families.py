"""Name tables: where each of our parameters comes from in a Hugging Face checkpoint, and how its axes map.

One table per layout; families whose tensors have the same names share one. Axes are written in the letters of
`jaxmech.model`; letters that stand together are one axis of the Hugging Face tensor, so "NH D" -> "D N H" reads: split
the first axis into heads, then transpose.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmech.config import Config


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor (per layer, if its name has {layer}) and the axes on both sides.

    Attributes:
      name: the tensor.
      theirs, ours: axes of the tensor, or of our part of it, and of our parameter.
      stacked: first axes of all parts, where several parameters are stacked in one tensor.
      part: which of them ours is.
    """

    name: str
    theirs: str
    ours: str
    stacked: tuple[str, ...] = ()
    part: int = 0

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{layer}" in self.name

    def names(self, config: Config) -> list[str]:
        """The checkpoint's tensors that make up one parameter: one a layer, or just one."""
        return [self.name.format(layer=i) for i in range(config.num_layers)] if self.per_layer else [self.name]

    def shape(self, config: Config) -> tuple[int, ...]:
        """Shape that each of them must have in the checkpoint."""
        first, *rest = (_size(config, axis) for axis in self.theirs.split())
        return (sum(_size(config, axis) for axis in self.stacked) or first, *rest)

    def rows(self, config: Config) -> slice | None:
        """The part of the tensor's first axis that is ours; None: all of it."""
        if not self.stacked:
            return None
        start = sum(_size(config, axis) for axis in self.stacked[: self.part])
        return slice(start, start + _size(config, self.stacked[self.part]))

    def in_their_axes(self, config: Config, value: Any) -> Any:
        """Our parameter (of one layer), a NumPy or JAX array, with one axis for each letter of theirs.

        Of a NumPy array it is a view: what is written to it is written to the parameter.
        """
        sizes, ours, theirs = axis_sizes(config), self.ours.replace(" ", ""), self.theirs.replace(" ", "")
        return value.reshape([sizes[letter] for letter in ours]).transpose([ours.index(letter) for letter in theirs])

    def rows_per_step(self, config: Config) -> int:
        """How many rows of the checkpoint's tensor one step along the first of those axes is."""
        return _size(config, self.theirs.split()[0][1:])

    def to_theirs(self, config: Config, value: Any) -> Any:
        """Our parameter (of one layer), a NumPy or JAX array, as our part of the checkpoint's tensor."""
        return self.in_their_axes(config, value).reshape([_size(config, axis) for axis in self.theirs.split()])


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of each axis letter; h and r are the two axes into which Meta's layout splits H."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
        "h": config.head_dim // 2,
        "r": 2,
    }


def _size(config: Config, axis: str) -> int:
    """Size of an axis that one or more letters name."""
    sizes = axis_sizes(config)
    return math.prod(sizes[letter] for letter in axis)


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

LLAMA = {
    "embed": Source("model.embed_tokens.weight", "V D", "V D"),
    "final_norm": Source("model.norm.weight", "D", "D"),
    "unembed": Source("lm_head.weight", "V D", "D V"),
    "attn_norm": Source(_LAYER + "input_layernorm.weight", "D", "D"),
    "q": Source(_ATTENTION + "q_proj.weight", "NH D", "D N H"),
    "k": Source(_ATTENTION + "k_proj.weight", "KH D", "D K H"),
    "v": Source(_ATTENTION + "v_proj.weight", "KH D", "D K H"),
    "o": Source(_ATTENTION + "o_proj.weight", "D NH", "N H D"),
    "q_bias": Source(_ATTENTION + "q_proj.bias", "NH", "N H"),
    "k_bias": Source(_ATTENTION + "k_proj.bias", "KH", "K H"),
    "v_bias": Source(_ATTENTION + "v_proj.bias", "KH", "K H"),
    "o_bias": Source(_ATTENTION + "o_proj.bias", "D", "D"),
    "mlp_norm": Source(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "gate": Source(_MLP + "gate_proj.weight", "F D", "D F"),
    "up": Source(_MLP + "up_proj.weight", "F D", "D F"),
    "down": Source(_MLP + "down_proj.weight", "D F", "F D"),
    "gate_bias": Source(_MLP + "gate_proj.bias", "F", "F"),
    "up_bias": Source(_MLP + "up_proj.bias", "F", "F"),
    "down_bias": Source(_MLP + "down_proj.bias", "D", "D"),
}
_HEAD_NORMS = {
    "q_norm": Source(_ATTENTION + "q_norm.weight", "H", "H"),
    "k_norm": Source(_ATTENTION + "k_norm.weight", "H", "H"),
}
QWEN3 = LLAMA | _HEAD_NORMS
_POST_NORMS = {
    "attn_post_norm": Source(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "mlp_post_norm": Source(_LAYER + "post_feedforward_layernorm.weight", "D", "D"),
}
GEMMA2 = LLAMA | _POST_NORMS | {"mlp_norm": Source(_LAYER + "pre_feedforward_layernorm.weight", "D", "D")}
GEMMA3 = GEMMA2 | _HEAD_NORMS
OLMO2 = (
    LLAMA
    | _POST_NORMS
    | {
        "q_norm": Source(_ATTENTION + "q_norm.weight", "NH", "N H"),
        "k_norm": Source(_ATTENTION + "k_norm.weight", "KH", "K H"),
    }
)
_QKV, _GATE_UP = ("NH", "KH", "KH"), ("F", "F")
PHI3 = LLAMA | {
    "q": Source(_ATTENTION + "qkv_proj.weight", "NH D", "D N H", _QKV, 0),
    "k": Source(_ATTENTION + "qkv_proj.weight", "KH D", "D K H", _QKV, 1),
    "v": Source(_ATTENTION + "qkv_proj.weight", "KH D", "D K H", _QKV, 2),
    "gate": Source(_MLP + "gate_up_proj.weight", "F D", "D F", _GATE_UP, 0),
    "up": Source(_MLP + "gate_up_proj.weight", "F D", "D F", _GATE_UP, 1),
}
# Meta's own release of Llama (`consolidated.*.pth`). Its RoPE rotates neighbouring dimensions, ours those H/2 apart.
META = {
    "embed": Source("tok_embeddings.weight", "V D", "V D"),
    "final_norm": Source("norm.weight", "D", "D"),
    "unembed": Source("output.weight", "V D", "D V"),
    "attn_norm": Source("layers.{layer}.attention_norm.weight", "D", "D"),
    "q": Source("layers.{layer}.attention.wq.weight", "Nhr D", "D N rh"),
    "k": Source("layers.{layer}.attention.wk.weight", "Khr D", "D K rh"),
    "v": Source("layers.{layer}.attention.wv.weight", "KH D", "D K H"),
    "o": Source("layers.{layer}.attention.wo.weight", "D NH", "N H D"),
    "mlp_norm": Source("layers.{layer}.ffn_norm.weight", "D", "D"),
    "gate": Source("layers.{layer}.feed_forward.w1.weight", "F D", "D F"),
    "up": Source("layers.{layer}.feed_forward.w3.weight", "F D", "D F"),
    "down": Source("layers.{layer}.feed_forward.w2.weight", "D F", "F D"),
}
TABLES: dict[str, Mapping[str, Source]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "smollm3": LLAMA,
    "granite": LLAMA,
}

# Buffers that old checkpoints carry; the model computes them anew.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", "rope.freqs")


def source(path: tuple[str, ...], table: Mapping[str, Source]) -> Source:
    """The source of the parameter at `path` in the tree, such as ("embed",) or ("blocks", "q")."""
    return table[path[-1]]
