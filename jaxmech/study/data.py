"""The prompts of a study: of the boxes task, or pairs of another one."""

from jaxmech.study.boxes_data import BoxesData
from jaxmech.study.pairs_data import PairsData
from jaxmech.study.settings import Settings

StudyData = BoxesData | PairsData


def kind_of_data(settings: Settings) -> type[BoxesData] | type[PairsData]:
    """Which kind of prompts the settings name."""
    return BoxesData if settings.pairs is None else PairsData
