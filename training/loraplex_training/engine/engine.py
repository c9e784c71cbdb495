"""Forward and backward of many adapters over one frozen base, and steps of their optimisers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .adapter import Adam, LearningAdapter, LoraShape
from .data import Datum, Loss
from .losses import cross_entropy
from .packed_batch import PackedBatch, pack

if TYPE_CHECKING:
    from .frozen_model import FrozenModel

BATCH_TOKENS = 1024  # of one forward: more would need memory and gain no speed
_PENALISED = 32  # answers of an adapter in a batch whose logits a penalty sees


class Work(NamedTuple):
    """Data whose loss goes to one adapter."""

    adapter: LearningAdapter
    data: Sequence[Datum]
    loss: Loss = cross_entropy


@dataclass(slots=True)
class Outcome:
    loss: float = 0.0  # summed over the data
    n_tokens: int = 0
    logprobs: list[Tensor] = field(default_factory=list)
    """Log-probabilities of each datum's targets, float32 [n] on the CPU; 0 without a loss."""
    right: list[bool] = field(default_factory=list)
    """A flag is True if greedy decoding gives all targets of its datum that have a loss."""
    n_right: int = 0  # targets with a loss that greedy decoding gives


class TrainingEngine:
    """Owned by one thread."""

    def __init__(self, model: "FrozenModel") -> None:
        self.model = model
        self.n_forwards = self.n_shared = 0  # shared: forwards of several adapters

    def new_adapter(self, shape: LoraShape, seed: int) -> LearningAdapter:
        return LearningAdapter.fresh(shape, self.model.linears, seed, str(self.model.device))

    def load_adapter(self, folder: Path) -> LearningAdapter:
        """Read a plain LoRA of PEFT to learn further. Raises TrainingError."""
        return LearningAdapter.load(folder, str(self.model.device))

    def forward_backward(self, works: Sequence[Work], *, backward: bool = True) -> list[Outcome]:
        """Return the losses of works, and add to the gradients of their adapters.

        Data of different works run in one forward where they fit. An adapter's results do not
        depend on the works beside it, but for rounding.
        """
        outcomes = [Outcome() for _ in works]
        if backward:
            for work in works:
                work.adapter.saw(partial(self.forward_backward, (work,)))
        with torch.set_grad_enabled(backward):
            for pieces in batches(works):
                self._batch(works, pieces, outcomes, backward)
        return outcomes

    def step(self, adapter: LearningAdapter, adam: Adam) -> float:
        """Do a step of Adam with the gradients, forget them, and return their norm."""
        return adapter.step(adam)

    def release(self) -> None:
        """Release memory that only speeds up the next batches."""
        self.model.release()

    def _batch(
        self,
        works: Sequence[Work],
        pieces: Sequence[tuple[int, Sequence[Datum]]],
        outcomes: list[Outcome],
        backward: bool,
    ) -> None:
        adapters = [works[i].adapter for i, _ in pieces]
        data_of_each = [data for _, data in pieces]
        n_virtual = [0 if a.prefix is None else len(a.prefix) for a in adapters]
        batch = pack(data_of_each, self.model.device, n_virtual)
        # This comes before the adapters' own states: layers that are computed again in the backward
        # read the segments of the last forward.
        base = self._base_states(data_of_each, adapters) if backward else None
        hidden = self.model.hidden(batch, adapters, learning=backward)
        answers = hidden.index_select(0, batch.answers)
        of_answers, hits = self.model.head.logprobs(answers, batch.targets)
        self.n_forwards += 1
        self.n_shared += len(pieces) > 1
        n_answers = [datum.n_answers for _, data in pieces for datum in data]
        parts = iter(torch.split(of_answers.cpu(), n_answers))
        right = iter(torch.split(hits.cpu(), n_answers))
        losses = []
        for i, data in pieces:
            for datum in data:
                full = torch.zeros(len(datum)).index_put(
                    (datum.weights.nonzero().squeeze(1),), next(parts)
                )
                loss = works[i].loss(full, datum)
                losses.append(loss)
                outcomes[i].loss += float(loss.detach())
                outcomes[i].n_tokens += len(datum)
                outcomes[i].logprobs.append(full.detach())
                greedy = next(right)
                outcomes[i].right.append(bool(greedy.all()))
                outcomes[i].n_right += int(greedy.sum())
        if backward:
            losses += self._router_penalties(works, pieces, batch)
        if base is not None:
            own, theirs = (torch.split(states, n_answers) for states in (answers, base))
            losses += self._penalties(works, pieces, own, theirs)
        if backward and losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def _base_states(
        self, data: Sequence[Sequence[Datum]], adapters: Sequence[LearningAdapter]
    ) -> Tensor | None:
        """Return the base's states at the answers if an adapter has a penalty, which needs them."""
        if all(adapter.penalty is None for adapter in adapters):
            return None
        batch = pack(data, self.model.device)
        with torch.no_grad():
            states = self.model.hidden(batch, [LearningAdapter(a.shape, {}) for a in adapters])
        return states.index_select(0, batch.answers)

    def _penalties(
        self,
        works: Sequence[Work],
        pieces: Sequence[tuple[int, Sequence[Datum]]],
        answers: tuple[Tensor, ...],
        base: tuple[Tensor, ...],
    ) -> list[Tensor]:
        """Return the penalties of adapters that have one, weighted like their data's losses.

        ``answers`` and ``base``: the states at the answers of each datum.
        """
        terms, first = [], 0
        for i, data in pieces:
            adapter, end = works[i].adapter, first + len(data)
            if adapter.penalty is not None:
                own, theirs = (torch.cat(s[first:end])[:_PENALISED] for s in (answers, base))
                term = adapter.penalty(self.model.head.logits(own), self.model.head.logits(theirs))
                terms.append(_weight(data) * term.cpu())
            first = end
        return terms

    def _router_penalties(
        self,
        works: Sequence[Work],
        pieces: Sequence[tuple[int, Sequence[Datum]]],
        batch: PackedBatch,
    ) -> list[Tensor]:
        """Return the penalties of routers, weighted like their data's losses."""
        terms = []
        for (i, data), segment in zip(pieces, batch.segments, strict=True):
            adapter = works[i].adapter
            if not adapter.experts:
                continue
            term = adapter.router_penalty(self.model.router_logits(segment))
            if term is not None:
                terms.append(_weight(data) * term.cpu())
        return terms


def _weight(data: Sequence[Datum]) -> float:
    return float(sum(datum.weights.sum() for datum in data))


def batches(works: Sequence[Work]) -> list[list[tuple[int, list[Datum]]]]:
    """Return batches of (index of a work, some of its data), each of about equal size."""
    batches: list[list[tuple[int, list[Datum]]]] = []
    room = 0
    for i, work in enumerate(works):
        for datum in work.data:
            if len(datum) > room or not batches:
                batches.append([])
                room = BATCH_TOKENS
            if not batches[-1] or batches[-1][-1][0] != i:
                batches[-1].append((i, []))
            batches[-1][-1][1].append(datum)
            room -= len(datum)
    return batches
