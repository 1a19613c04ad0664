"""`Study`: the models and prompts of a study, loaded when they are needed, and its results so far."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

import convert
from jaxmech.circuits import mean_activations
from jaxmech.discovery import Circuit, Head
from jaxmech.loading import Model, load
from jaxmech.sharding import make_mesh
from jaxmech.study.data import StudyData
from jaxmech.study.settings import Settings

JSON = Any


class Study:
    """The models and prompts of a study, and its results so far.

    Attributes:
      settings: the study.
      results: {stage: {part: result}} of what is done.
    """

    def __init__(self, settings: Settings, results: Mapping[str, Mapping[str, JSON]]):
        self.settings, self.results = settings, results
        self.model = lru_cache(maxsize=settings.models_in_memory)(self._load)
        self.means = lru_cache(maxsize=None)(self._means)
        self.mesh = None if settings.copies is None else make_mesh(rows=settings.copies)

    @cached_property
    def data(self) -> StudyData:
        """The prompts."""
        return StudyData(self.settings, self.model(self.settings.names[0]).tokenizer)

    def circuit(self, name: str) -> Circuit:
        """The circuit of a model: what minimality left of it."""
        groups = self.results["minimality"][name]["circuit"]
        return Circuit(heads_of(groups), self.results["discovery"][name]["roles"])

    def _load(self, name: str) -> Model:
        path = self.settings.paths[name]
        source, adapter = (self.settings.base, path) if convert.is_adapter(path) else (path, None)
        model = load(source, self.settings.dtype, adapter, precision=self.settings.precision, mesh=self.mesh)
        if model.tokenizer is None:
            raise ValueError(f"{path} holds no tokenizer; copy tokenizer.json or tokenizer.model there.")
        if name != self.settings.names[0]:
            _check_same_tokens(self.data, model, path)
        return model

    def _means(self, name: str) -> np.ndarray:
        return mean_activations(self.model(name), self.data.contexts)


def heads_of(groups: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[Head]]:
    """{group: heads} of what was JSON."""
    return {group: [(layer, head) for layer, head in heads] for group, heads in groups.items()}


def _check_same_tokens(data: StudyData, model: Model, path) -> None:
    """ValueError if the model's tokenizer does not read the study's prompts as the base's does."""
    text = data.example
    ours, theirs = (tokenizer(text).input_ids for tokenizer in (data.tokenizer, model.tokenizer))
    if ours != theirs:
        raise ValueError(
            f"The tokenizer of {path} reads {text!r} as {theirs}, the base model's as {ours}; models of a study must "
            "share one tokenizer."
        )
