"""The prompts of a study of another task: pairs from a file, some to be evaluated, the others to average over.

Desiderata are pairs from files of their own: base prompts, counterfactual prompts, and the tokens that they predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.ablation import RoleMeans, role_means
from jaxmech.loading import Model
from jaxmech.pairs import Pairs
from jaxmech.study.chains import check_chain_on
from jaxmech.study.settings import RANDOM, Settings
from jaxmech.text_pairs import TextPair, pairs_of, read_texts

LEAST = 3  # pairs in a file: two thirds are evaluated, a third are contexts of ablated activations
LEAST_OF_A_DESIDERATUM = 4  # of which half are for training
SAMPLE = 20  # pairs of each file whose prompts all tokenizers must read alike


def sample(settings: Settings) -> list[str]:
    """Prompts of a study as text, with their answers."""
    found = []
    for pair in [pair for file in _files(settings) for pair in _texts(file, LEAST)[:SAMPLE]]:
        answer = pair.answer if isinstance(pair.answer, str) else ""
        found += [f"{pair.clean}{settings.between}{answer}", str(pair.corrupt)]
    return found


def _files(settings: Settings) -> list[Path]:
    """Those of the pairs and of the desiderata."""
    assert settings.pairs is not None
    return [settings.pairs, *settings.desiderata]


def _texts(file: Path, least: int) -> list[TextPair]:
    """What is in a file."""
    texts = read_texts(file)
    if texts[0].corrupt is None:
        raise ValueError(f'{file} has no "corrupt" prompts; a study needs one for each clean prompt.')
    if len(texts) < least:
        raise ValueError(f"{file} has {len(texts)} pairs; a study needs at least {least}, and good numbers many more.")
    return texts


@dataclass(frozen=True)
class PairsData:
    """Prompts for one tokenizer."""

    settings: Settings
    tokenizer: Any
    chance = None  # nobody knows what naming any answer would be right for

    def check(self, *, contexts: bool, desiderata: bool) -> None:
        """Checks that the prompts can be read and have the roles that are asked for.

        Args:
          contexts: activations are averaged; there are always prompts for that.
          desiderata: DCM is trained, or its heads are patched.

        Raises:
          ValueError: as `pairs_of`; or a role of the chain, or of attention that is knocked out, that the pairs lack.
        """
        settings, roles = self.settings, list(self.pairs.positions)
        check_chain_on(roles, settings.chain, settings.k, settings.min_effect, settings.metric)
        if settings.metric == "logit_difference" and self.pairs.wrong_labels is None:
            raise ValueError(f'metric="logit_difference", but {settings.pairs} has no "wrong_answer".')
        for source, target in self.edges:
            if source not in roles or target not in (*roles, RANDOM):
                raise ValueError(
                    f"edges has {(source, target)}; expected roles of these pairs ({', '.join(roles)}), the target may "
                    f"be {RANDOM!r}, too."
                )
        for name, found in self._counterfactuals.items() if desiderata else ():
            senders = {stage.sender for stage in settings.chain}
            if missing := sorted(senders - found.positions.keys()):
                raise ValueError(f"The desideratum {name!r} lacks the roles {missing}, at which the chain finds heads.")

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs are evaluated, and which are contexts. The longest prompt is one of these: it has all positions.

        Which others is drawn, so that the order of the file does not matter.
        """
        settings, count, last = self.settings, len(self._all), self._all.position("last")
        order = np.random.default_rng(settings.seed).permutation(count)
        order = np.append(order[order != last.argmax()], last.argmax())
        evaluated = count - count // LEAST
        contexts = order[max(evaluated, count - settings.contexts) :]
        return np.sort(order[:evaluated][: settings.prompts]), np.sort(contexts)

    @cached_property
    def _all(self) -> Pairs:
        assert self.settings.pairs is not None
        return self._read(self.settings.pairs, LEAST)

    def _read(self, file: Path, least: int) -> Pairs:
        how = {name: getattr(self.settings, name) for name in ("first_token", "between", "add_bos")}
        try:
            return pairs_of(_texts(file, least), self.tokenizer, **how)
        except ValueError as error:
            raise error if str(error).startswith(str(file)) else ValueError(f"{file}: {error}") from error

    @cached_property
    def pairs(self) -> Pairs:
        """The prompts on which circuits are found and evaluated."""
        return self._all[self._split[0]]

    @cached_property
    def contexts(self) -> Pairs:
        """Those over which ablated activations are averaged."""
        return self._all[self._split[1]]

    @property
    def example(self) -> str:
        """The first that is evaluated as text, with its answer."""
        assert self.settings.pairs is not None
        return read_texts(self.settings.pairs)[self._split[0][0]].sentence

    def means(self, model: Model) -> RoleMeans:
        """What ablated heads put out: z averaged over the contexts, by role and by position."""
        return role_means(model, self.contexts, batch_size=self.settings.batch_size)

    @property
    def edges(self) -> Sequence[tuple[str, str]]:
        """Attention that is knocked out, (source, target): from each role to those before it in every prompt.

        And from the last token to a random one, where there are any.
        """
        if self.settings.edges is not None:
            return self.settings.edges
        at = self.pairs.positions
        found = [(source, target) for source in at for target in at if (at[target] < at[source]).all()]
        return [*found, *[("last", RANDOM)] * bool((at["last"] > 0).all())]

    @property
    def desiderata(self) -> tuple[str, ...]:
        """Names of those that every group of a circuit is tried on: their files'."""
        return tuple(path.stem for path in self.settings.desiderata)

    @property
    def variants(self) -> tuple[str, ...]:
        """None."""
        return ()

    def desideratum(self, name: str) -> dict[str, Pairs]:
        """Pairs of a desideratum for DCM, "train", "validation" and "test", equally many of each desideratum."""
        return {use: self._counterfactuals[name][rows] for use, rows in self._uses(name).items()}

    def patching(self, name: str, repeat: int) -> Pairs:
        """Pairs of a desideratum for one repeat of activation patching, drawn from those on which DCM is tested."""
        test, settings = self._uses(name)["test"], self.settings
        chosen = np.random.default_rng([settings.seed, repeat]).permutation(test)[: settings.patched]
        return self._counterfactuals[name][np.sort(chosen)]

    @cached_property
    def _counterfactuals(self) -> dict[str, Pairs]:
        """All pairs of each desideratum."""
        return {path.stem: self._read(path, LEAST_OF_A_DESIDERATUM) for path in self.settings.desiderata}

    def _uses(self, name: str) -> dict[str, np.ndarray]:
        """Which pairs of a desideratum are for what: as the sizes of DCM are, of as many as the smallest file has."""
        settings, fewest = self.settings, min(map(len, self._counterfactuals.values()))
        order = np.random.default_rng(settings.seed).permutation(len(self._counterfactuals[name]))
        share = min(1, fewest / (settings.train + settings.validation + settings.test))
        validation = max(1, min(int(share * settings.validation), fewest - 2))
        test = max(1, min(int(share * settings.test), fewest - validation - 1))
        train = min(settings.train, fewest - validation - test)
        parts = np.split(order, [train, train + validation, train + validation + test])
        return dict(zip(("train", "validation", "test"), map(np.sort, parts), strict=False))
