"""The prompts of a study of another task: pairs from a file, some to be evaluated, the others to average over.

Desiderata are pairs from files of their own: base prompts, counterfactual prompts, and the tokens that they predict.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.ablation import RoleMeans, role_means
from jaxmech.config import Config
from jaxmech.discovery import check_one_name
from jaxmech.knockout import blocked, random_target
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.metrics import check_measure
from jaxmech.pairs import Pairs
from jaxmech.study.chains import check_chain_on
from jaxmech.study.settings import RANDOM, Settings
from jaxmech.text_pairs import TextPair, pairs_of, read_texts
from jaxmech.tokenized import continuation

LEAST = 3  # different clean prompts in a file
CONTEXTS = 3  # one in so many is not evaluated, but a context of ablated activations
LEAST_OF_A_DESIDERATUM = 4  # pairs, of which half are for training


@dataclass(frozen=True)
class PairsData:
    """Prompts for one tokenizer."""

    settings: Settings
    tokenizer: Any
    chance = None  # nobody knows what naming any answer would be right for

    @staticmethod
    def sample(settings: Settings) -> list[str]:
        """Prompts as text, with their answers: all."""
        assert settings.pairs is not None
        found: list[str] = []
        for pair in [pair for file in (settings.pairs, *settings.desiderata) for pair in _texts(file)]:
            answers = [answer for answer in (pair.answer, pair.wrong_answer) if isinstance(answer, str)]
            found += [pair.clean + continuation(answer, settings.between) for answer in answers]
            found += [pair.clean, str(pair.corrupt)]
        return list(dict.fromkeys(found))

    def check(self, config: Config, uses: Collection[str]) -> None:
        """Checks that the prompts can be read, and are such that all stages can end.

        Args:
          config: that of the models.
          uses: "desiderata" if DCM is trained or its heads are patched.

        Raises:
          ValueError: as `pairs_of`, `path_patch` and `knockout`; too few prompts, a role that is named as a random
            token is, or a role of the chain that desiderata lack.
        """
        settings, roles = self.settings, list(self.pairs.positions)
        if RANDOM in roles:
            raise ValueError(f"A role is named {RANDOM!r}, as a random token is; choose another name.")
        check_chain_on(roles, settings.chain, settings.k, settings.min_effect, settings.metric)
        sets = self._counterfactuals if "desiderata" in uses else {}
        for pairs in (self.pairs, self.contexts, *sets.values()):
            check_prompts(config, pairs)
            check_tokens(config, np.asarray(pairs.corrupt))
        for metric in (settings.metric, settings.measure):
            check_measure(metric, None, self.pairs, config.vocab_size)
        check_one_name(self.pairs, settings.chain)
        for source, target in self.edges:
            blocked(self.pairs, source, random_target(self.pairs, source) if target == RANDOM else target)
        senders = {stage.sender for stage in settings.chain}
        for name, found in sets.items():
            if missing := sorted(senders - found.positions.keys()):
                raise ValueError(f"The desideratum {name!r} lacks the roles {missing}, at which the chain finds heads.")

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs are evaluated, and which are contexts, one of each clean prompt that is not evaluated.

        They are drawn from the distinct clean prompts. The longest is a context, so that all positions have one.
        """
        settings, whole = self.settings, self._all
        rng, (first, owner) = np.random.default_rng(settings.seed), _distinct(whole)
        longest = whole.position("last")[first].argmax()
        order = rng.permutation(len(first))
        order = np.append(longest, order[order != longest])
        contexts = order[: len(first) // CONTEXTS]
        evaluated = np.flatnonzero(~np.isin(owner, contexts))
        evaluated = rng.permutation(evaluated)[: settings.prompts]
        return np.sort(evaluated), np.sort(first[contexts[: settings.contexts]])

    @cached_property
    def _written(self) -> list[TextPair]:
        assert self.settings.pairs is not None
        return _texts(self.settings.pairs)

    @cached_property
    def _all(self) -> Pairs:
        found = self._tokens(self._written)
        if (count := len(_distinct(found)[0])) < LEAST:
            raise ValueError(
                f"{self.settings.pairs} has {count} different clean prompts; a study needs at least {LEAST}, and for "
                "good numbers many more."
            )
        return found

    def _tokens(self, texts: Sequence[TextPair]) -> Pairs:
        how = {name: getattr(self.settings, name) for name in ("first_token", "between", "add_bos")}
        return pairs_of(texts, self.tokenizer, **how)

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
        return self._written[self._split[0][0]].sentence

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
        found = {path.stem: self._tokens(_texts(path)) for path in self.settings.desiderata}
        for path in self.settings.desiderata:
            if (count := len(found[path.stem])) < LEAST_OF_A_DESIDERATUM:
                raise ValueError(f"{path} has {count} pairs; DCM needs at least {LEAST_OF_A_DESIDERATUM}.")
        return found

    def _uses(self, name: str) -> dict[str, np.ndarray]:
        """Which pairs of a desideratum are for what: as the sizes of DCM are, of as many as the smallest file has.

        Pairs of one base prompt stand together, so that at most one base prompt is in a part and in the next one, too.
        """
        settings, fewest = self.settings, min(map(len, self._counterfactuals.values()))
        first, owner = _distinct(self._counterfactuals[name])
        order = np.argsort(np.random.default_rng(settings.seed).permutation(len(first))[owner], kind="stable")
        share = min(1, fewest / (settings.train + settings.validation + settings.test))
        validation = max(1, min(int(share * settings.validation), fewest - 2))
        test = max(1, min(int(share * settings.test), fewest - validation - 1))
        train = min(settings.train, fewest - validation - test)
        parts = np.split(order, [train, train + validation, train + validation + test])
        return dict(zip(("train", "validation", "test"), map(np.sort, parts), strict=False))


def _texts(file: Path) -> list[TextPair]:
    return read_texts(file, corrupt=True)


def _distinct(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The first pair of each distinct clean prompt, and which of these prompts each pair has, [B]."""
    _, first, owner = np.unique(pairs.clean, axis=0, return_index=True, return_inverse=True)
    return first, owner.reshape(-1)
