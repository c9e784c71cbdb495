"""Draws answers of a model with random logits under the masks of a grammar."""

import random
from collections.abc import Collection

import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from loraplex_kernels.cpu.token_mask import mask_bits
from loraplex_server.engine.requests.grammar import CompiledGrammar, TokenTrie
from loraplex_server.engine.requests.request import Constraint


def walk(
    trie: TokenTrie,
    grammar: CompiledGrammar,
    seed: int,
    *,
    eos: int = 2,
    likely: Collection[int] = (),
    n_most: int = 3000,
) -> list[int]:
    """Draw an allowed token; ``likely`` ones are twenty times as probable."""
    constraint, chance = Constraint(grammar), random.Random(seed)
    mask = allocate_token_bitmask(1, trie.vocab_size)
    tokens: list[int] = []
    while not constraint.ended and len(tokens) < n_most:
        token = constraint.forced
        if token is None:
            fill_next_token_bitmask(constraint.matcher, mask)
            allowed = np.flatnonzero(mask_bits(mask[0], trie.vocab_size)).tolist()
            token = chance.choice(allowed + 19 * [t for t in allowed if t in likely])
        if token == eos:
            break
        constraint.accept(token)
        assert constraint.error is None
        tokens.append(token)
    assert len(tokens) < n_most
    return tokens
