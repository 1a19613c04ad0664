"""`Study`: the models and prompts of a study, loaded when they are needed, and its results so far."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import convert
from jaxmech.ablation import AblatedValues
from jaxmech.circuits import Circuit, Head
from jaxmech.loading import Model, load
from jaxmech.sharding import make_mesh
from jaxmech.study.data import StudyData, kind_of_data
from jaxmech.study.models import Known, known
from jaxmech.study.settings import Settings
from jaxmech.study.unfinished import Unfinished

JSON = Any


class Study:
    """The models and prompts of a study, and its results so far.

    Attributes:
      settings: the study.
      results: {stage: {part: result}} of what is done.
      unfinished: pieces of the part that is being run.
    """

    def __init__(
        self,
        settings: Settings,
        results: Mapping[str, Mapping[str, JSON]],
        unfinished: Unfinished | None = None,
    ):
        self.settings, self.results = settings, results
        self.unfinished = unfinished or Unfinished()  # which keeps nothing
        self.means = lru_cache(maxsize=None)(self._means)
        self._models: dict[str, Model] = {}  # the one used last is the last
        self._mesh = None if settings.copies is None else make_mesh(rows=settings.copies)

    def model(self, name: str) -> Model:
        """The model of that name; others make room for it before it is loaded."""
        if name not in self._models:
            while len(self._models) >= self.settings.models_in_memory:
                del self._models[next(iter(self._models))]
            self._models[name] = self._load(name)
        self._models[name] = self._models.pop(name)
        return self._models[name]

    def loaded_first(self, names: Sequence[str]) -> list[str]:
        """These names, those of models that are loaded before those that are not."""
        return sorted(names, key=lambda name: name not in self._models)

    @cached_property
    def base(self) -> Known:
        """The base's config and tokenizer."""
        return known(self.settings.base, None, {})

    @cached_property
    def data(self) -> StudyData:
        """The prompts."""
        return kind_of_data(self.settings)(self.settings, self.base.tokenizer)

    def circuit(self, name: str) -> Circuit:
        """The circuit of a model: what minimality left of it."""
        groups = self.results["minimality"][name]["circuit"]
        return Circuit(heads_of(groups), self.results["discovery"][name]["roles"])

    def _load(self, name: str) -> Model:
        path = self.settings.paths[name]
        source, adapter = (self.settings.base, path) if convert.is_adapter(convert.local_path(path)) else (path, None)
        return load(source, self.settings.dtype, adapter, precision=self.settings.precision, mesh=self._mesh)

    def _means(self, name: str) -> AblatedValues:
        return self.data.means(self.model(name))


def heads_of(groups: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[Head]]:
    """{group: heads} of what was JSON."""
    return {group: [(layer, head) for layer, head in heads] for group, heads in groups.items()}
