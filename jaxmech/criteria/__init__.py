"""What makes a circuit a good one: faithfulness, completeness and minimality.

The criteria are those of Wang et al. 2022 (arXiv:2211.00593) in the form of Prakash et al. 2024, section 3.3 and
appendix. F, what a circuit or a model does, is its accuracy; or, where the right answer is rarely the most probable of
all tokens, another metric of `jaxmech.metrics`: the mean over prompts of the label's probability, of its logit
difference from a wrong answer, or of a function of the logits. Log-probabilities are negative, so that their ratio
would say nothing: F is exp of their mean, the geometric mean of the probability. Logit differences and functions may be
negative, too: faithfulness has `recovered` for them, and minimality takes differences. Nothing is rounded. Results keep
what was measured of each prompt, so that intervals are bootstrapped over prompts, the same ones for both sides of a
ratio.

measure.py     F, and what all criteria check and take away
faithful.py    whether the circuit alone does what the model does; random circuits for comparison
complete.py    whether circuit and model lose the same by the same knockouts
minimal.py     whether every head is needed
"""

from jaxmech.criteria.complete import Completeness, completeness
from jaxmech.criteria.faithful import Faithfulness, faithfulness, random_circuit
from jaxmech.criteria.minimal import Minimality, minimality

__all__ = [
    "Completeness",
    "Faithfulness",
    "Minimality",
    "completeness",
    "faithfulness",
    "minimality",
    "random_circuit",
]
