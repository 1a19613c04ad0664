"""Writes a Hugging Face model in PyTorch's files and in Meta's form, as `convert` reads them beside safetensors."""

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

COLUMNS = ("wo", "w2")  # Meta's matrices of which each part has some columns; of the others it has some rows
META_SIZES = {"intermediate_size": 88}  # 8/3 of the width 32, rounded up to a multiple of 8


def save_bin(model: LlamaForCausalLM, path: Path, shards: int = 1) -> None:
    """Writes config.json and pytorch_model.bin, or several shards and their index."""
    path.mkdir(parents=True)
    model.config.save_pretrained(path)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {
        name: f"pytorch_model-{i * shards // len(names) + 1:05}-of-{shards:05}.bin" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == shard}, path / shard)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_meta(model: LlamaForCausalLM, path: Path, parts: int = 1, embed_axis: int = 1, **params) -> None:
    """Writes params.json and consolidated.*.pth, every matrix split into `parts`, the embedding along `embed_axis`."""
    path.mkdir(parents=True)
    config = model.config
    fields = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": -1,
        "multiple_of": 8,
        "norm_eps": config.rms_norm_eps,
    }
    (path / "params.json").write_text(json.dumps(fields | params))
    whole = meta_tensors(model)
    for i in range(parts):
        held = {name: _part(name, tensor, i, parts, embed_axis) for name, tensor in whole.items()}
        torch.save(held, path / f"consolidated.{i:02}.pth")


def meta_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors by Meta's names, q and k with neighbouring dimensions rotated together.

    The inverse of `permute` in transformers' `convert_llama_weights_to_hf.py`.
    """

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    held = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
        "rope.freqs": model.model.rotary_emb.inv_freq,
    }
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        held |= {
            f"layers.{i}.attention.wq.weight": interleaved(attention.q_proj.weight, model.config.num_attention_heads),
            f"layers.{i}.attention.wk.weight": interleaved(attention.k_proj.weight, model.config.num_key_value_heads),
            f"layers.{i}.attention.wv.weight": attention.v_proj.weight,
            f"layers.{i}.attention.wo.weight": attention.o_proj.weight,
            f"layers.{i}.feed_forward.w1.weight": mlp.gate_proj.weight,
            f"layers.{i}.feed_forward.w2.weight": mlp.down_proj.weight,
            f"layers.{i}.feed_forward.w3.weight": mlp.up_proj.weight,
            f"layers.{i}.attention_norm.weight": layer.input_layernorm.weight,
            f"layers.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def _part(name: str, tensor: torch.Tensor, i: int, parts: int, embed_axis: int) -> torch.Tensor:
    if tensor.ndim == 1:
        return tensor
    axis = embed_axis if name.startswith("tok_embeddings") else int(name.split(".")[-2] in COLUMNS)
    return tensor.chunk(parts, dim=axis)[i].clone()
