"""jaxmech: circuit discovery and activation patching for Llama-family models as jit-compiled JAX functions."""

from jaxmech import boxes, dcm, demo
from jaxmech.ablation import RoleMeans, mean_activations, resampled_activations, role_means
from jaxmech.accuracy import accuracy, predict
from jaxmech.chain import PAPER_CHAIN, Stage, read_chain
from jaxmech.circuits import Circuit, overlap
from jaxmech.cmap import cmap
from jaxmech.collected import HeadValues, collect
from jaxmech.config import Config, Rope
from jaxmech.criteria import (
    Completeness,
    Faithfulness,
    Minimality,
    completeness,
    faithfulness,
    minimality,
    random_circuit,
)
from jaxmech.discovery import discover
from jaxmech.evaluation import evaluate
from jaxmech.head_sweep import HeadSweep, cmap_heads
from jaxmech.interventions import Interventions, Patch, head_weights
from jaxmech.knockout import knockout, random_target
from jaxmech.loading import Model, load
from jaxmech.model import Llama
from jaxmech.pairs import Pairs
from jaxmech.patching import patch_activations
from jaxmech.path_patching import path_patch
from jaxmech.predictions import Predictions
from jaxmech.provenance import versions
from jaxmech.run_folder import read_scores
from jaxmech.scores import PathScores
from jaxmech.sharding import make_mesh, parameter_shardings
from jaxmech.text_pairs import read_pairs

__version__ = versions(["jaxmech"])["jaxmech"]  # "unknown" when run from sources that are not installed

__all__ = [
    "PAPER_CHAIN",
    "Circuit",
    "Completeness",
    "Config",
    "Faithfulness",
    "HeadSweep",
    "HeadValues",
    "Interventions",
    "Llama",
    "Minimality",
    "Model",
    "Pairs",
    "Patch",
    "PathScores",
    "Predictions",
    "RoleMeans",
    "Rope",
    "Stage",
    "accuracy",
    "boxes",
    "cmap",
    "cmap_heads",
    "collect",
    "completeness",
    "dcm",
    "demo",
    "discover",
    "evaluate",
    "faithfulness",
    "head_weights",
    "knockout",
    "load",
    "make_mesh",
    "mean_activations",
    "minimality",
    "overlap",
    "parameter_shardings",
    "patch_activations",
    "path_patch",
    "predict",
    "random_circuit",
    "random_target",
    "read_chain",
    "read_pairs",
    "read_scores",
    "resampled_activations",
    "role_means",
]
