"""Grammars compiled once and kept: off the event loop, within limits of size, time and memory."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from tokenizers import Tokenizer

from loraplex_server.api.errors import invalid, unavailable
from loraplex_server.engine.grammar import CompiledGrammar, GrammarRefused, GrammarSpec, TokenTrie
from loraplex_server.engine.grammar_trial import try_grammar
from loraplex_server.worker_process import CallFailed, WorkerProcesses, WorkersBusy

__all__ = ["Grammars"]

_MAX_CHARS = 256 << 10
_MAX_KEPT = 128  # compiled, or refused with this reason
_TRIAL_S = 5.0


class Grammars:
    """One per server, for one tokenizer. Used on the event loop.

    unknown text ── trial in a worker process ── compiled here ── kept
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._kept: OrderedDict[bytes, CompiledGrammar | str] = OrderedDict()  # last used last
        self._trie: TokenTrie | None = None  # of the pool's thread, like the folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-grammar")
        self._workers = WorkerProcesses()

    async def compile(self, spec: GrammarSpec, param: str) -> CompiledGrammar:
        """For ``GenerationRequest.grammar``. Raises ApiError: 400 that names ``param``, or 503."""
        if len(spec.text) > _MAX_CHARS:
            raise invalid(
                f"{param!r} is {len(spec.text):,} characters long as a grammar, at most "
                f"{_MAX_CHARS:,} are compiled",
                param,
                "grammar_too_large",
            )
        key = hashlib.sha256(repr(astuple(spec)).encode()).digest()
        kept = self._kept.get(key)
        if kept is None:
            kept = await self._compile(spec)
            self._kept[key] = kept
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        if key in self._kept:
            self._kept.move_to_end(key)
        if isinstance(kept, str):
            raise invalid(f"{param!r}: {kept}", param, "invalid_grammar")
        return kept

    async def close(self) -> None:
        """Ends the worker processes. Idempotent."""
        await self._workers.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()

    async def _compile(self, spec: GrammarSpec) -> CompiledGrammar | str:
        """A grammar, or why it is refused. Raises ApiError (503) if it could not be tried."""
        loop = asyncio.get_running_loop()
        trie, path = await loop.run_in_executor(self._pool, self._tokens)
        arguments = [path, self._vocab_size, self._eos_token_ids, *astuple(spec)]
        try:
            refused, text = await self._workers.run(try_grammar, arguments, timeout_s=_TRIAL_S)
        except WorkersBusy as busy:
            raise unavailable(str(busy), "grammar_compiler_busy", 1.0) from busy
        except CallFailed as failed:
            return f"the grammar takes too long or too much memory to compile ({failed})"
        if refused:
            return refused
        try:
            return await loop.run_in_executor(
                self._pool, trie.compile, GrammarSpec(text, spec.after)
            )
        except GrammarRefused as error:
            return str(error)

    def _tokens(self) -> tuple[TokenTrie, str]:
        """The tokenizer, and the file from which workers read it."""
        if self._trie is None or self._folder is None:
            tokenizer = self._tokenizer.to_str()
            self._folder = tempfile.TemporaryDirectory(prefix="loraplex-grammar-")
            (Path(self._folder.name) / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            self._trie = TokenTrie(tokenizer, self._vocab_size, self._eos_token_ids)
        return self._trie, str(Path(self._folder.name) / "tokenizer.json")
