"""Compiles grammars off the event loop, with limits of size, time and memory, and caches them."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from typing import IO, NamedTuple

from tokenizers import Tokenizer

from loraplex_server.engine.requests.grammar import (
    CompiledGrammar,
    GrammarRefused,
    GrammarSpec,
    TokenTrie,
)
from loraplex_server.engine.requests.grammar_trial import read_tokens, try_grammar
from loraplex_server.errors import invalid, unavailable
from loraplex_server.worker_processes.pool import (
    CallFailed,
    CallTooSlow,
    WorkerProcesses,
    WorkersBusy,
)

_MAX_CHARS = 256 << 10
_MAX_CACHED = 128  # compiled grammars and reasons of refusals
_CPU_S = 5.0
_MAX_S = 60.0  # wall time, for a machine without a free processor


class Grammars:
    """The compiler and cache of one server's grammars. Called on the event loop.

    unknown text ── its tenant's turn ── trial in a worker process ── compiled here ── cached
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
        """``cpu_s`` limits the processor time of a trial, ``max_s`` its wall time."""
        self._cpu_s, self._max_s = cpu_s, max_s
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._cache: OrderedDict[bytes, CompiledGrammar | str] = OrderedDict()  # oldest use first
        self._compiler: Future[_Compiler] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-grammar")

    def start(self) -> None:
        """Prepare the tokenizer and a worker process in the background. Takes some seconds."""
        if self._compiler is None or (self._compiler.done() and self._compiler.exception()):
            self._compiler = self._pool.submit(self._make_compiler)

    async def compile(self, spec: GrammarSpec, param: str, tenant: str = "") -> CompiledGrammar:
        """Return the compiled grammar. Raises ApiError: 400 that names ``param``, 429 or 503."""
        check_length(spec.text, param)
        key = hashlib.sha256(repr(astuple(spec)).encode()).digest()
        result = self._cache.get(key)
        if result is None:
            result = await self._compile(key, spec, tenant)
        if key in self._cache:
            self._cache.move_to_end(key)
        if isinstance(result, str):
            raise invalid(f"{param!r}: {result}", param, "invalid_grammar")
        return result

    async def close(self) -> None:
        """End the worker processes. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._compiler is None or self._compiler.cancelled():
            return
        try:
            compiler = await asyncio.wrap_future(self._compiler)
        except Exception:  # callers of ``compile`` have got this error
            return
        await compiler.workers.close()
        compiler.file.close()

    async def _compile(self, key: bytes, spec: GrammarSpec, tenant: str) -> CompiledGrammar | str:
        """Return the grammar, or the reason of its refusal. Raises ApiError (503)."""
        self.start()
        assert self._compiler is not None
        # Shielded: a client that leaves must not cancel the work for others.
        compiler = await asyncio.shield(asyncio.wrap_future(self._compiler))
        try:
            async with compiler.workers.turn_of(tenant):
                result = self._cache.get(key)  # another call may have compiled it meanwhile
                if result is None:
                    result = self._cache[key] = await self._try(compiler, spec)
                    if len(self._cache) > _MAX_CACHED:
                        self._cache.popitem(last=False)
                return result
        except (WorkersBusy, CallTooSlow) as busy:
            raise unavailable(
                f"the grammar could not be compiled in time: {busy}", "grammar_compiler_busy", 1.0
            ) from busy

    async def _try(self, compiler: _Compiler, spec: GrammarSpec) -> CompiledGrammar | str:
        """Compile the grammar in a worker process. Raises WorkersBusy or CallTooSlow."""
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
        """Called on the pool's thread.

        Workers inherit a file of the tokenizer. It has no name, so a server that is killed leaves
        none behind.
        """
        tokenizer = self._tokenizer.to_str()
        file = tempfile.TemporaryFile()  # noqa: SIM115  until ``close``
        file.write(tokenizer.encode())
        file.flush()
        arguments = (f"/dev/fd/{file.fileno()}", self._vocab_size, self._eos_token_ids)
        workers = WorkerProcesses(
            "grammars", prepare=(read_tokens, arguments), files=[file.fileno()]
        )
        workers.start()
        trie = TokenTrie(tokenizer, self._vocab_size, self._eos_token_ids)
        return _Compiler(trie, workers, arguments, file)


def check_length(text: str, param: str) -> None:
    """Check the length of a grammar, or of a schema before parsing. Raises ApiError (400)."""
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
    arguments: tuple[str, int, list[int]]  # arguments of ``read_tokens``
    file: IO[bytes]
