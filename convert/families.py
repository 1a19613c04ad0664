"""Name tables: where each of our parameters comes from in a Hugging Face checkpoint, and how its axes map.

One table per family. Axes are written in the letters of `jaxmech.model`; letters that stand together are one axis of
the Hugging Face tensor, so "NH D" -> "D N H" reads: split the first axis into heads, then transpose.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxmech.config import Config


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor (per layer, if its name has {layer}) and the axes on both sides."""

    name: str
    theirs: str
    ours: str

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{layer}" in self.name

    def names(self, config: Config) -> list[str]:
        """The checkpoint's tensors that make up one parameter: one a layer, or just one."""
        return [self.name.format(layer=i) for i in range(config.num_layers)] if self.per_layer else [self.name]

    def shape(self, config: Config) -> tuple[int, ...]:
        """Shape that each of them must have in the checkpoint."""
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.theirs.split())

    def to_ours(self, config: Config, tensor: np.ndarray) -> np.ndarray:
        """The tensor with our axes, without copying it."""
        sizes, letters = axis_sizes(config), self.theirs.replace(" ", "")
        split = tensor.reshape([sizes[letter] for letter in letters])
        return split.transpose([letters.index(letter) for letter in self.ours.split()])

    def to_theirs(self, config: Config, value: np.ndarray) -> np.ndarray:
        """Our parameter (of one layer) as the checkpoint's tensor, contiguous."""
        ours = self.ours.split()
        letters = self.theirs.replace(" ", "")
        value = value.transpose([ours.index(letter) for letter in letters])
        return np.ascontiguousarray(value.reshape(self.shape(config)))


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of each axis letter."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
    }


TOP = {
    "embed": Source("model.embed_tokens.weight", "V D", "V D"),
    "final_norm": Source("model.norm.weight", "D", "D"),
    "unembed": Source("lm_head.weight", "V D", "D V"),
}

_LAYER = "model.layers.{layer}."
BLOCKS = {
    "attn_norm": Source(_LAYER + "input_layernorm.weight", "D", "D"),
    "q": Source(_LAYER + "self_attn.q_proj.weight", "NH D", "D N H"),
    "k": Source(_LAYER + "self_attn.k_proj.weight", "KH D", "D K H"),
    "v": Source(_LAYER + "self_attn.v_proj.weight", "KH D", "D K H"),
    "o": Source(_LAYER + "self_attn.o_proj.weight", "D NH", "N H D"),
    "q_bias": Source(_LAYER + "self_attn.q_proj.bias", "NH", "N H"),
    "k_bias": Source(_LAYER + "self_attn.k_proj.bias", "KH", "K H"),
    "v_bias": Source(_LAYER + "self_attn.v_proj.bias", "KH", "K H"),
    "o_bias": Source(_LAYER + "self_attn.o_proj.bias", "D", "D"),
    "mlp_norm": Source(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "gate": Source(_LAYER + "mlp.gate_proj.weight", "F D", "D F"),
    "up": Source(_LAYER + "mlp.up_proj.weight", "F D", "D F"),
    "down": Source(_LAYER + "mlp.down_proj.weight", "D F", "F D"),
    "gate_bias": Source(_LAYER + "mlp.gate_proj.bias", "F", "F"),
    "up_bias": Source(_LAYER + "mlp.up_proj.bias", "F", "F"),
    "down_bias": Source(_LAYER + "mlp.down_proj.bias", "D", "D"),
}

# Buffers that old checkpoints carry; the model computes them anew.
IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)


def source(path: tuple[str, ...]) -> Source:
    """The source of the parameter at `path` in the tree, such as ("embed",) or ("blocks", "q")."""
    return BLOCKS[path[1]] if path[0] == "blocks" else TOP[path[0]]
