"""Trains the demo pair: `base`, which solves most 7-box queries, and `tuned`, fine-tuned from it to solve nearly all.

    python scripts/train_demo_models.py --out jaxmech/demo

A small Llama learns to bind objects to boxes by a curriculum: few boxes, labels and objects first, more as soon as the
first query of a sequence is answered well. Each sequence is a scene and four queries drawn with replacement; without
replacement a model learns to answer by elimination and binds nothing. `base` is taken in the last stage of the
curriculum as soon as it passes `--base-accuracy` on held-out scenes. `tuned` is fine-tuned from the shipped `base`, on
the last lesson, and only in the projections of its attention to q, k and v, as adapters often are: what it does better
must be in what its heads read and move.

Every batch is drawn from (seed, step) alone and the state is saved as it goes, so that a run that was interrupted goes
on where it stopped and ends with the same weights. With a `base` in the folder, it is fine-tuned and not trained again.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import convert
from jaxmech.boxes import OBJECTS
from jaxmech.config import Config
from jaxmech.model import Llama, forward

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SPECIAL = ("<pad>", "<bos>", "<unk>")
WORDS = (
    "The",
    "the",
    "is",
    "in",
    "Box",
    "contains",
    "contained",
    "not",
    "There",
    "are",
    "boxes",
    "nothing",
    ",",
    ".",
)
QUERIES = 4
TUNED = ("q", "k", "v")  # what fine-tuning changes
REPORT = 5  # steps from one evaluation to the next; the task is learnt suddenly, so that `base` needs a close look


@dataclass(frozen=True)
class Options:
    """Train the demo pair of jaxmech."""

    out: Path = Path("out/demo")
    """Folder for `base`, `tuned` and the training state."""
    seed: int = 0
    layers: int = 4
    heads: int = 8
    head_dim: int = 16
    width: int = 64
    mlp_width: int = 128
    learning_rate: float = 1e-3
    batch: int = 64
    base_accuracy: float = 0.62
    """Held-out accuracy (7 boxes, first query) at which `base` is taken."""
    tuned_accuracy: float = 0.985
    """Held-out accuracy at which `tuned` is taken."""
    max_steps: int = 12_000
    dtype: str = "bfloat16"
    """dtype of the shipped weights; training is float32."""


@dataclass(frozen=True)
class Lesson:
    """A stage of the curriculum: how many boxes a scene has, from how many labels and objects they are drawn."""

    boxes: int
    labels: int
    objects: int


LESSONS = (
    Lesson(2, 3, 4),
    Lesson(2, 6, 10),
    Lesson(3, 10, 20),
    Lesson(5, 16, 50),
    Lesson(7, 26, len(OBJECTS)),
)


class State(NamedTuple):
    """What a run needs to go on: a pytree, so that flax can serialise it."""

    params: dict
    optimizer: optax.OptState
    step: int
    lesson: int
    recent: float  # running accuracy on the first query of the current lesson


def main(options: Options) -> None:
    """Trains base, unless it is there, and then tuned; each goes on with a run that was interrupted."""
    console = Console()
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS + LETTERS + OBJECTS)}
    config = model_config(options, len(vocabulary))
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "base").exists():
        params = Llama(config).init(jax.random.key(options.seed), jnp.zeros((1, 1), jnp.int32))["params"]
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw(options.learning_rate, 100))
        goal = Goal("base", options.base_accuracy, options.seed, 0)
        train_until(options, config, optimizer, vocabulary, params, goal, console)
    params = convert.read_params(options.out / "base", config)["params"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform({True: adamw(options.learning_rate, 20), False: optax.set_to_zero()}, is_tuned(params)),
    )
    goal = Goal("tuned", options.tuned_accuracy, options.seed + 1, len(LESSONS) - 1)
    train_until(options, config, optimizer, vocabulary, params, goal, console)


class Goal(NamedTuple):
    """What a training is for."""

    name: str
    accuracy: float  # held-out accuracy at which the model is taken
    seed: int
    lesson: int  # the first


def adamw(learning_rate: float, warm_up: int) -> optax.GradientTransformation:
    """AdamW with a linear warm-up."""
    return optax.adamw(optax.linear_schedule(0.0, learning_rate, warm_up))


def is_tuned(params: dict) -> dict:
    """Which parameters are fine-tuned, as a tree of bool."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in TUNED, params)


def train_until(options: Options, config: Config, optimizer, vocabulary, params: dict, goal: Goal, console) -> None:
    """Trains from `params` until the goal is met, and ships the model."""
    start, log = restore(options, goal, State(params, optimizer.init(params), 0, goal.lesson, 0.0), console)
    held_out = held_out_batch(vocabulary)
    for state in train(options, config, optimizer, vocabulary, start, log, goal.seed):
        accuracy = log[-1]["held_out_accuracy"] = held_out_accuracy(config, state.params, held_out)
        console.print(
            f"{goal.name}, step {state.step}  {LESSONS[state.lesson].boxes} boxes  loss {log[-1]['loss']:.3f}  "
            f"first query {state.recent:.3f}  held out {accuracy:.3f}"
        )
        save(options, goal, state, log)
        if accuracy >= goal.accuracy:
            ship(options, goal.name, config, state, vocabulary, log)
            return
    raise SystemExit(f"Stopped after {options.max_steps} steps without reaching {goal.accuracy}.")


def model_config(options: Options, vocab_size: int) -> Config:
    """The shape of the demo models. Untied embeddings do not learn the task in thousands of steps."""
    return Config(
        vocab_size=vocab_size,
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.heads,
        head_dim=options.head_dim,
        mlp_width=options.mlp_width,
        max_positions=256,
        tie_embeddings=True,
    )


def sequences(
    rng: np.random.Generator, lesson: Lesson, batch: int, vocabulary: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes followed by `QUERIES` queries: token ids [B, T], and the positions of the answers [QUERIES]."""
    letters = np.array([vocabulary[w] for w in LETTERS[: lesson.labels]])
    objects = np.array([vocabulary[w] for w in OBJECTS[: lesson.objects]])
    distinct = lambda pool: rng.permuted(np.tile(pool, (batch, 1)), axis=1)[:, : lesson.boxes]  # noqa: E731
    labels, contents = distinct(letters), distinct(objects)
    queried = rng.integers(lesson.boxes, size=(batch, QUERIES))
    word = lambda w: np.full(batch, vocabulary[w])  # noqa: E731
    columns = [word("<bos>")]
    for box in range(lesson.boxes):
        columns += [word("the" if box else "The"), contents[:, box], word("is"), word("in"), word("Box")]
        columns += [labels[:, box], word("," if box < lesson.boxes - 1 else ".")]
    answers = []
    row = np.arange(batch)
    for q in queried.T:
        columns += [word("Box"), labels[row, q], word("contains"), word("the"), contents[row, q], word(".")]
        answers.append(len(columns) - 2)
    return np.stack(columns, axis=1), np.array(answers)


def train(options, config, optimizer, vocabulary, state: State, log: list[dict], seed: int) -> Iterator[State]:
    """Steps the model; yields the state every `REPORT` steps, after appending a row to `log`."""
    while state.step < options.max_steps:
        lesson = LESSONS[state.lesson]
        rng = np.random.default_rng([seed, state.step])
        tokens, answers = sequences(rng, lesson, options.batch, vocabulary)
        params, opt_state, loss, correct = update(config, optimizer, state.params, state.optimizer, tokens, answers)
        recent = 0.95 * state.recent + 0.05 * float(correct)
        advance = recent > 0.9 and state.lesson < len(LESSONS) - 1
        state = State(params, opt_state, state.step + 1, state.lesson + advance, 0.0 if advance else recent)
        if state.step % REPORT == 0:
            row = {"step": state.step, **asdict(lesson), "loss": round(float(loss), 4)}
            log.append(row | {"first_query": round(recent, 4)})
            yield state


@partial(jax.jit, static_argnames=("config", "optimizer"))
def update(config, optimizer, params, opt_state, tokens, answers):
    """One optimizer step: new parameters, optimizer state, loss and accuracy on the first query."""

    def loss_of(params):
        logits, _ = forward(config, params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        first = answers[0]
        correct = (logits[:, first - 1].argmax(-1) == tokens[:, first]).mean()
        return losses[:, answers - 1].mean() + 0.1 * losses.mean(), correct

    (loss, correct), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, correct


def held_out_batch(vocabulary: dict[str, int], count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Scenes from a seed that training never uses, cut before the first answer: prompts [B, T], answers [B]."""
    tokens, answers = sequences(np.random.default_rng([2**31, 1]), LESSONS[-1], count, vocabulary)
    return tokens[:, : answers[0]], tokens[:, answers[0]]


def held_out_accuracy(config: Config, params: dict, held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Fraction of held-out queries whose most probable next token is the answer."""
    prompts, answers = held_out
    return round(float((predict(config, params, prompts) == answers).mean()), 4)


@partial(jax.jit, static_argnames="config")
def predict(config, params, prompts):
    """Most probable next token of each prompt [B]."""
    last = jnp.full(prompts.shape[0], prompts.shape[1] - 1)
    return forward(config, params, prompts, logits_at=last)[0].argmax(-1)


def restore(options: Options, goal: Goal, fresh: State, console: Console) -> tuple[State, list[dict]]:
    """The saved state and log of an interrupted training, or the fresh state."""
    file = options.out / f"{goal.name}_state.msgpack"
    if not file.exists():
        return fresh, []
    saved = flax.serialization.msgpack_restore(file.read_bytes())
    state = flax.serialization.from_state_dict(fresh, saved["state"])
    console.print(f"Going on from step {state.step} ({file}).")
    return state, json.loads(saved["log"])


def save(options: Options, goal: Goal, state: State, log: list[dict]) -> None:
    """Writes the state to a temporary file and renames it."""
    saved = {"state": flax.serialization.to_state_dict(state), "log": json.dumps(log)}
    temporary = options.out / f"{goal.name}_state.tmp"
    temporary.write_bytes(flax.serialization.msgpack_serialize(saved))
    os.replace(temporary, options.out / f"{goal.name}_state.msgpack")


def ship(options: Options, name: str, config: Config, state: State, vocabulary: dict, log: list[dict]) -> None:
    """Writes a model as a Hugging Face checkpoint with its tokenizer and its training curve."""
    shipped = config.replace(param_dtype=options.dtype, dtype=options.dtype)
    params = jax.tree.map(lambda x: x.astype(options.dtype), state.params)
    convert.write_hf(options.out / name, shipped, {"params": params}, word_tokenizer(vocabulary))
    with open(options.out / name / "training.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[-1]))
        writer.writeheader()
        writer.writerows(log)


def word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, with <bos> in front."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=256,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
