"""Desiderata-based component masking (DCM; Davies et al. 2023, arXiv:2307.03637): which heads carry what.

A mask over the heads of a group is trained so that patching the heads it selects from counterfactual prompts makes the
model say what a desideratum predicts (Prakash et al. 2024, section 4 and appendix):

    z <- m z + (1 - m) z_counterfactual        m = 1: the head is left alone, m = 0: it is patched
    loss = -mean target logit + lam sum(1 - m)              or another metric in place of the target's logit

The counterfactual prompts are run once, up to the group's last layer, and of the base prompts only what is clean; a
step then runs, forward and backward, the layers from the group's first on and the tokens from its first role on
(`jaxmech.cone`).

training.py    trains masks, many at once
steps.py       the steps of all trainings of a call, compiled
testing.py     how well masks do on other pairs
selection.py   which mask of a training is the best
runs.py        what a training leaves
groups.py      the heads of a mask, and the roles at which they are patched
stream.py      a forward pass under a mask, which both share
prompts.py     what is kept of the base prompts, and how much of it at a time
targets.py     what is kept of the counterfactual prompts

Axes as in `jaxmech.model`, L being counted from the first layer that a group has; n counts the heads of a group, M
masks, E the entries of a batch, R the roles at which heads are patched, and U the numbers that a mask has for a head:
one for all roles, or one for each.
"""

from jaxmech.dcm.runs import History, Run
from jaxmech.dcm.selection import select, select_many
from jaxmech.dcm.testing import accuracies, accuracy, correct
from jaxmech.dcm.training import train, train_many

__all__ = ["History", "Run", "accuracies", "accuracy", "correct", "select", "select_many", "train", "train_many"]
