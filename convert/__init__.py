"""Hugging Face checkpoints to Flax parameters, tensor by tensor.

`read_config` and `read_params` read a checkpoint directory; `python -m convert` writes an Orbax checkpoint from it. `write_hf` is the way back.
Never imports torch.
"""

from convert.export import write_hf
from convert.hf_config import config_from_hf, read_config
from convert.hf_tensors import read_params

__all__ = ["config_from_hf", "read_config", "read_params", "write_hf"]
