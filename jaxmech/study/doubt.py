"""Whether a model does the task well enough for its circuit to mean anything."""

from collections.abc import Iterable

from jaxmech.boxes import Example

ABOVE_CHANCE = 0.1  # accuracy that a model must have over chance, a fraction


def chance(examples: Iterable[Example]) -> float:
    """Accuracy of naming any object of the scene, a fraction."""
    found = [1 / len(example.scene.labels) for example in examples]
    return sum(found) / len(found)


def doubt(name: str, accuracy: float, chance: float | None) -> str:
    """A warning if the accuracy is hardly above chance, or below; else "".

    All that follows measures what becomes of right answers: without any, scores, circuits and masks mean nothing.

    Args:
      name: the model's.
      accuracy: a fraction.
      chance: that of naming any object of the scene; None: of prompts of another task, as good as 0.
    """
    if accuracy >= (chance or 0) + ABOVE_CHANCE:
        return ""
    how = "no prompt" if accuracy == 0 else f"only {100 * accuracy:.1f} % of the prompts"
    any_object = "" if chance is None else f"; naming any object of the scene would be right for {100 * chance:.1f} %"
    return (
        f"{name} answers {how} right{any_object}. A model that cannot do the task has no circuit for it: do not rely "
        "on what is found in it. Are these its prompts, its tokenizer, and its BOS token (add_bos)?"
    )
