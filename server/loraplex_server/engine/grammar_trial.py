"""A first compilation of a grammar that nobody knows, in a process that may be killed.

llguidance limits most of what a grammar costs, but not all: three thousand rules in a chain
overflow its stack, and ``multipleOf: 1000003`` compiles for seconds (ADR 13).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from .grammar import GrammarRefused, GrammarSpec, TokenTrie

__all__ = ["read_tokens", "try_grammar"]

_STACK_BYTES = 1 << 20  # the server's threads have at least twice as much
_N_STEPS = 8
_STEP_S = 0.2  # of CPU: every neighbour in the batch waits for the slowest grammar


def read_tokens(tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Before the trials of a process: takes as long as its largest grammars."""
    _trie(tokenizer_path, vocab_size, tuple(eos_token_ids))


def try_grammar(
    tokenizer_path: str,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    text: str,
    after: str | None,
    may_be_gbnf: bool,
) -> tuple[str, str]:
    """Why the grammar may not be compiled in the server, or empty; and its text without GBNF.

    ``tokenizer_path``: read once for each process, see ``read_tokens``.
    """
    trie = _trie(tokenizer_path, vocab_size, tuple(eos_token_ids))
    found: list[tuple[str, str]] = []

    def attempt() -> None:
        try:
            spec = GrammarSpec(text, after, may_be_gbnf).as_lark()
            _take_steps(trie, spec)
            found.append(("", spec.text))
        except GrammarRefused as refused:
            found.append((str(refused), ""))

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if not found:
        raise RuntimeError("the trial failed")
    return found[0]


@functools.lru_cache(maxsize=1)
def _trie(path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> TokenTrie:
    return TokenTrie(path, vocab_size, eos_token_ids)


def _take_steps(trie: TokenTrie, spec: GrammarSpec) -> None:
    matcher = trie.compile(spec).matcher.deep_copy()
    mask = allocate_token_bitmask(1, trie.vocab_size)
    for _ in range(_N_STEPS):
        started = time.thread_time()
        matcher.consume_tokens(matcher.compute_ff_tokens())
        fill_next_token_bitmask(matcher, mask)
        if matcher.is_error() or time.thread_time() - started > _STEP_S:
            raise GrammarRefused("the grammar is too complex to be followed token by token")
        words = np.flatnonzero(mask[0])
        if matcher.is_stopped() or not words.size:
            return
        word = int(words[len(words) // 2])
        matcher.consume_token(word * 32 + (int(mask[0, word]) & 0xFFFFFFFF).bit_length() - 1)
