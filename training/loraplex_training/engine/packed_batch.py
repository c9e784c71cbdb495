"""Sequences packed one after the other, so that no token of a batch is padding.

Sequences of one adapter that begin with the same tokens share them: the common head is computed
once, and the tails attend to it. This is exact, because keys and values of the head do not depend
on what follows, and their gradient is the sum over the tails. The virtual tokens of prefix tuning
are keys before all others, which come from no query.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Datum

_WORTH_IT = 8  # tokens of a common head; sharing fewer costs more than it saves
_STEP = 1.5  # ratio of the lengths of rows that attend together


class Rows(NamedTuple):
    """Rows of about one length, padded for attention alone."""

    queries: Tensor  # int64 [n · q_len], positions in the packed batch; padding repeats one
    keys: Tensor  # int64 [n · k_len], positions in the virtual tokens and the batch behind them
    starts: Tensor  # int64 [n], the number of keys before a row's first query
    q_lens: Tensor  # int64 [n]
    q_len: int
    k_len: int

    def on(self, device: torch.device) -> "Rows":
        queries, keys, starts, q_lens = (x.to(device) for x in self[:4])
        return Rows(queries, keys, starts, q_lens, self.q_len, self.k_len)


class PackedBatch(NamedTuple):
    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], in each sequence from the number of its virtual tokens
    segments: tuple[tuple[int, int], ...]  # [first, end) of each adapter's tokens
    rows: tuple[Rows, ...]
    order: Tensor  # int64 [T]: where the outputs of ``rows``, one after the other, hold each token
    answers: Tensor  # int64 [m], positions in the batch that have a loss
    targets: Tensor  # int64 [m], in the order of the data


class _Run(NamedTuple):
    """Consecutive tokens of the batch, and the keys that they follow."""

    first: int
    length: int
    key: int  # the position of its first token among all keys
    before: tuple[range, ...]  # keys: virtual tokens, and a head

    @property
    def n_before(self) -> int:
        return sum(map(len, self.before))


def pack(
    works: Sequence[Sequence[Datum]], device: torch.device, n_virtual: Sequence[int] = ()
) -> PackedBatch:
    """Pack the data of several adapters, in their order. ``n_virtual``: of each adapter."""
    all_virtual = sum(n_virtual)
    virtual = [range(end - n, end) for n, end in zip(n_virtual, accumulate(n_virtual), strict=True)]
    virtual = virtual or [range(0)] * len(works)
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    runs: list[_Run] = []
    segments: list[tuple[int, int]] = []
    answers: list[Tensor] = []
    n = 0

    def add(ids: Tensor, *before: range) -> _Run:
        nonlocal n
        run = _Run(n, len(ids), all_virtual + n, before)
        tokens.append(ids)
        positions.append(torch.arange(run.n_before, run.n_before + len(ids)))
        runs.append(run)
        n += len(ids)
        return run

    for data, prefix in zip(works, virtual, strict=True):
        began = n
        n_head = _n_common(data)
        before = [prefix]
        if n_head:
            head = add(data[0].tokens[:n_head], prefix)
            before.append(range(head.key, head.key + n_head))
        for datum in data:
            first = add(datum.tokens[n_head:], *before).first
            at = datum.weights.nonzero().squeeze(1)
            answers.append(at - n_head + first)
        segments.append((began, n))
    data = [datum for each in works for datum in each]
    rows = [_rows(group) for group in _grouped(runs)]
    outputs = torch.cat([_own(r) for r in rows])
    order = torch.empty(n, dtype=torch.long)
    order[outputs[:, 0]] = outputs[:, 1] + _offsets(rows)
    return PackedBatch(
        torch.cat(tokens).to(device),
        torch.cat(positions).to(device),
        tuple(segments),
        tuple(r.on(device) for r in rows),
        order.to(device),
        torch.cat(answers).to(device),
        torch.cat([d.targets[d.weights != 0] for d in data]).to(device),
    )


def _n_common(data: Sequence[Datum]) -> int:
    """Return the number of first tokens that all data share and that no loss is at."""
    if len(data) < 2:
        return 0
    n = min(min(d.n_quiet, len(d) - 1) for d in data)
    first = data[0].tokens[:n]
    for datum in data[1:]:
        differing = (datum.tokens[:n] != first[:n]).nonzero()
        n = min(n, int(differing[0]) if len(differing) else n)
    return n if n >= _WORTH_IT else 0


def _grouped(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Return the runs in groups of similar numbers of queries and keys."""
    groups: list[list[_Run]] = []
    for run in sorted(runs, key=lambda r: (-r.length - r.n_before, -r.length)):
        longest = groups[-1][0] if groups else None
        if longest is not None and (
            longest.length + longest.n_before <= _STEP * (run.length + run.n_before)
            and max(longest.length, run.length) <= _STEP * min(longest.length, run.length) + 4
        ):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _rows(runs: Sequence[_Run]) -> Rows:
    q_len = max(run.length for run in runs)
    k_len = max(run.length + run.n_before for run in runs)
    queries, keys = [], []
    for run in runs:
        own = torch.arange(run.first, run.first + run.length)
        ranges = (*run.before, range(run.key, run.key + run.length))
        both = torch.cat([torch.arange(each.start, each.stop) for each in ranges])
        queries.append(torch.nn.functional.pad(own, (0, q_len - len(own)), value=run.first))
        keys.append(torch.nn.functional.pad(both, (0, k_len - len(both)), value=run.key))
    return Rows(
        torch.cat(queries),
        torch.cat(keys),
        torch.tensor([run.n_before for run in runs]),
        torch.tensor([run.length for run in runs]),
        q_len,
        k_len,
    )


def _own(rows: Rows) -> Tensor:
    """Return [tokens, 2]: each token of the rows, and its place among their padded queries."""
    n = len(rows.q_lens)
    real = (torch.arange(rows.q_len) < rows.q_lens[:, None]).flatten()
    places = torch.arange(n * rows.q_len)[real]
    return torch.stack([rows.queries[real], places], 1)


def _offsets(rows: Sequence[Rows]) -> Tensor:
    """Return for each real token of the rows the number of padded queries of earlier rows."""
    offsets, before = [], 0
    for each in rows:
        offsets.append(torch.full((int(each.q_lens.sum()),), before))
        before += len(each.queries)
    return torch.cat(offsets)
