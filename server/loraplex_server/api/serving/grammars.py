"""Grammars compiled once and kept: off the event loop, within limits of size and time."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

from loraplex_server.api.errors import invalid
from loraplex_server.engine.grammar import CompiledGrammar, GrammarRefused, GrammarSpec, TokenTrie

__all__ = ["Grammars"]

_MAX_CHARS = 256 << 10
_MAX_KEPT = 128


class Grammars:
    """One per server, for one tokenizer. Used on the event loop."""

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._kept: OrderedDict[bytes, CompiledGrammar] = OrderedDict()  # last used last
        self._trie: TokenTrie | None = None  # of the pool's thread
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-grammar")

    async def compile(self, spec: GrammarSpec, param: str) -> CompiledGrammar:
        """For ``GenerationRequest.grammar``. Raises ApiError (400) that names ``param``."""
        if len(spec.text) > _MAX_CHARS:
            raise invalid(
                f"{param!r} is {len(spec.text):,} characters long as a grammar, at most "
                f"{_MAX_CHARS:,} are compiled",
                param,
                "grammar_too_large",
            )
        key = hashlib.sha256(f"{spec.after!r}\n{spec.text}".encode()).digest()
        kept = self._kept.get(key)
        if kept is None:
            try:
                kept = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._compile, spec
                )
            except GrammarRefused as refused:
                raise invalid(f"{param!r}: {refused}", param, "invalid_grammar") from refused
            self._kept[key] = kept
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return kept

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        if self._trie is None:
            self._trie = TokenTrie(self._tokenizer.to_str(), self._vocab_size, self._eos_token_ids)
        return self._trie.compile(spec)
