"""The options of the commands, one frozen dataclass each; tyro makes the command line of them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec


def _heads_per_group(words: list[str]) -> dict[str, int]:
    """GROUP N GROUP N ... as {group: number of heads}."""
    found = {}
    for group, number in zip(words[::2], words[1::2] + [""] * (len(words) % 2), strict=True):
        if not re.fullmatch(r"-?\d+", number):
            raise ValueError(
                f"the group {group!r} is followed by {repr(number) if number else 'nothing'}; expected a number of "
                "heads after each group, as in --k value_fetcher 20 pos_transmitter 5."
            )
        if group in found:
            raise ValueError(f"the group {group!r} is given twice.")
        found[group] = int(number)
    return found


OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
OptionalBool = Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint="")]
Dtype = Literal["float32", "bfloat16", "float16"]
Metric = Literal["probability", "log_probability", "logit_difference"]
Measure = Literal["accuracy", "probability", "log_probability", "logit_difference"]
HeadsPerGroup = Annotated[
    dict[str, int],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="GROUP N [GROUP N ...]",
        instance_from_str=_heads_per_group,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(x) for item in value.items() for x in item],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]


@dataclass(frozen=True)
class Demo:
    """The whole study on the pair of small models that ship with jaxmech, in a few minutes, with a report."""

    out: Path | None = None
    """Folder for results; without it, out/demo, or out/demo-quick if it is quick."""
    quick: bool = False
    """Fewer prompts and steps: one to two minutes on two cores, rough numbers."""
    seed: int = 0
    """Seed of all draws."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted demo goes on."""


@dataclass(frozen=True)
class StudyCommand:
    """The whole study of a base model and its fine-tuned descendants, with a report; can be interrupted and resumed."""

    base: Path
    """Checkpoint of the base model: a directory (Hugging Face's, Meta's, or one that `python -m convert` wrote), or the
    name of a model on the Hugging Face Hub."""
    tuned: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Checkpoint of a fine-tuned descendant, or a LoRA adapter of --base; give it once for each."""
    out: Path
    """Folder for results.json, report.html and figures."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run this stage alone, anew if it is done; give it once for each. Stages, in order: accuracy, discovery,
    minimality, faithfulness, overlap, completeness, dcm, activation_patching, cmap, knockout."""
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="STR", help_behavior_hint="")] = None
    """Run this stage and all behind it anew: accuracy, discovery, minimality, faithfulness, overlap, completeness, dcm,
    activation_patching, cmap or knockout. With --only, those of them."""
    quick: bool = False
    """Far fewer prompts and steps, to see that everything runs; rough numbers."""
    data: OptionalPath = None
    """JSONL file of examples (key "sentence"); without it, scenes are made."""
    pairs: OptionalPath = None
    """JSONL file of pairs of prompts of another task, in place of boxes prompts (see jaxmech discover --help): two
    thirds are evaluated, over the others ablated activations are averaged."""
    desiderata: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(name="desideratum")] = ()
    """JSONL file of a desideratum of --pairs: base prompts ("clean"), counterfactual prompts ("corrupt") and what the
    model should say if what differs is patched ("answer"); named as its file. Give it once for each; without any, dcm
    and activation_patching are left out."""
    first_token: bool = False
    """Of answers of several tokens in --pairs, take the first."""
    between: str = " "
    """What stands between a prompt of --pairs and its answer, unless the answer begins with a space."""
    prompts: OptionalInt = None
    """Prompts of --pairs that are evaluated at most; without it, two thirds of them all."""
    scenes: int = 50
    """Scenes of the boxes prompts that are evaluated; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    contexts: int = 500
    """Prompts over which ablated activations are averaged."""
    chain: OptionalPath = None
    """TOML file of stages of discovery; without it, the paper's four, on boxes prompts."""
    k: HeadsPerGroup = field(default_factory=dict)
    """Heads to select per group, in place of the chain's numbers: --k value_fetcher 20 pos_transmitter 5."""
    min_effect: float = 1e-3
    """Smallest mean loss for which a head is selected: of the probability, a fraction; of its logarithm or of the logit
    difference, in nats."""
    metric: Metric = "probability"
    """What scores of discovery are: relative changes of the right answer's probability, changes of its logarithm, or of
    its logit minus that of the wrong answer (--pairs)."""
    measure: Measure = "accuracy"
    """What models and circuits are measured by in all stages but discovery and those of DCM: how often the right answer
    is the most probable token, its probability, its log-probability (shown as the geometric mean of the probability),
    or its logit minus that of the wrong answer (--pairs)."""
    random_circuits: int = 10
    """Random circuits to compare a circuit's faithfulness with."""
    random_subsets: int = 20
    """Random sets of heads for completeness."""
    ablate_elsewhere: bool = True
    """Minimality, faithfulness and completeness ablate all heads at tokens without a role of the circuit;
    --no-ablate-elsewhere leaves these tokens as they are, which takes longer."""
    threshold: float = 0.01
    """Least minimality score of a head that stays in the circuit."""
    train: int = 1000
    """Pairs to train masks (DCM) on; --validation and --test to choose and to test them."""
    validation: int = 500
    """Pairs to choose masks by."""
    test: int = 500
    """Pairs to test masks on."""
    epochs: int = 2
    """Passes of DCM over its training pairs; few pairs need more."""
    lam: float = 0.01
    """Weight of the number of heads in the loss of DCM, logits per head."""
    repeats: int = 10
    """Repeats of activation patching, with new pairs each."""
    patched: int = 500
    """Pairs of one repeat."""
    single_head_prompts: int = 100
    """Prompts on which cross-model patching patches every single head, too."""
    seed: int = 0
    """Seed of all draws."""
    add_bos: OptionalBool = None
    """Prepend the tokenizer's BOS token; without it, the tokenizer decides."""
    dtype: Dtype = "float32"
    """dtype of parameters and activations."""
    precision: str = "highest"
    """How float32 products are computed: highest, default, BF16_BF16_F32_X3, ... (docs/precision.md)."""
    batch_size: OptionalInt = None
    """Examples per call, but of DCM, whose calls fit the memory budget; without it, all do."""
    copies: OptionalInt = None
    """Use all devices, with so many copies of the model, each split over its part of them; a divisor of their number.
    Without it, one device."""
    models_in_memory: int = 2
    """Models that are held at a time; others are loaded again when they are needed."""
    compat: Annotated[Literal["paper"] | None, tyro.conf.arg(metavar="paper", help_behavior_hint="")] = None
    """"paper": reproduce the deviations of the published code (docs/paper_compat.md)."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted study with the same settings goes on (--batch-size,
    --copies and --models-in-memory may be others)."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """A model, and prompts for it."""

    model: Path
    """Checkpoint: a directory (Hugging Face's, Meta's, or one that `python -m convert` wrote), or the name of a model
    on the Hugging Face Hub."""
    adapter: OptionalPath = None
    """LoRA adapter of --model to merge in; --model then is not one that `python -m convert` wrote."""
    data: OptionalPath = None
    """JSONL file of examples (key "sentence"); without it, scenes are made."""
    pairs: OptionalPath = None
    """JSONL file of pairs of prompts of another task, in place of boxes prompts: keys "clean", "corrupt" and "answer",
    and as needed "wrong_answer", "roles" and "corrupt_roles"; discover needs a --chain of their roles."""
    first_token: bool = False
    """Of answers of several tokens in --pairs, take the first."""
    between: str = " "
    """What stands between a prompt of --pairs and its answer, unless the answer begins with a space."""
    scenes: int = 50
    """Scenes to make; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    seed: int = 0
    """Seed of scenes and corrupt prompts."""
    add_bos: OptionalBool = None
    """Prepend the tokenizer's BOS token; without it, the tokenizer decides."""
    dtype: Dtype = "float32"
    """dtype of parameters and activations."""
    precision: str = "highest"
    """How float32 products are computed: highest, default, BF16_BF16_F32_X3, ... (docs/precision.md)."""
    batch_size: OptionalInt = None
    """Examples per call; without it, as many as fit the memory budget."""
    copies: OptionalInt = None
    """Use all devices, with so many copies of the model, each split over its part of them; a divisor of their number.
    Without it, one device."""


@dataclass(frozen=True, kw_only=True)
class LookAtPrompts(PromptOptions):
    """Look at prompts before anything is computed with them: where roles are, which prompts are no use, what the model
    answers."""

    show: int = 3
    """Examples to show, from the first on."""


@dataclass(frozen=True, kw_only=True)
class Discover(PromptOptions):
    """Find the circuit of a model for a task, entity tracking unless told otherwise, by a chain of path-patching
    sweeps."""

    out: Path
    """Folder for config.json, scores.npz, circuit.json and one heat map per stage."""
    chain: OptionalPath = None
    """TOML file of stages; without it, the paper's four, on boxes prompts."""
    k: HeadsPerGroup = field(default_factory=dict)
    """Heads to select per group, in place of the chain's numbers: --k value_fetcher 20 pos_transmitter 5."""
    min_effect: float = 1e-3
    """Smallest mean loss for which a head is selected: of the probability, a fraction; of its logarithm or of the logit
    difference, in nats."""
    metric: Metric = "probability"
    """What scores are: relative changes of the right answer's probability, changes of its logarithm, or of its logit
    minus that of the wrong answer (--pairs)."""
    correct_only: bool = False
    """Take the prompts that the model answers right, and no others."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted run with the same settings goes on (--batch-size and
    --copies may be others)."""


@dataclass(frozen=True)
class Data:
    """Write scenes with boxes as JSONL, key "sentence"."""

    out: Path
    """File to write."""
    scenes: int = 50
    """Scenes; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    seed: int = 0
    """Seed of the scenes."""
    overwrite: bool = False
    """Replace --out if it is there."""


@dataclass(frozen=True)
class Verify:
    """Compare a model with transformers' own, site by site and layer by layer. Exit status 1 if one deviates."""

    model: Path
    """Checkpoint: a directory (Hugging Face's, Meta's, or one that `python -m convert` wrote), or the name of a model
    on the Hugging Face Hub."""
    against: OptionalPath = None
    """Hugging Face directory of the same model; without it, --model itself if that is one."""
    adapter: OptionalPath = None
    """LoRA adapter of --model to merge in; --against then is the merged model."""
    prompts: int = 2
    """Prompts of random tokens."""
    length: int = 64
    """Tokens of each."""
    seed: int = 0
    """Seed of the tokens."""
    text: OptionalText = None
    """Prompt to take instead of random tokens."""
    out: OptionalPath = None
    """JSON file for all numbers."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[StudyCommand, tyro.conf.subcommand("study")]
    | Annotated[Discover, tyro.conf.subcommand("discover")]
    | Annotated[LookAtPrompts, tyro.conf.subcommand("prompts")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)
