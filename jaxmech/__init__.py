"""jaxmech: circuit discovery and activation patching for Llama-family models as jit-compiled JAX functions."""

from jaxmech import boxes, demo
from jaxmech.accuracy import accuracy
from jaxmech.config import Config, Rope
from jaxmech.discovery import PAPER_CHAIN, Circuit, Stage, discover, read_chain
from jaxmech.interventions import Interventions, Patch, head_weights
from jaxmech.loading import Model, load
from jaxmech.model import Llama
from jaxmech.pairs import Pairs
from jaxmech.path_patching import path_patch
from jaxmech.scores import PathScores

__all__ = [
    "PAPER_CHAIN",
    "Circuit",
    "Config",
    "Interventions",
    "Llama",
    "Model",
    "Pairs",
    "Patch",
    "PathScores",
    "Rope",
    "Stage",
    "accuracy",
    "boxes",
    "demo",
    "discover",
    "head_weights",
    "load",
    "path_patch",
    "read_chain",
]
