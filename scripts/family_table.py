"""Measures every family against transformers and prints the README's table of families.

    python scripts/family_table.py

Tiny models with random weights, every option of the family active (tests/hf_families.py), prompts longer than their
windows. float32: the largest difference of a logit from transformers' (eager attention), relative to the largest
logit. bfloat16: our mean distance from the float32 logits, relative to that of transformers in bfloat16.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from hf_families import HF_FAMILIES, family_model  # noqa: E402

import jaxmech as jm  # noqa: E402

HEADERS = (
    "family (`model_type`)",
    "what sets it apart; for Llama, models of the same architecture",
    "float32: largest difference of a logit from transformers'",
    "bfloat16: mean error of a logit, as a share of transformers'",
)
NAMES = {
    "llama": ("Llama 1 to 3.3", "Vicuna, Alpaca, CodeLlama, TinyLlama, SmolLM2, Yi, DeepSeek-LLM"),
    "mistral": ("Mistral", "sliding window"),
    "qwen2": ("Qwen2, Qwen2.5", "biases of q, k, v; windows in some layers"),
    "qwen3": ("Qwen3", "norm of each head's q and k"),
    "gemma": ("Gemma 1", "embedding scale, 1 + w norms, gelu"),
    "gemma2": ("Gemma 2", "and soft-caps, norms after attention and MLP, alternating windows"),
    "gemma3_text": (
        "Gemma 3",
        "norm of each head's q and k, another RoPE in windows; text alone of `gemma3`, from 4B on",
    ),
    "phi3": ("Phi-3, Phi-4-mini", "fused qkv and gate_up, window, longrope, partly rotated heads"),
    "olmo2": ("OLMo 2", "norms after attention and MLP alone, norm of all q and k"),
    "olmo3": ("OLMo 3", "and windows, RoPE scaled outside of them"),
    "smollm3": ("SmolLM3", "layers without RoPE"),
    "granite": ("Granite 3", "multipliers"),
}
TOKENS = np.random.default_rng(0).integers(0, 48, (8, 24))


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"| {' | '.join(HEADERS)} |")
    print("| --- | --- | ---: | ---: |")
    for family in HF_FAMILIES:
        difference, error = measured(family)
        name, features = NAMES[family]
        print(f"| {name} (`{family}`) | {features} | {difference:.0e} | {error:.2f} of theirs |")


def measured(family: str) -> tuple[float, float]:
    """The two numbers of a row."""
    with tempfile.TemporaryDirectory() as folder:
        family_model(family, dtype=torch.bfloat16).save_pretrained(folder)
        ours = {dtype: np.asarray(jm.load(folder, dtype)(TOKENS)[0]) for dtype in ("float32", "bfloat16")}
        theirs = {dtype: logits(folder, dtype) for dtype in ours}
    exact = theirs["float32"]
    difference = np.abs(ours["float32"] - exact).max() / np.abs(exact).max()
    errors = [np.abs(found["bfloat16"] - exact).mean() for found in (ours, theirs)]
    return float(difference), float(errors[0] / errors[1])


def logits(folder: str, dtype: str) -> np.ndarray:
    """transformers' logits of TOKENS."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


if __name__ == "__main__":
    main()
