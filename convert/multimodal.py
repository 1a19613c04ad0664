"""Checkpoints in which the decoder is one part of a multimodal model, such as Gemma 3 from 4B on.

Owns where the decoder's fields and tensors are in them; what belongs to images is left out. The rest of `convert` sees
a checkpoint of the decoder alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
# Beginnings of names, as published and as some versions of transformers save them, and what the decoder alone has.
RENAMED = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


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
    tied = {"tie_word_embeddings": fields["tie_word_embeddings"]} if "tie_word_embeddings" in fields else {}
    return {**text, **tied, "model_type": whole.text, "architectures": None}


def text_tensors(tensors: Tensors, family: str) -> Tensors:
    """The decoder's tensors, by the names that they have in a checkpoint of it alone."""
    multimodal = family in {whole.text for whole in MULTIMODAL.values()}
    found = multimodal and any(name.startswith((*IMAGES, *RENAMED)) for name in tensors.names)
    return TextTensors(tensors) if found else tensors


class TextTensors:
    """The decoder's tensors of a multimodal checkpoint; a `convert.tensors.Tensors`."""

    def __init__(self, tensors: Tensors):
        self.path = tensors.path
        self._tensors = tensors
        self._names = {_renamed(name): name for name in tensors.names if not name.startswith(IMAGES)}

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


def _renamed(name: str) -> str:
    for start, other in RENAMED.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name
