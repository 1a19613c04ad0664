"""The Hugging Face tokenizer that lies beside a checkpoint's parameters."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxmech.config import Config

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def read_tokenizer(path: Path, config: Config, adapter: Path | None = None) -> Any:
    """The tokenizer saved in the folder `path`, or None if there is none. Runs no code of the checkpoint.

    Args:
      adapter: directory of an adapter; a tokenizer in it is preferred.

    Raises:
      ValueError: its files cannot be read, or it has more tokens than the model.
    """
    path = Path(path if adapter is None or not _has_tokenizer(adapter) else adapter)
    if not _has_tokenizer(path):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions
        raise ValueError(f"{path}: the tokenizer cannot be read ({error}); copy its files again.") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}. They "
            "belong to different models; copy the tokenizer that this model was trained with."
        )
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((Path(path) / name).is_file() for name in FILES)
