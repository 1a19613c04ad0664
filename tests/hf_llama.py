"""Tiny Hugging Face Llama models with random weights: what the tests of parity and of conversion start from."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {  # of Llama 3.1
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "head_dim independent of width": {"head_dim": 12},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 RoPE": {
        "head_dim": 32,  # enough frequencies that some are kept, some interpolated and some divided
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3,
    },
}


def hf_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A model with eager attention. Biases and norm weights are random as well, so that a forgotten one shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, "initializer_range": 0.2, **changes}, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype)
