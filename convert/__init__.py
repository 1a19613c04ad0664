"""Hugging Face checkpoints to Flax parameters, tensor by tensor.

`read_config`, `read_params` and `read_tokenizer` read a checkpoint directory; `python -m convert` writes an Orbax
checkpoint from it. `write_hf` is the way back. PyTorch is imported only to read the files that it wrote.
"""

from convert.adapters import is_adapter
from convert.export import write_hf
from convert.hf_config import config_from_hf, read_config
from convert.hub import local_path
from convert.params import read_params
from convert.source_files import checkpoint_files, source_files
from convert.tokenizer import read_tokenizer

__all__ = [
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
