"""Compiles an unknown grammar for the first time, in a process that may be killed.

llguidance limits most costs of a grammar, but not all. Three thousand rules in a chain overflow its
stack, and ``multipleOf: 1000003`` compiles for seconds (ADR 13).
"""

import functools
import threading
import time
from collections.abc import Sequence

import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from .grammar import GrammarRefused, GrammarSpec, TokenTrie

_STACK_BYTES = 1 << 20  # the server's threads have at least twice as much
_N_STEPS = 8
_STEP_S = 0.2  # CPU time: all requests of a batch wait for the slowest grammar


def read_tokens(tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Loads the tokenizer, before the first trial of a process."""
    _trie(tokenizer_path, vocab_size, tuple(eos_token_ids))


def try_grammar(
    tokenizer_path: str,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    text: str,
    after: str | None,
    may_be_gbnf: bool,
) -> tuple[str, str]:
    """Return (reason to refuse the grammar or "", its text as Lark or JSON).

    The tokenizer is read once for each process, see ``read_tokens``.
    """
    trie = _trie(tokenizer_path, vocab_size, tuple(eos_token_ids))
    outcome: list[tuple[str, str]] = []

    def attempt() -> None:
        try:
            spec = GrammarSpec(text, after, may_be_gbnf).as_lark()
            _take_steps(trie, spec)
            outcome.append(("", spec.text))
        except GrammarRefused as refused:
            outcome.append((str(refused), ""))

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if not outcome:
        raise RuntimeError("the trial failed")
    return outcome[0]


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
