"""The whole study of one base model and its fine-tuned descendants, stage by stage, in a folder that can be resumed.

settings.py   what a study is of and how large it is
models.py     its models' names, and what is checked of them before they are loaded
chains.py     what is checked of its chain of sweeps
data.py       its prompts: boxes_data.py those of the boxes task, pairs_data.py pairs of another one
doubt.py      whether a model does the task well enough
study.py      its models, prompts and results, as the stages see them
stages.py     its stages, each a function from what is known so far to a piece of JSON; those of DCM in dcm_stages.py
unfinished.py pieces of a stage's part that is not done
running.py    runs the stages, keeps their results in the folder, and takes up a run that was cut off
"""

from jaxmech.study.doubt import chance, doubt
from jaxmech.study.running import StudyFolder, run
from jaxmech.study.settings import EDGES, WHOLE_CIRCUIT, Settings
from jaxmech.study.stages import STAGES

__all__ = ["EDGES", "STAGES", "WHOLE_CIRCUIT", "Settings", "StudyFolder", "chance", "doubt", "run"]
