"""jaxmech: circuit discovery and activation patching for Llama-family models as jit-compiled JAX functions."""

from jaxmech.config import Config, Rope
from jaxmech.interventions import Interventions, Patch, head_weights
from jaxmech.loading import Model, load
from jaxmech.model import Llama
from jaxmech.pairs import Pairs

__all__ = ["Config", "Interventions", "Llama", "Model", "Pairs", "Patch", "Rope", "head_weights", "load"]
