"""Grammars compiled once and kept: off the event loop, within limits of size, time and memory."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.api.errors import invalid, unavailable
from loraplex_server.engine.grammar import CompiledGrammar, GrammarRefused, GrammarSpec, TokenTrie
from loraplex_server.engine.grammar_trial import read_tokens, try_grammar
from loraplex_server.worker_process import CallFailed, CallTooSlow, WorkerProcesses, WorkersBusy

__all__ = ["Grammars", "check_length"]

_MAX_CHARS = 256 << 10
_MAX_KEPT = 128  # compiled, or refused with this reason
_CPU_S = 5.0
_MAX_S = 60.0  # on a machine that has no processor free


class Grammars:
    """One per server, for one tokenizer. Used on event loops.

    unknown text ── its tenant's turn ── trial in a worker process ── compiled here ── kept
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
        cpu_s: float = _CPU_S,
        max_s: float = _MAX_S,
    ) -> None:
        """``cpu_s``: processor time of a trial. ``max_s``: wall time, after which it was none."""
        self._cpu_s, self._max_s = cpu_s, max_s
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._kept: OrderedDict[bytes, CompiledGrammar | str] = OrderedDict()  # last used last
        self._compiler: Future[_Compiler] | None = None  # being made, or made
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-grammar")

    def start(self) -> None:
        """Makes ready in the background what else the first grammar would wait for.

        The tokenizer as llguidance has it and a process for trials: some seconds together.
        """
        if self._compiler is None or (self._compiler.done() and self._compiler.exception()):
            self._compiler = self._pool.submit(self._make_compiler)

    async def compile(self, spec: GrammarSpec, param: str, tenant: str = "") -> CompiledGrammar:
        """For ``GenerationRequest.grammar``. Raises ApiError: 400 that names ``param``, or 503."""
        check_length(spec.text, param)
        key = hashlib.sha256(repr(astuple(spec)).encode()).digest()
        kept = self._kept.get(key)
        if kept is None:
            kept = await self._compile(key, spec, tenant)
        if key in self._kept:
            self._kept.move_to_end(key)
        if isinstance(kept, str):
            raise invalid(f"{param!r}: {kept}", param, "invalid_grammar")
        return kept

    async def close(self) -> None:
        """Ends the worker processes. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._compiler is None or self._compiler.cancelled():
            return
        try:
            compiler = await asyncio.wrap_future(self._compiler)
        except Exception:  # it could not be made; whoever asked for it was told
            return
        await compiler.workers.close()
        compiler.folder.cleanup()

    async def _compile(self, key: bytes, spec: GrammarSpec, tenant: str) -> CompiledGrammar | str:
        """A grammar, or why it is refused. Raises ApiError (503) if it could not be tried."""
        self.start()
        assert self._compiler is not None
        # shielded: one client that leaves must not take it from the others
        compiler = await asyncio.shield(asyncio.wrap_future(self._compiler))
        try:
            async with compiler.workers.turn_of(tenant):
                kept = self._kept.get(key)  # by now, if other calls asked for the same
                if kept is None:
                    kept = self._kept[key] = await self._try(compiler, spec)
                    if len(self._kept) > _MAX_KEPT:
                        self._kept.popitem(last=False)
                return kept
        except (WorkersBusy, CallTooSlow) as busy:
            raise unavailable(
                f"the grammar could not be compiled in time: {busy}", "grammar_compiler_busy", 1.0
            ) from busy

    async def _try(self, compiler: _Compiler, spec: GrammarSpec) -> CompiledGrammar | str:
        """Raises WorkersBusy or CallTooSlow if it could not be tried."""
        arguments = [*compiler.arguments, *astuple(spec)]
        try:
            refused, text = await compiler.workers.run(
                try_grammar, arguments, timeout_s=self._max_s, cpu_s=self._cpu_s
            )
        except (WorkersBusy, CallTooSlow):
            raise
        except CallFailed as failed:
            return f"the grammar takes too long or too much memory to compile ({failed})"
        if refused:
            return refused
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, compiler.trie.compile, GrammarSpec(text, spec.after)
            )
        except GrammarRefused as error:
            return str(error)

    def _make_compiler(self) -> _Compiler:
        """In the pool's thread. Workers read the tokenizer from a file."""
        tokenizer = self._tokenizer.to_str()
        folder = tempfile.TemporaryDirectory(prefix="loraplex-grammar-")
        path = Path(folder.name) / "tokenizer.json"
        path.write_text(tokenizer, encoding="utf-8")
        arguments = (str(path), self._vocab_size, self._eos_token_ids)
        workers = WorkerProcesses(prepare=(read_tokens, arguments))
        workers.start()
        trie = TokenTrie(tokenizer, self._vocab_size, self._eos_token_ids)
        return _Compiler(trie, workers, arguments, folder)


def check_length(text: str, param: str) -> None:
    """Of a grammar, or of a schema before it is parsed. Raises ApiError (400)."""
    if len(text) > _MAX_CHARS:
        raise invalid(
            f"{param!r} is {len(text):,} characters long as a grammar, at most "
            f"{_MAX_CHARS:,} are compiled",
            param,
            "grammar_too_large",
        )


class _Compiler(NamedTuple):
    trie: TokenTrie
    workers: WorkerProcesses
    arguments: tuple[str, int, list[int]]  # of ``read_tokens``
    folder: tempfile.TemporaryDirectory[str]
