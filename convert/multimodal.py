"""Checkpoints in which the decoder is one part of a multimodal model, such as Gemma 3 from 4B on.

Owns where the decoder's fields and tensors are in them; what belongs to images is left out. The rest of `convert` sees
a checkpoint of the decoder alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.json_files import Fields, refuse_unknown
from convert.tensors import Tensors


@dataclass(frozen=True)
class Multimodal:
    """A multimodal model_type.

    Attributes:
      architecture: its name in config.json.
      text: model_type of its decoder.
      fields: names in its config.json, beside the two parts, that concern images alone.
    """

    architecture: str
    text: str
    fields: frozenset[str]


MULTIMODAL = {
    "gemma3": Multimodal(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        frozenset("boi_token_index eoi_token_index image_token_index mm_tokens_per_image".split()),
    )
}
IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class Spelling(NamedTuple):
    """How names of the decoder's parts begin in the names of a multimodal model."""

    stack: str = "model."
    head: str = "lm_head."

    def ours(self, name: str) -> str:
        """A name of theirs as a decoder alone has it; of what is not the decoder's, the same."""
        return _moved(name, self, Spelling())

    def theirs(self, name: str) -> str:
        """A name of a decoder alone as they have it."""
        return _moved(name, Spelling(), self)


# As published, and as transformers has them in memory and some of its versions save them.
SPELLINGS = (Spelling("language_model.model.", "language_model.lm_head."), Spelling("model.language_model."))


def spelling_of(names: Iterable[str]) -> Spelling:
    """The spelling of the names of tensors or modules, that of a decoder alone if none is of a multimodal model."""
    names = list(names)
    return next((x for x in SPELLINGS if any(name.startswith(x.stack) for name in names)), Spelling())


def _moved(name: str, start: Spelling, to: Spelling) -> str:
    for old, new in zip(start, to, strict=True):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def text_fields(fields: Fields, ignored: Iterable[str]) -> Fields:
    """The decoder's fields of config.json; of a model that is a decoder alone, all.

    Args:
      ignored: fields without effect.

    Raises:
      ValueError: the model is multimodal, and has unknown fields, another decoder, or no fields of it.
    """
    whole = MULTIMODAL.get(fields.get("model_type") or "")
    if whole is None:
        return fields
    private = {name for name in fields if name.startswith("_")}
    parts = {"text_config", "vision_config", "tie_word_embeddings"}
    refuse_unknown(fields, {*ignored, *parts, *private, *whole.fields})
    if (found := fields.get("architectures") or [whole.architecture]) != [whole.architecture]:
        raise ValueError(f"architectures={found!r}; expected {[whole.architecture]!r}.")
    text = fields.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", whole.text) != whole.text:
        raise ValueError(f"text_config={text!r}; expected the fields of a decoder of model_type {whole.text!r}.")
    if text.get("final_logit_softcapping"):
        raise ValueError(
            f"final_logit_softcapping={text['final_logit_softcapping']!r} in text_config; expected null, since "
            "transformers caps the logits of the decoder alone, not of the multimodal model."
        )
    tied = fields.get("tie_word_embeddings", True)  # that of the decoder does not count
    return {**text, "tie_word_embeddings": tied, "model_type": whole.text, "architectures": None}


def is_decoder(family: str) -> bool:
    """Whether there are multimodal models with decoders of that family."""
    return family in {whole.text for whole in MULTIMODAL.values()}


def text_tensors(tensors: Tensors, family: str) -> Tensors:
    """The decoder's tensors, by the names that they have in a checkpoint of it alone."""
    spelling = spelling_of(tensors.names)
    return TextTensors(tensors, spelling) if is_decoder(family) and spelling != Spelling() else tensors


class TextTensors:
    """The decoder's tensors of a multimodal checkpoint; a `convert.tensors.Tensors`."""

    def __init__(self, tensors: Tensors, spelling: Spelling):
        self.path = tensors.path
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for name in tensors.names:
            if name.startswith(IMAGES):
                continue
            if (other := self._names.setdefault(spelling.ours(name), name)) != name:
                raise ValueError(f"{tensors.path} holds {other} and {name}, which mean the same; expected one of them.")

    @property
    def names(self) -> Iterable[str]:
        return self._names.keys()

    def file(self, name: str) -> Path:
        return self._tensors.file(self._names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._names[name])

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._tensors.read(self._names[name], rows)
