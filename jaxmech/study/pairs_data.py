"""The prompts of a study of another task: pairs from a file, some to be evaluated, the others to average over."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxmech.ablation import RoleMeans, role_means
from jaxmech.loading import Model
from jaxmech.pairs import Pairs
from jaxmech.study.chains import check_chain_on
from jaxmech.study.settings import RANDOM, Settings
from jaxmech.text_pairs import TextPair, pairs_of, read_texts

LEAST = 3  # pairs in a file: two thirds are evaluated, a third are contexts of ablated activations
SAMPLE = 20  # pairs whose prompts all tokenizers must read alike


def sample(settings: Settings) -> list[str]:
    """Prompts of a study as text, with their answers."""
    found = []
    for pair in _texts(settings)[:SAMPLE]:
        answer = pair.answer if isinstance(pair.answer, str) else ""
        found += [f"{pair.clean}{settings.between}{answer}", str(pair.corrupt)]
    return found


def _texts(settings: Settings) -> list[TextPair]:
    """What is in the file."""
    assert settings.pairs is not None
    texts = read_texts(settings.pairs)
    if texts[0].corrupt is None:
        raise ValueError(f'{settings.pairs} has no "corrupt" prompts; path patching needs one for each clean prompt.')
    if len(texts) < LEAST:
        raise ValueError(
            f"{settings.pairs} has {len(texts)} pairs; a study needs at least {LEAST}, and good means many more."
        )
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
          desiderata: there are none, so that no stage that is run uses them.

        Raises:
          ValueError: as `pairs_of`; or a role of the chain, or of attention that is knocked out, that the pairs lack.
        """
        assert not desiderata
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
        how = {name: getattr(self.settings, name) for name in ("first_token", "between", "add_bos")}
        return pairs_of(_texts(self.settings), self.tokenizer, **how)

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
        return _texts(self.settings)[self._split[0][0]].sentence

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
