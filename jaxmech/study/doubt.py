"""Whether a model does the task well enough for its circuit to mean anything."""

from collections.abc import Iterable

from jaxmech.boxes import Example
from jaxmech.metrics import ACCURACY

# What a model must have over chance: of accuracies and probabilities, a fraction; of logit differences, in nats.
ABOVE_CHANCE = {ACCURACY: 0.1, "probability": 0.01, "log_probability": 0.01, "logit_difference": 0.0}


def chance(examples: Iterable[Example]) -> float:
    """Accuracy of naming any object of the scene, a fraction."""
    found = [1 / len(example.scene.labels) for example in examples]
    return sum(found) / len(found)


def doubt(name: str, value: float, chance: float | None, measure: str = ACCURACY) -> str:
    """A warning if a model is hardly better than chance, or worse; else "".

    All that follows measures what becomes of right answers: without any, scores, circuits and masks mean nothing.

    Args:
      name: the model's.
      value: F of the model, such as its accuracy, a fraction.
      chance: accuracy of naming any object of the scene; None: of prompts of another task, as good as 0.
      measure: what F is by.
    """
    if value > (chance or 0) + ABOVE_CHANCE[measure]:
        return ""
    how = "no prompt" if value == 0 else f"only {100 * value:.1f} % of the prompts"
    found = {
        ACCURACY: f"{name} answers {how} right",
        "logit_difference": f"{name} has no larger logit for the right answer than for the wrong one, on average",
    }.get(measure, f"{name} gives the right answer a probability of only {100 * value:.2g} %")
    any_object = "" if chance is None else f"; naming any object of the scene would be right for {100 * chance:.1f} %"
    return (
        f"{found}{any_object}. A model that cannot do the task has no circuit for it: do not rely "
        "on what is found in it. Are these its prompts, its tokenizer, and its BOS token (add_bos)?"
    )
