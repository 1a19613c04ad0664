"""Names of models on the Hugging Face Hub to directories: downloads, once, the files that are needed and no code."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILES = (
    "config.json",
    "params.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
OTHERS = ("*/*", "consolidated*.safetensors")  # the same tensors in other forms
# If there are no safetensors, PyTorch's files; if there are none of those either, Meta's.
OLDER = (("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"), ("consolidated.*.pth",))


def local_path(name: str | Path, revision: str | None = None) -> Path:
    """The directory that `name` means: a local path if it exists, else a model on the Hub, "organisation/model".

    What is downloaded goes to Hugging Face's own cache and is read from there the next time, also without a network.

    Args:
      name: of a directory, or of a model on the Hub.
      revision: branch, tag or commit of a model on the Hub; None: its main branch.

    Returns:
      The directory; `name` itself if it is neither, for the reader to say that it is not there.

    Raises:
      FileNotFoundError: the Hub has no such model, or none that may be read without a login.
      OSError: the Hub cannot be reached, or the download was cut off.
      ValueError: a revision of what is no model on the Hub.
    """
    path = Path(name)
    if path.exists() or not NAME.fullmatch(str(name)):
        if revision is not None:
            raise ValueError(f"revision={revision!r}, but {path} is no model on the Hub; only those have revisions.")
        return path
    directory, weights = _download(str(name), revision, FILES), ("*.safetensors",)
    for older in OLDER:
        if not any(any(directory.glob(pattern)) for pattern in weights):
            directory, weights = _download(str(name), revision, (*FILES, *older)), older
    return directory


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The directory of a model on the Hub with the files that the patterns name."""
    missing = f"No directory at {name}, and"
    elsewhere = f"download it elsewhere (hf download {name} --local-dir DIR) and give that directory."
    try:
        patterns_of = {"allow_patterns": list(patterns), "ignore_patterns": list(OTHERS)}
        return Path(snapshot_download(name, revision=revision, **patterns_of))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{missing} the model of this name on the Hugging Face Hub is open only to those who have accepted its "
            f"terms. Do that at https://huggingface.co/{name} and log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing} no model of this name on the Hugging Face Hub. Check the name; if the model is private, log in "
            "with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The model {name} on the Hugging Face Hub has no revision {revision!r}; give one of its branches, tags or "
            "commits."
        ) from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{missing} the Hugging Face Hub cannot be reached, nor is a model of this name in its cache "
            f"({str(error).splitlines()[0]}). Connect to a network, or {elsewhere}"
        ) from error
    except Exception as error:  # the Hub's client raises those of its HTTP library, too
        raise OSError(
            f"{missing} the model of this name cannot be downloaded from the Hugging Face Hub ({error!r}). Try again, "
            f"or {elsewhere}"
        ) from error
