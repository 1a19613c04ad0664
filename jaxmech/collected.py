"""`HeadValues`: what a model's heads compute on some prompts, kept on the host for patching them into another model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.files import replacing
from jaxmech.loading import Model, check_prompts
from jaxmech.pairs import Pairs, one_or_more, positions_of
from jaxmech.patching import captured_heads
from jaxmech.sharding import row_devices

COMPONENTS = ("z", "q", "k", "v")
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
    roles: str | Iterable[str],
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
      roles: the roles at which heads will be patched, or one.
      components: the activations to keep: any of "z", "q", "k" and "v".
      batch_size: examples in one call; None picks as many as fit the memory budget.
    """
    components = check_components(components)
    roles = tuple(one_or_more(roles if isinstance(roles, str) else list(roles), "roles"))
    source = check_prompts(model.config, pairs), positions_of(pairs.position, roles)
    if batch_size is None:
        batch_size = memory.fitting_prompts(model.config, model.weights, pairs.clean.shape[1])
    parts = list(equal_parts(len(pairs), batch_size, row_devices(model.weights)))
    found = list(map(jax.device_get, captured_heads(model, source, [rows for rows, _ in parts], sites=components)))
    kept = {
        site: np.concatenate([x[site][:, new] for x, (_, new) in zip(found, parts, strict=True)], axis=1)
        for site in components
    }
    return HeadValues(kept, roles, _fingerprint(*source))


def check_components(components: Sequence[str]) -> tuple[str, ...]:
    """The components as a tuple; ValueError unless they are some of COMPONENTS."""
    if isinstance(components, str) or not components or set(components) - set(COMPONENTS):
        raise ValueError(f"components={components!r}; expected a tuple of {', '.join(map(repr, COMPONENTS))}.")
    return tuple(components)


def check_same_shape(base: Model, tuned: Model) -> None:
    """ValueError unless heads of one model fit into the other."""
    ours, theirs = base.config.patched_shape, tuned.config.patched_shape
    if ours != theirs:
        raise ValueError(
            f"base has (layers, heads, head_dim, vocabulary) = {ours}, tuned {theirs}; patching across models needs a "
            "fine-tune of the same shape."
        )


def values_of(
    base: Model, tuned: Model | HeadValues, pairs: Pairs, roles: Sequence[str], components: Sequence[str]
) -> Callable[[Sequence[np.ndarray]], Iterator[dict[str, Array]]]:
    """A function from parts of `pairs`, rows [b], to what `tuned` computes in each, {site: [L, b, R, N, H]}."""
    if isinstance(tuned, HeadValues):
        _check_collected(base.config, tuned, pairs)
        return partial(map, partial(_chosen_values, tuned, [_index(tuned, role) for role in roles], components))
    check_same_shape(base, tuned)
    source = check_prompts(tuned.config, pairs), positions_of(pairs.position, roles)
    return partial(captured_heads, tuned, source, sites=components)


def _check_collected(config: Config, values: HeadValues, pairs: Pairs) -> None:
    """ValueError if the values are of other prompts, or of a model of another shape."""
    here = config.num_layers, len(pairs), len(values.roles), config.num_heads, config.head_dim
    for site, found in values.values.items():
        if found.shape != here:
            raise ValueError(f"The values collected of {site} have shape {found.shape}; these pairs need {here}.")
    if _fingerprint(check_prompts(config, pairs), positions_of(pairs.position, values.roles)) != values.prompts:
        raise ValueError("These values were collected of other prompts or positions; collect them of these pairs.")


def _fingerprint(tokens: np.ndarray, positions: np.ndarray) -> str:
    content = repr((tokens.shape, positions.shape)).encode() + tokens.tobytes() + positions.astype(np.int32).tobytes()
    return hashlib.sha256(content).hexdigest()


def _index(values: HeadValues, role: str) -> int:
    if role not in values.roles:
        raise ValueError(f"Role {role!r} was not collected; these values have {', '.join(values.roles)}.")
    return values.roles.index(role)


def _chosen_values(values: HeadValues, roles: list[int], components: Sequence[str], rows: np.ndarray):
    if missing := [site for site in components if site not in values.values]:
        raise ValueError(f"Components {missing} were not collected; these values have {', '.join(values.values)}.")
    return {site: values.values[site][:, rows][:, :, roles] for site in components}
