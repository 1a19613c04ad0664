"""Cross-model activation patching (CMAP): heads of a fine-tuned model at work in its base.

The method of Prakash et al. 2024, section 5. `cmap` patches a set of heads, a group or a whole circuit; `cmap_heads`
patches every single head in turn, on the causal cone of its role.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmech import cone, memory
from jaxmech.accuracy import examples_per_call
from jaxmech.batches import Batches, calls_of_equal_size, equal_parts
from jaxmech.circuits import HeadsByRole, role_masks
from jaxmech.compat import check_compat, last_column
from jaxmech.config import Config
from jaxmech.files import replacing
from jaxmech.gathered import Gathered
from jaxmech.interventions import Interventions, Patch
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Function, Outcome, check_metric, effect, function_of, name_of, outcome
from jaxmech.model import Params, forward, unembed
from jaxmech.pairs import Pairs
from jaxmech.patching import at_tokens, head_values, patched_predictions, positions_of
from jaxmech.predictions import Predictions, answers, is_correct
from jaxmech.scores import PathScores
from jaxmech.sharding import devices_of, on_devices_of, over_rows, row_devices
from jaxmech.suffixes import Suffixes

COMPONENTS = ("z", "q", "k", "v")
TOKENS_PER_CALL = 4096  # suffix tokens of all heads that run together
NO_HEAD = -1  # a row of every call: the clean outcome by the same arithmetic as the others; heads are layer * N + head
Array = Any  # NumPy on the host, jax.Array inside jit


@dataclass(frozen=True, eq=False, repr=False)
class HeadValues:
    """What a model's heads compute on the prompts of some pairs: what CMAP needs of the tuned model.

    Attributes:
      values: {component: [L, B, R, N, H]}; q and k before RoPE, k and v per query head.
      roles: the R roles.
      prompts: sha256 of the prompts and of the roles' positions, by which `cmap` knows its pairs.
    """

    values: Mapping[str, np.ndarray]  # of [L, B, R, N, H]
    roles: tuple[str, ...]
    prompts: str

    def __repr__(self) -> str:
        shape = list(next(iter(self.values.values())).shape)
        return f"HeadValues({', '.join(self.values)} at {', '.join(self.roles)}, [L, B, R, N, H] = {shape})"

    def save(self, path: str | Path) -> None:
        """Writes safetensors to `path`, for another process to load; it is replaced only when it is whole."""
        metadata = {"roles": json.dumps(self.roles), "prompts": self.prompts}
        with replacing(path) as temporary:
            save_file({site: np.ascontiguousarray(x) for site, x in self.values.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "HeadValues":
        """Reads what `save` wrote to `path`.

        Raises:
          FileNotFoundError: no such file.
          ValueError: it is damaged, or holds something else.
        """
        try:
            with safe_open(path, "np") as file:
                values, metadata = {site: file.get_tensor(site) for site in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from error
        if not (values and {"roles", "prompts"} <= metadata.keys()) or set(values) - set(COMPONENTS):
            raise ValueError(f"{path} holds {sorted(values)}; expected what HeadValues.save wrote: {COMPONENTS}.")
        return cls(values, tuple(json.loads(metadata["roles"])), metadata["prompts"])


def collect(
    model: Model,
    pairs: Pairs,
    roles: Iterable[str],
    components: Sequence[str] = ("z",),
    *,
    batch_size: int | None = None,
) -> HeadValues:
    """Runs the clean prompts through `model` and keeps its heads' activations at `roles`, on the host.

    With these, `cmap` and `cmap_heads` on the same pairs need the tuned model no longer: load it, collect, drop it,
    load the base. For two models that do not fit into memory together.

    Args:
      model: the tuned model.
      pairs: the prompts that `cmap` will get; only the clean ones are run.
      roles: the roles at which heads will be patched.
      components: the activations to keep: any of "z", "q", "k" and "v".
      batch_size: examples in one call; None picks as many as fit the memory budget.
    """
    components, roles = _check_components(components), tuple(roles)
    source = check_prompts(model.config, pairs), positions_of(pairs.position, roles)
    size = examples_per_call(model, pairs) if batch_size is None else batch_size
    parts = list(equal_parts(len(pairs), size, row_devices(model.weights)))
    found = [jax.device_get(head_values(model, source, rows, sites=components)) for rows, _ in parts]
    kept = {
        site: np.concatenate([x[site][:, new] for x, (_, new) in zip(found, parts, strict=True)], axis=1)
        for site in components
    }
    return HeadValues(kept, roles, _fingerprint(*source))


def cmap(
    base: Model,
    tuned: Model | HeadValues,
    pairs: Pairs,
    heads_by_role: HeadsByRole,
    components: Sequence[str] = ("z",),
    *,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: str | Function = ACCURACY,
    wrong_labels: np.ndarray | None = None,
    keep_logits: bool = True,
) -> Predictions:
    """Answers of `base` to the clean prompts when its heads' activations are those that `tuned` has there.

    Args:
      base: the model that is patched.
      tuned: a model of the same shape (a fine-tune, also one that a LoRA adapter was merged into), or what `collect`
        kept of it for these pairs.
      pairs: prompts and labels; only the clean prompts are run.
      heads_by_role: the heads patched at each role, {role: [(layer, head)]}, or a `Circuit`.
      components: "z", or any of "q", "k" and "v" (before RoPE, for the named query heads alone). Each is patched at the
        roles; what a head of a later layer computes from it is free to change.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" does for q, k and v as the published code does: k and v are patched at all tokens before the role
        and not at the role itself, and every head's z is held at its value in the base model at all tokens but the last
        column (docs/paper_compat.md, m). For z, heads of roles other than `prev_query_box` are patched at the last
        column (f).
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".
      keep_logits: return the logits, float32 [B, V]; without, they stay on the device.

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: models of different shapes, values collected of other pairs, unknown roles, heads, components or
        metrics, or no heads at all.
    """
    components = _check_components(components)
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(base.config, pairs, **options)
    roles, mask = role_masks(base.config, heads_by_role)
    if check_compat(compat):
        if isinstance(tuned, HeadValues):
            raise ValueError('compat="paper" patches tokens that `collect` does not keep; give the tuned model itself.')
        _check_same_shape(base, tuned)
        return _paper_cmap(base, tuned, pairs, roles, mask, components, batch_size, gathered)
    values = _values_of(base, tuned, pairs, roles, components)
    return patched_predictions(base, pairs, roles, mask, values, batch_size, gathered)


@dataclass(frozen=True, eq=False, repr=False)
class HeadSweep:
    """What every single head of the tuned model does in the base model.

    Attributes:
      accuracy: float [L, N], of the base model with that head patched.
      scores: effect on each prompt, [L, N, B]; positive where the tuned model's head helps, so that `scores.top` names
        those that hurt; see `top`.
      clean_accuracy: of the base model without a patch, computed in the same way.
    """

    accuracy: np.ndarray  # [L, N]
    scores: PathScores
    clean_accuracy: float

    def __repr__(self) -> str:
        accuracies = f"accuracies {self.accuracy.min():.3f} to {self.accuracy.max():.3f}"
        return f"HeadSweep({accuracies}, {self.clean_accuracy:.3f} without a patch, {self.scores!r})"

    def top(self, k: int, min_effect: float = 0.0) -> list[tuple[int, int]]:
        """The k heads that help most, those with the largest mean score, best first.

        Args:
          k: how many heads at most.
          min_effect: heads whose mean score is below it, or 0, are left out.

        Raises:
          ValueError: as `PathScores.top`.
        """
        return self.scores.top(k, min_effect, largest=True)


def cmap_heads(
    base: Model,
    tuned: Model | HeadValues,
    pairs: Pairs,
    role: str = "last",
    components: Sequence[str] = ("z",),
    *,
    metric: str | Function = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
) -> HeadSweep:
    """Patches each head of `tuned` alone into `base`, at one role: a sweep over all L x N heads.

    The base model is run once; each head then costs a forward pass of the tokens from its role and the layers from its
    own on (`jaxmech.cone`).

    Args:
      base: the model that is patched.
      tuned: a model of the same shape, or what `collect` kept of it for these pairs.
      pairs: prompts and labels; only the clean prompts are run.
      role: the role at which each head is patched.
      components: what is patched: "z", or any of "q", "k" and "v"; see `cmap`.
      metric: what a score is, see `jaxmech.metrics`: "probability", "log_probability", "logit_difference" or a function
        of the logits, as for `path_patch`.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".
      batch_size: examples in one call; None picks as many as fit the memory budget.

    Raises:
      ValueError: as `cmap`, or an unknown metric.
    """
    components, config = _check_components(components), base.config
    wrong_labels = check_metric(metric, wrong_labels, pairs.labels, config.vocab_size)
    values_of = _values_of(base, tuned, pairs, [role], components)
    tokens, p, last = check_prompts(config, pairs), pairs.position(role), pairs.position("last")
    copies = row_devices(base.weights)
    if batch_size is None:
        length, at_a_time = float((last - p + 1).mean()), (config.num_heads + 1) / copies
        sweep = memory.of_live_sweep(config, length, tokens.shape[1], at_a_time)
        batch_size = memory.fitting(base.weights, sweep + memory.of_heads(config, 1, config.num_layers))
    batches = Batches.plan([tokens], p, last, batch_size)
    heads = np.arange(config.num_layers * config.num_heads)
    work = batches.capacity / TOKENS_PER_CALL
    calls = calls_of_equal_size(heads, work, most=config.num_layers, copies=copies, besides=1)
    effects = np.zeros((len(heads), len(pairs)), np.float32)
    answered = np.zeros((1 + len(heads), len(pairs)), np.int32)  # without a patch, and with each head's
    probability = np.zeros(len(pairs), np.float32)

    def run_batch(rows: np.ndarray) -> None:  # a function, so that its cache goes before the next one comes
        prompts, suffixes = batches.prompts(rows), batches.suffixes(rows)
        values = on_devices_of(base.weights, values_of(rows))
        answers_of = pairs.labels[rows], wrong_labels[rows], rows.astype(np.int32)
        inputs = _prepare(config, base.weights, prompts, suffixes, values, answers_of)
        for call in calls:
            run = over_rows(base.weights, np.append(NO_HEAD, call))
            outcomes = _run_heads(config, base.weights, inputs, run, measure=function_of(metric))
            found, said = jax.device_get(outcomes)
            clean, patched = (jax.tree.map(lambda x, kept=kept: x[kept], found) for kept in (0, slice(1, None)))
            effects[np.ix_(call, rows)] = effect(metric, patched, clean)
            answered[np.ix_(np.append(0, 1 + call), rows)] = said
            probability[rows] = np.exp(clean.log_probability)

    for rows in batches.rows:
        run_batch(rows)
    shape = config.num_layers, config.num_heads
    accuracy = is_correct(answered, pairs.labels).mean(-1)
    scores = PathScores(effects.reshape(*shape, -1), probability, name_of(metric))
    return HeadSweep(accuracy[1:].reshape(shape), scores, float(accuracy[0]))


class _Inputs(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: cone.CleanCache
    suffixes: Suffixes
    values: dict[str, Array]  # component -> [L, B, N, H]
    labels: Array  # [B]
    wrong_labels: Array  # [B]
    rows: Array  # [B] which of the pairs they are


@partial(jax.jit, static_argnames="config")
def _prepare(
    config: Config,
    weights: Params,
    prompts,
    suffixes: Suffixes,
    values: dict[str, Array],
    answers_of: tuple[Array, ...],
) -> _Inputs:
    at_role = {site: x[:, :, 0] for site, x in values.items()}
    return _Inputs(cone.live_cache(config, weights, prompts, suffixes), suffixes, at_role, *answers_of)


@partial(jax.jit, static_argnames=("config", "measure"))
def _run_heads(
    config: Config, weights: Params, inputs: _Inputs, heads: Array, *, measure: Function | None = None
) -> tuple[Outcome, jax.Array]:
    """Outcomes and answers, [R, B], of the heads [R]: NO_HEAD, and others in increasing order."""
    start = jnp.minimum(heads[1] // config.num_heads, max(0, config.num_layers - 2))

    def one(head):
        weight = (jnp.arange(config.num_layers * config.num_heads) == head).reshape(config.num_layers, -1)
        patches = {site: cone.HeadPatch(weight, x) for site, x in inputs.values.items()}
        x = cone.live_stream(config, weights, inputs.clean, inputs.suffixes, patches, start)
        logits = unembed(config, weights, x)
        return outcome(logits, inputs.labels, inputs.wrong_labels, inputs.rows, measure), answers(logits)

    return jax.vmap(one)(heads)


def _paper_cmap(
    base: Model,
    tuned: Model,
    pairs: Pairs,
    roles: Sequence[str],
    mask: np.ndarray,
    components: Sequence[str],
    batch_size: int | None,
    gathered: Gathered,
) -> Predictions:
    """As the published code does it, by full forward passes with patches at every token."""
    pairs = last_column(pairs)
    tokens, last = check_prompts(base.config, pairs), pairs.position("last")
    if devices_of(base.weights) != devices_of(tuned.weights):
        raise ValueError('compat="paper" runs both models in one call; load them onto the same devices.')
    size = max(1, examples_per_call(base, pairs) // base.config.num_layers) if batch_size is None else batch_size
    for start in range(0, len(pairs), size):
        rows = np.arange(start, min(start + size, len(pairs)))
        positions = positions_of(pairs.position, roles)[rows]
        if components == ("z",):  # every role but prev_query_box is taken to be the last column
            positions = np.stack(
                [x if role == "prev_query_box" else last[rows] for role, x in zip(roles, positions.T, strict=True)], 1
            )
        arguments = base.config, base.weights, tuned.weights, tokens[rows], positions, last[rows], mask
        gathered.add(rows, *_paper_answers(*arguments, components=components))
    return gathered.predictions()


@partial(jax.jit, static_argnames=("config", "components"))
def _paper_answers(
    config: Config,
    base: Params,
    tuned: Params,
    tokens: Array,
    positions: Array,
    last: Array,
    mask: Array,
    *,
    components,
) -> tuple[jax.Array, jax.Array]:
    """Answers [B] and logits [B, V] of the base model, patched as published; mask [L, R, N], positions [B, R]."""
    (batch, length), dtype = tokens.shape, config.compute_dtype
    _, theirs = forward(config, tuned, tokens, capture=components, logits_at=last)
    at_role = at_tokens(positions, mask).astype(dtype)  # [L, B, R, N]
    token = jnp.arange(length)
    here = (token == positions[..., None]).astype(dtype)  # [B, R, T]
    before = (token < positions[..., None]).astype(dtype)
    patches: dict[str, Any] = {}
    for site in components:
        where = before if site in ("k", "v") else here
        weight = jnp.minimum(jnp.einsum("lbrn,brt->lbtn", at_role, where), 1)
        patches[site] = Patch(weight, theirs[site])
    if "z" not in components:
        _, own = forward(config, base, tokens, capture=("z",), logits_at=last)
        frozen = (token < length - 1).astype(dtype)[:, None]  # [T, 1]
        patches["z"] = Patch(jnp.broadcast_to(frozen, (batch, length, 1)), own["z"])
    logits = forward(config, base, tokens, Interventions(**patches), logits_at=last)[0]
    return answers(logits), logits


def _check_components(components: Sequence[str]) -> tuple[str, ...]:
    if isinstance(components, str) or not components or set(components) - set(COMPONENTS):
        raise ValueError(f"components={components!r}; expected a tuple of {', '.join(map(repr, COMPONENTS))}.")
    return tuple(components)


def _check_same_shape(base: Model, tuned: Model) -> None:
    def shape(model):
        config = model.config
        return config.num_layers, config.num_heads, config.head_dim, config.vocab_size

    if shape(base) != shape(tuned):
        raise ValueError(
            f"base has (layers, heads, head_dim, vocabulary) = {shape(base)}, tuned {shape(tuned)}; patching across "
            "models needs a fine-tune of the same shape."
        )


def _fingerprint(tokens: np.ndarray, positions: np.ndarray) -> str:
    content = repr((tokens.shape, positions.shape)).encode() + tokens.tobytes() + positions.astype(np.int32).tobytes()
    return hashlib.sha256(content).hexdigest()


def _check_collected(config: Config, values: HeadValues, pairs: Pairs) -> None:
    """ValueError if the values are of other prompts, or of a model of another shape."""
    here = config.num_layers, len(pairs), len(values.roles), config.num_heads, config.head_dim
    for site, found in values.values.items():
        if found.shape != here:
            raise ValueError(f"The values collected of {site} have shape {found.shape}; these pairs need {here}.")
    if _fingerprint(check_prompts(config, pairs), positions_of(pairs.position, values.roles)) != values.prompts:
        raise ValueError("These values were collected of other prompts or positions; collect them of these pairs.")


def _values_of(
    base: Model, tuned: Model | HeadValues, pairs: Pairs, roles: Sequence[str], components: Sequence[str]
) -> Callable[[np.ndarray], dict[str, Array]]:
    """A function from rows of `pairs` [b] to what `tuned` computes there, {site: [L, b, R, N, H]}."""
    if isinstance(tuned, HeadValues):
        _check_collected(base.config, tuned, pairs)
        return partial(_chosen_values, tuned, [_index(tuned, role) for role in roles], components)
    _check_same_shape(base, tuned)
    source = check_prompts(tuned.config, pairs), positions_of(pairs.position, roles)
    return partial(head_values, tuned, source, sites=components)


def _index(values: HeadValues, role: str) -> int:
    if role not in values.roles:
        raise ValueError(f"Role {role!r} was not collected; these values have {', '.join(values.roles)}.")
    return values.roles.index(role)


def _chosen_values(values: HeadValues, roles: list[int], components: Sequence[str], rows: np.ndarray):
    if missing := [site for site in components if site not in values.values]:
        raise ValueError(f"Components {missing} were not collected; these values have {', '.join(values.values)}.")
    return {site: values.values[site][:, rows][:, :, roles] for site in components}
