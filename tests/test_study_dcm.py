"""Which masks a study trains together, and what it goes on with when that is interrupted."""

import dataclasses
from importlib import import_module

import pytest
from small_study import SETTINGS

import jaxmech as jm
from jaxmech.study import STAGES, StudyFolder
from jaxmech.study.study import Study


class Trainings:
    """What DCM would train, (groups, desiderata) each, in place of `_train`; of its groups, "lookup" carries position.

    Attributes:
      breaks_off: whether it is interrupted in the variants.
    """

    CIRCUIT = jm.Circuit(
        {"fetchers": [(0, 0)], "lookup": [(0, 1)], "more": [(0, 2)]},
        {"fetchers": "last", "lookup": "query_box", "more": "query_box"},
    )
    ACCURACY = {"fetchers": (0.9, 0.1), "lookup": (0.2, 0.3), "more": (0.1, 0.2)}  # validation and test

    def __init__(self):
        self.calls, self.breaks_off = [], False

    def __call__(self, study, part, circuit, groups, names, progress):
        if self.breaks_off and len(groups) == 1:
            raise KeyboardInterrupt
        self.calls.append((tuple(groups), tuple(names)))
        one = {group: dict(zip(("validation", "test"), self.ACCURACY[group], strict=True)) for group in groups}
        return {group: {name: one[group] for name in names} for group in groups}


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    found = Trainings()
    monkeypatch.setattr(import_module("jaxmech.study.dcm_stages"), "_train", found)
    monkeypatch.setattr(Study, "circuit", lambda study, name: found.CIRCUIT)
    return found


def test_variants_are_trained_for_the_group_that_carries_position_best(trainings):
    """The best on test pairs, not on those by which masks were selected."""
    study = Study(dataclasses.replace(SETTINGS, variants=True), {})
    found = STAGES["dcm"].run(study, "base", lambda done, total: None)
    assert list(found) == list(trainings.ACCURACY) and set(found["lookup"]) == set(jm.boxes.DESIDERATA)
    (groups, main), (best, variants) = trainings.calls
    assert groups == tuple(found) and best == ("lookup",)
    assert all(set(found[group]) == set(main) for group in ("fetchers", "more")) and set(main).isdisjoint(variants)


def test_dcm_that_is_interrupted_in_the_variants_goes_on_with_them(trainings, tmp_path):
    settings = dataclasses.replace(SETTINGS, variants=True)
    trainings.breaks_off = True
    with pytest.raises(KeyboardInterrupt):
        STAGES["dcm"].run(Study(settings, {}, StudyFolder.open(tmp_path, settings).unfinished), "base", lambda *_: None)
    trainings.breaks_off = False
    again = Study(settings, {}, StudyFolder.open(tmp_path, settings).unfinished)
    found = STAGES["dcm"].run(again, "base", lambda *_: None)
    assert [groups for groups, _ in trainings.calls] == [("fetchers", "lookup", "more"), ("lookup",)]
    assert set(found["lookup"]) == set(jm.boxes.DESIDERATA)
