"""Hugging Face checkpoints to Flax parameters, tensor by tensor.

`read_config`, `read_params` and `read_tokenizer` read a checkpoint directory; `check_weights` says beforehand whether
its tensors are those that its config calls for. `python -m convert` writes an Orbax checkpoint from it, and `write_hf`
is the way back. PyTorch is imported only to read the files that it wrote.
"""

from convert.adapters import is_adapter
from convert.export import write_hf
from convert.hf_config import config_from_hf, read_config
from convert.hub import local_path
from convert.params import check_weights, read_params
from convert.source_files import checkpoint_files, source_files
from convert.tokenizer import read_tokenizer

__all__ = [
    "check_weights",
    "checkpoint_files",
    "config_from_hf",
    "is_adapter",
    "local_path",
    "read_config",
    "read_params",
    "read_tokenizer",
    "source_files",
    "write_hf",
]
