"""Samples: the lines of a training file as tokens, and the order in which steps take them."""

import random
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from loraplex_training.engine.data import Datum
from loraplex_training.errors import ExamplesError
from loraplex_training.examples import Chat, tokenise

from .training_lines import TrainingLine

_N_PROMPTS = 8
_MAX_PROMPT = 500  # characters

Sample = tuple[Datum, ...]
"""A sample is one datum for supervised, and two for dpo: the preferred answer and the other."""


def sample_of(
    line: TrainingLine, tokenizer: PreTrainedTokenizerBase, *, max_len: int, where: str
) -> Sample:
    """Tokenise a line. The weights are 1 where the assistant's text is learnt.

    Raises ExamplesError, which says ``where``, also if the template shows nothing to learn.
    """
    data = []
    for chat in line.chats:
        example = tokenise(chat, tokenizer, max_len=max_len, where=where, learns=line.learns)
        if not any(example.learn[1:]):
            raise ExamplesError(f"{where} has nothing to learn: the chat template omits its answer")
        data.append(Datum.of_chat(example.tokens, example.learn))
    return tuple(data)


class TrainingData(NamedTuple):
    samples: list[Sample]
    held_out: list[Sample]
    sha256: str  # of the file or the chats
    prompts: tuple[str, ...]  # of the first examples, for the card


def first_prompts(chats: Sequence[Chat]) -> tuple[str, ...]:
    """Return the first text of the user in each of the first chats, once."""
    texts = (
        next((m["content"] for m in chat.messages if m["role"] == "user"), None)
        for chat in islice(chats, _N_PROMPTS)
    )
    return tuple(dict.fromkeys(text[:_MAX_PROMPT] for text in texts if text is not None))


def n_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(datum) for sample in samples for datum in sample)


def first(samples: Sequence[Sample], max_tokens: int) -> Sequence[Sample]:
    """Return the first samples of at most ``max_tokens`` together, and at least one."""
    totals = accumulate(n_tokens([sample]) for sample in samples)
    return samples[: max(1, sum(total <= max_tokens for total in totals))]


class Position(NamedTuple):
    epoch: int  # from 0
    samples: list[int]  # indices of a batch
    ends_epoch: bool


class SampleOrder:
    """The batches of all steps, given by the seed. Each epoch has every sample once."""

    def __init__(self, n_samples: int, batch_size: int, seed: int) -> None:
        self._n, self._size, self._seed = n_samples, batch_size, seed
        self._epoch, self._order = -1, list[int]()

    @property
    def epoch_steps(self) -> int:
        return -(-self._n // self._size)

    def at(self, step: int) -> Position:
        """Return the batch of a step, counted from 0."""
        epoch, i = divmod(step, self.epoch_steps)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self._n))
            random.Random(f"{self._seed}-{epoch}").shuffle(self._order)
        batch = self._order[i * self._size : (i + 1) * self._size]
        return Position(epoch, batch, i + 1 == self.epoch_steps)
