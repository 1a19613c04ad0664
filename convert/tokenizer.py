"""The Hugging Face tokenizer that lies beside a checkpoint's parameters."""

import warnings
from pathlib import Path
from typing import Any

from jaxmech.config import Config

HF_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE = "tokenizer.model"
PROBE = "The fig is in Box X. Box X contains the"
ADVICE = (
    "If a file is damaged, copy it again. Of a folder with tokenizer.model alone, SentencePiece files of Llama and "
    "Mistral can be read; add the tokenizer.json and tokenizer_config.json of the model's Hugging Face release to any "
    "other, such as Llama 3's."
)


def read_tokenizer(path: Path, config: Config, adapter: Path | None = None) -> Any:
    """The tokenizer saved in the folder `path`, or None if there is none. Runs no code of the checkpoint.

    Args:
      adapter: directory of an adapter; a tokenizer in it is preferred.

    Raises:
      ValueError: its files cannot be read, or its vocabulary is larger than the model's. Tokens that were added to it
        and that the model does not have are warned of.
    """
    path = Path(path if adapter is None or not _has_tokenizer(adapter) else adapter)
    if not _has_tokenizer(path):
        return None
    try:
        tokenizer = _read(path)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions
        raise ValueError(f"{path}: the tokenizer cannot be read ({error}). {ADVICE}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {config.vocab_size}. "
            "They belong to different models; copy the tokenizer that this model was trained with, or give jm.load it."
        )
    if beyond := {token: i for token, i in tokenizer.get_added_vocab().items() if i >= config.vocab_size}:
        warnings.warn(
            f"{path}: the tokenizer's added tokens {', '.join(beyond)} are beyond the model's vocabulary of "
            f"{config.vocab_size}; prompts that have them are refused.",
            stacklevel=4,
        )
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((Path(path) / name).is_file() for name in (*HF_FILES, SENTENCEPIECE))


def _read(path: Path) -> Any:
    from transformers import AutoTokenizer  # here, since importing transformers takes a second

    if any((path / name).is_file() for name in HF_FILES):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return _read_sentencepiece(path)


def _read_sentencepiece(path: Path) -> Any:
    """The tokenizer of a folder with tokenizer.model alone, such as Meta's releases of Llama 1 and 2.

    Nothing there says which class it is, and AutoTokenizer's guess leaves out BOS and the space before the first word.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    exact = SentencePieceProcessor()
    exact.Load(str(path / SENTENCEPIECE))
    tokenizer = LlamaTokenizer.from_pretrained(path, local_files_only=True, add_bos_token=True)
    found, expected = tokenizer(PROBE).input_ids, [exact.bos_id(), *exact.Encode(PROBE)]
    if found != expected:
        raise ValueError(f"read as Llama's, it turns {PROBE!r} into {found}, SentencePiece into {expected}")
    return tokenizer
