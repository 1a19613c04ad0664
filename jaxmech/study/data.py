"""The prompts of a study: of the boxes task, or pairs of another one."""

from typing import Any

from jaxmech.study import boxes_data, pairs_data
from jaxmech.study.settings import Settings

StudyData = boxes_data.BoxesData | pairs_data.PairsData


def data_of(settings: Settings, tokenizer: Any) -> StudyData:
    """The prompts that the settings name, for one tokenizer."""
    kind = boxes_data.BoxesData if settings.pairs is None else pairs_data.PairsData
    return kind(settings, tokenizer)


def sample_of(settings: Settings) -> list[str]:
    """Some of them as text, to compare tokenizers."""
    return (boxes_data if settings.pairs is None else pairs_data).sample(settings)
