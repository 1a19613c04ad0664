"""The chain of a circuit discovery: a list of stages, the paper's (Prakash et al. 2024, section 3.2) or a TOML file.

Owns what a stage is, and what is checked of a chain without prompts. It runs nothing; see `jaxmech.discovery`.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path

from jaxmech.config import Config

NAMES_OF_NUMPY = ("file", "allow_pickle")  # arguments of numpy.savez, which takes arrays by name


@dataclass(frozen=True)
class Stage:
    """One sweep of the chain.

    Attributes:
      group: name of the head group that this stage finds.
      sender: role at which senders are patched, and at which the group acts.
      receivers: name of an earlier group whose heads read the change, or names of several, whose heads read it
        together; None: the logits. They read it at the role `sender` too, wherever their own group acts: values that
        later tokens attend to, for instance.
      via: the receivers' input that is patched, "q", "k" or "v"; None without receivers.
      k: at most how many heads are selected.

    Raises:
      ValueError: a group that cannot name a file, a sender or receivers that are no names, receivers without `via` or
        the reverse, or k is no number from 1 on.
    """

    group: str
    sender: str
    receivers: str | Sequence[str] | None = None
    via: str | None = None
    k: int = 5

    def __post_init__(self):
        if not isinstance(self.group, str) or not re.fullmatch(r"\w[\w +-]*", self.group):
            raise ValueError(
                f"group {self.group!r}: files and arrays are named by groups; expected a letter or digit, and then "
                "letters, digits, spaces and _ + - only."
            )
        if self.group in NAMES_OF_NUMPY:
            raise ValueError(f"group {self.group!r}: numpy.savez has this name for itself; choose another.")
        if not isinstance(self.sender, str) or not self.sender:
            raise ValueError(f"stage {self.group!r}: sender={self.sender!r}; expected the name of a role.")
        object.__setattr__(self, "receivers", _one_or_several(self.group, self.receivers))
        if (self.receivers is None) != (self.via is None) or self.via not in (None, "q", "k", "v"):
            raise ValueError(
                f"stage {self.group!r}: receivers={self.receivers!r} with via={self.via!r}; expected via "
                "'q', 'k' or 'v' with receivers, and neither for the logits."
            )
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"stage {self.group!r}: k={self.k!r}; expected a whole number from 1 on.")
        object.__setattr__(self, "k", int(self.k))

    @property
    def receiver_groups(self) -> tuple[str, ...]:
        """The names of the receivers' groups, none for the logits."""
        return (self.receivers,) if isinstance(self.receivers, str) else tuple(self.receivers or ())

    @property
    def reads(self) -> str:
        """Where the change is read, in words."""
        return "the logits" if self.receivers is None else f"{self.via} of {receivers_text(self.receivers)}"


def _one_or_several(group: str, receivers: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """A single name as it is, several as a tuple: so they are equal, and equally written, however they were given."""
    names = (receivers,) if receivers is None or isinstance(receivers, str) else receivers
    several = isinstance(names, list | tuple) and len(names) > 0
    if receivers is not None and not (several and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"stage {group!r}: receivers={receivers!r}; expected the name of an earlier group, or a list of such names."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"stage {group!r}: receivers={receivers!r} names a group twice.")
    return names[0] if len(names) == 1 else tuple(names)


def receivers_text(receivers: str | Sequence[str]) -> str:
    """The receivers of a stage, one name or several, in words."""
    return receivers if isinstance(receivers, str) else " and ".join(receivers)


PAPER_CHAIN = (
    Stage("value_fetcher", "last", k=20),
    Stage("pos_transmitter", "last", "value_fetcher", "q", k=5),
    Stage("pos_detector", "query_box", "pos_transmitter", "v", k=10),
    Stage("struct_reader", "prev_query_box", "pos_detector", "v", k=5),
)


def read_chain(path: str | Path) -> tuple[Stage, ...]:
    """Reads a chain from the TOML file `path`: one [[stage]] table per stage, with the fields of `Stage`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not TOML, an unknown or missing field, or stages that do not fit together (see `check_chain`).
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        tables, names = table.pop("stage", []), [field.name for field in fields(Stage)]
        if unknown := sorted({key for stage in tables for key in stage} - set(names)):
            raise ValueError(f"unknown keys {unknown} in a [[stage]]; expected {', '.join(names)}")
        stages = tuple(Stage(**stage) for stage in tables)
        if table:
            raise ValueError(f"unknown tables {sorted(table)}; expected [[stage]] tables only")
        check_chain(stages)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a chain of stages: {error}") from error
    return stages


def check_chain(chain: Sequence[Stage]) -> None:
    """Refuses a chain whose stages cannot be run one after another.

    Raises:
      ValueError: it is empty, a group occurs twice, or receivers are none of the earlier groups.
    """
    if not chain:
        raise ValueError("the chain has no stages; expected [[stage]] tables with group, sender, receivers, via and k.")
    earlier: list[str] = []
    for stage in chain:
        if stage.group in earlier:
            raise ValueError(f"group {stage.group!r} occurs twice in the chain.")
        if unknown := [name for name in stage.receiver_groups if name not in earlier]:
            raise ValueError(
                f"stage {stage.group!r}: there is no earlier group {receivers_text(unknown)} for its receivers; the "
                f"groups before it are {earlier}."
            )
        earlier.append(stage.group)


def with_k(chain: Sequence[Stage], k: Mapping[str, int]) -> tuple[Stage, ...]:
    """The chain with other numbers of heads, {group: k}. ValueError for unknown groups, and as `check_chain`."""
    names = [stage.group for stage in chain]
    if unknown := sorted(set(k) - set(names)):
        raise ValueError(f"k names the groups {unknown}; the chain has {names}.")
    chain = tuple(replace(stage, k=k.get(stage.group, stage.k)) for stage in chain)
    check_chain(chain)
    return chain


def check_number_of_heads(chain: Sequence[Stage], config: Config) -> None:
    """ValueError if a stage is to select more heads than the model has."""
    heads = config.num_layers * config.num_heads
    for stage in chain:
        if stage.k > heads:
            raise ValueError(
                f"stage {stage.group!r}: k={stage.k}, but the model has {heads} heads "
                f"({config.num_layers} layers x {config.num_heads}). Choose a smaller k."
            )
