"""LoRA adapters that PEFT saved, merged into the tensors of their base while those are read.

An adapter replaces tensors of its base (`modules_to_save`, biases, embeddings of another vocabulary) and adds to others
the product of two thin matrices (Hu et al. 2021, arXiv:2106.09685). `config` reads what it says of itself, `files`
sorts its tensors, `fit` checks that it is one for this base, `merging` merges.
"""

from convert.adapters.config import is_adapter
from convert.adapters.files import Adapter
from convert.adapters.merging import AdaptedTensors

__all__ = ["AdaptedTensors", "Adapter", "is_adapter"]
