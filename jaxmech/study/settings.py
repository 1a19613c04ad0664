"""What a study is of and how large it is: everything that its results depend on."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmech.boxes import ROLES
from jaxmech.boxes.scenes import MAX_BOXES, MIN_BOXES
from jaxmech.chain import PAPER_CHAIN, Stage
from jaxmech.collected import check_components
from jaxmech.criteria.measure import as_published
from jaxmech.metrics import ACCURACY, METRICS
from jaxmech.study.chains import check_chain_on
from jaxmech.study.models import model_names

RANDOM = "random"  # a token without a role, as the target of attention that is knocked out
# Attention that is knocked out in boxes prompts: source and target role.
EDGES = (
    ("last", "object"),
    ("last", "query_box"),
    ("last", RANDOM),
    ("query_box", "prev_query_box"),
    ("query_box", RANDOM),
    ("prev_query_box", "object"),
)
WHOLE_CIRCUIT = "whole circuit"  # the name of all groups together in the results of cross-model patching
# How much is computed or held at a time; results do not depend on it, but for rounding.
AT_A_TIME = ("batch_size", "copies", "models_in_memory")


@dataclass(frozen=True)
class Settings:
    """A study; the numbers are the paper's unless said otherwise.

    Attributes:
      base: checkpoint folder of the base model.
      tuned: checkpoint folders of its fine-tuned descendants, or folders of LoRA adapters of the base.
      chain: the sweeps of circuit discovery.
      k: {group: number of heads}, in place of the chain's own.
      min_effect, metric: see `discover`; "logit_difference" is of pairs with wrong answers.
      measure: what models and circuits are measured by in all stages but discovery and those of DCM: "accuracy", or one
        of `metric`'s; see `jaxmech.criteria` for F.
      data: JSONL file of boxes examples, or None: scenes are made. Those of a file are split between the uses below.
      pairs: JSONL file of pairs of another task (`read_pairs`), in place of boxes prompts: two thirds are evaluated,
        over the others ablated activations are averaged, by role.
      desiderata: JSONL files of base prompts (clean), counterfactual prompts (corrupt) and target tokens (answer), one
        for each desideratum of these pairs, which has the name of its file; without any, there is no DCM.
      first_token, between: how answers of these pairs are read.
      prompts: how many of these pairs are evaluated at most; None: all of the two thirds.
      scenes: scenes of the boxes prompts on which circuits are found and evaluated, every box asked about.
      boxes: boxes in a scene.
      contexts: prompts over which ablated activations are averaged; none of their scenes is evaluated.
      random_circuits: of faithfulness.
      random_subsets: of completeness.
      ablate_elsewhere: minimality, faithfulness and completeness ablate all heads at tokens without a role of the
        circuit; False leaves these tokens as they are, which takes longer.
      threshold: of minimality, a fraction.
      train, validation, test: pairs of DCM.
      lam: of DCM.
      epochs: of DCM.
      dcm_batch: of DCM.
      variants: train DCM on the eleven variants of `positional` as well, for the group that carries position best.
      repeats: of activation patching.
      patched: pairs of one repeat.
      components: sets of activations that CMAP patches, "z" or several of q, k, v joined by "+".
      single_head_prompts: on how many of the prompts CMAP patches every single head, too: at a role in the scene, which
        many tokens follow, that takes longer than a circuit discovery.
      edges: attention that is knocked out, (source, target); None: EDGES, or in pairs from each role to those before
        it.
      seed: of all draws.
      add_bos: prepend the BOS token; None: if the tokenizer does so by itself.
      dtype, precision, batch_size: see `load` and the methods.
      copies: of each model, over all devices (`make_mesh`); None: one device.
      models_in_memory: models that are held at a time; others are loaded again when they are needed.
      compat: "paper" reproduces the published code's deviations (docs/paper_compat.md).
    """

    base: Path
    tuned: tuple[Path, ...]
    chain: tuple[Stage, ...] = PAPER_CHAIN
    k: dict[str, int] = dataclasses.field(default_factory=dict)
    min_effect: float = 1e-3
    metric: str = "probability"
    measure: str = ACCURACY
    data: Path | None = None
    pairs: Path | None = None
    desiderata: tuple[Path, ...] = ()
    first_token: bool = False
    between: str = " "
    prompts: int | None = None
    scenes: int = 50
    boxes: int = 7
    contexts: int = 500
    random_circuits: int = 10
    random_subsets: int = 20
    ablate_elsewhere: bool = True
    threshold: float = 0.01
    train: int = 1000
    validation: int = 500
    test: int = 500
    lam: float = 0.01
    epochs: int = 2
    dcm_batch: int = 32
    variants: bool = True
    repeats: int = 10
    patched: int = 500
    components: tuple[str, ...] = ("z", "q", "k", "v", "q+k+v")
    single_head_prompts: int = 100
    edges: tuple[tuple[str, str], ...] | None = None
    seed: int = 0
    add_bos: bool | None = None
    dtype: str = "float32"
    precision: str = "highest"
    batch_size: int | None = None
    copies: int | None = None
    models_in_memory: int = 2
    compat: str | None = None

    def __post_init__(self):
        for name, first in (("metric", ()), ("measure", (ACCURACY,))):
            known, given = (*first, *METRICS), getattr(self, name)
            if given not in known or (given == "logit_difference" and self.pairs is None):
                raise ValueError(
                    f"{name}={given!r}; expected {', '.join(known[:-1])} or, of pairs with wrong answers, {known[-1]}."
                )
        check_chain_on(ROLES if self.pairs is None else None, self.chain, self.k, self.min_effect, self.metric)
        as_published(self.compat, self.measure, self.ablate_elsewhere)
        if self.pairs is not None and (self.data is not None or self.compat is not None):
            raise ValueError("pairs are another task than boxes prompts; they go without data and compat.")
        if self.desiderata and self.pairs is None:
            raise ValueError("desiderata are of pairs; those of boxes prompts are made.")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, prompts in self._unused.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} makes no difference to {prompts}; leave it out.")
        names = [path.stem for path in self.desiderata]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"desiderata have the names of their files; {twice[0]!r} is one of two.")
        if not self.tuned:
            raise ValueError("A study needs at least one fine-tuned model; give tuned.")
        _ = self.names
        counts = ("scenes", "contexts", "random_circuits", "train", "validation", "test", "epochs", "dcm_batch")
        for name in (*counts, "repeats", "patched", "single_head_prompts", "models_in_memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1.")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts}; expected at least 1, or None.")
        if self.random_subsets < 0:
            raise ValueError(f"random_subsets={self.random_subsets}; expected at least 0.")
        if not MIN_BOXES <= self.boxes <= MAX_BOXES:
            raise ValueError(f"boxes={self.boxes}; expected {MIN_BOXES} to {MAX_BOXES} in a scene.")
        for together in self.components:
            check_components(together.split("+"))
        if self.edges is not None and self.pairs is None:
            _check_edges(self.edges)
        if WHOLE_CIRCUIT in [stage.group for stage in self.chain]:
            raise ValueError(f"A group is named {WHOLE_CIRCUIT!r}, as all groups together are; choose another name.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected at least 1, or None.")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold}; expected a finite number of at least 0, such as 0.01.")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam={self.lam}; expected a finite number of at least 0.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}; expected at least 0.")

    @property
    def names(self) -> list[str]:
        """Names of the models, the base first: those of their folders (see `model_names`)."""
        return model_names((self.base, *self.tuned))

    @property
    def paths(self) -> dict[str, Path]:
        """Folder of each model by its name."""
        return dict(zip(self.names, (self.base, *self.tuned), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = dataclasses.asdict(self)
        return {
            **values,
            "base": str(self.base),
            "tuned": [str(path) for path in self.tuned],
            "data": None if self.data is None else str(self.data),
            "pairs": None if self.pairs is None else str(self.pairs),
            "desiderata": [str(path) for path in self.desiderata],
        }

    @property
    def _unused(self) -> dict[str, str]:
        """Names of those that make no difference to a study of these prompts, and what these are."""
        if self.pairs is None:
            of_pairs = ("pairs", "desiderata", "first_token", "between", "prompts")
            of_made = ("boxes",) if self.data is not None else ()
            return {name: "boxes prompts" for name in of_pairs} | {name: "scenes of a file" for name in of_made}
        of_boxes, of_dcm = (
            ("data", "scenes", "boxes", "variants", "compat"),
            ("train", "validation", "test", "lam", "epochs", "dcm_batch", "repeats", "patched"),
        )
        unused = dict.fromkeys(of_boxes, "pairs")
        return unused if self.desiderata else unused | dict.fromkeys(of_dcm, "pairs without desiderata")

    def in_use(self) -> dict[str, Any]:
        """Those of `to_dict` that make a difference to a study of these prompts."""
        return {name: value for name, value in self.to_dict().items() if name not in self._unused}

    def quick(self) -> "Settings":
        """A study that is through in a fraction of the time, to see that everything runs; its numbers are rough."""
        changes = {
            "prompts": min(self.prompts or 84, 84),
            "scenes": min(self.scenes, 12),
            "contexts": min(self.contexts, 60),
            "random_circuits": min(self.random_circuits, 3),
            "random_subsets": min(self.random_subsets, 5),
            "train": min(self.train, 96),
            "validation": min(self.validation, 48),
            "test": min(self.test, 48),
            "variants": False,
            "repeats": min(self.repeats, 2),
            "patched": min(self.patched, 48),
            "components": self.components[:2],
            "single_head_prompts": min(self.single_head_prompts, 28),
        }
        return dataclasses.replace(self, **{name: x for name, x in changes.items() if name not in self._unused})


def _check_edges(edges: tuple[tuple[str, str], ...]) -> None:
    targets = (*ROLES, "object", RANDOM)
    for source, target in edges:
        if source not in ROLES or target not in targets:
            raise ValueError(
                f"edges has {(source, target)}; expected a source of {', '.join(ROLES)}, and a target of "
                f"{', '.join(targets)}."
            )
