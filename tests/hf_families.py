"""The twelve families as tiny Hugging Face models with random weights, every option that sets a family apart active."""

import torch
import transformers
from hf_llama import SIZES
from transformers import AutoModelForCausalLM, PreTrainedModel

# model_type: its config class, and what it has beside SIZES. Windows are shorter than the prompts of the tests.
HF_FAMILIES = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "gemma": ("GemmaConfig", {"head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": 6}),
    "olmo2": ("Olmo2Config", {"pad_token_id": 0}),
    "olmo3": (
        "Olmo3Config",
        {
            "pad_token_id": 0,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "no_rope_layer_interval": 2,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
}


def family_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, noise: float = 0.1, **changes
) -> PreTrainedModel:
    """A model with eager attention. Biases and norm weights are random as well, so that a forgotten one shows.

    Args:
      family: model_type, a key of `HF_FAMILIES`.
      dtype: of the parameters; buffers (RoPE's frequencies) stay float32, as they do in `from_pretrained`.
      noise: standard deviation of what is added to every parameter.
      changes: further fields of the config.
    """
    torch.manual_seed(seed)
    name, own = HF_FAMILIES[family]
    config = getattr(transformers, name)(**SIZES | {"initializer_range": 0.2} | own | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape)
            parameter.data = parameter.data.to(dtype)
    return model
