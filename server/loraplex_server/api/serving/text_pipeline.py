"""Chat templates and tokenisation, off the event loop: in a few threads, or in worker processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.streaming.detokenizer import StreamDetokenizer
from loraplex_server.api.streaming.token_text import TokenTexts

from .templates import Templates, unrenderable

__all__ = ["ChatTokenizer", "TextPipeline"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_N_THREADS = 2


class ChatTokenizer(Protocol):
    """The part of transformers' fast tokenizer that is used here."""

    chat_template: str | dict[str, str] | None

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def get_chat_template(self, *, tools: object = None) -> str: ...

    def apply_chat_template(self, conversation: object, **options: object) -> object: ...

    def __len__(self) -> int: ...


class TextPipeline:
    """One per server. Everything slow runs in its own threads; ids and texts are plain values.

    The Rust tokenizer is called directly: transformers' wrapper sets truncation on the shared
    object in every call, which two threads must not do at once.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        vocab_size: int | None = None,
        max_model_len: int | None = None,
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
    ) -> None:
        """``vocab_size``: width of the logits; ids beyond it are refused. ``max_model_len``: texts
        that cannot fit in so many tokens, whatever they say, are refused before they are read.
        """
        self._chat = tokenizer
        self._templates = Templates()
        self._faults = faults
        self.backend = tokenizer.backend_tokenizer
        self.vocab_size = vocab_size or len(tokenizer)
        self.token_texts = TokenTexts(self.backend)
        added = self.backend.get_added_tokens_decoder().items()
        self._added = {token.content: token_id for token_id, token in added}
        self._special = {token.content for _, token in added if token.special}
        self._max_chars: int | None = None
        if max_model_len is not None:
            longest = max(map(len, self.backend.get_vocab()), default=1)
            self._max_chars = max_model_len * longest
        self._pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="loraplex-text")

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The base's own."""
        return self._chat.chat_template

    def check_length(self, n_chars: int, param: str) -> None:
        """Raises ApiError (400)."""
        if self._max_chars is not None and n_chars > self._max_chars:
            raise invalid(
                f"{n_chars:,} characters cannot fit in this model's context; at most "
                f"{self._max_chars:,} are read",
                param,
                "context_length_exceeded",
            )

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        self.check_length(len(text), "prompt")
        return await self._run(lambda: self._encode(text, add_special_tokens))

    async def encode_many(
        self, texts: Sequence[str], *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[tuple[int, ...]]:
        for text in texts:
            self.check_length(len(text), param)

        def encode_all() -> list[tuple[int, ...]]:
            return [self._encode(text, add_special_tokens) for text in texts]

        return await self._run(encode_all)

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, param: str
    ) -> list[tuple[int, ...]]:
        """Two texts as one prompt, as the tokenizer joins them."""
        for first, second in pairs:
            self.check_length(len(first) + len(second), param)

        def encode_all() -> list[tuple[int, ...]]:
            return [tuple(self.backend.encode(first, second).ids) for first, second in pairs]

        return await self._run(encode_all)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_arguments: Mapping[str, object],
        tenant: str = "",
    ) -> tuple[int, ...]:
        """``template``: the adapter's own, else the base's is used.

        Raises ApiError: 400, or 503 when nothing is free to render.
        """
        self.check_length(sum(len(str(m.get("content", ""))) for m in messages), "messages")

        if template is None and not self._chat.chat_template:
            raise invalid(
                "this base model has no chat template; use /v1/completions, or an adapter that "
                "ships its own",
                "messages",
                "no_chat_template",
            )
        options = {"add_generation_prompt": add_generation_prompt, **template_arguments}
        if template is not None or template_arguments:  # which may be what makes it endless
            text = await self._templates.render(
                template or self._chat.get_chat_template(tools=template_arguments.get("tools")),
                messages,
                {**self._chat.special_tokens_map, **options},
                continue_final_message=continue_final_message,
                tenant=tenant,
                remember=template is not None,
            )
            self.check_length(len(text), "messages")
            return await self._run(lambda: self._encode(text, add_special_tokens=False))

        def render_and_encode() -> tuple[int, ...]:
            options["continue_final_message"] = continue_final_message
            return self._encode(self._render(messages, options), add_special_tokens=False)

        return await self._run(render_and_encode)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return await self._run(
            lambda: self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        )

    async def offsets(
        self, ids: Sequence[int], *, skip_special_tokens: bool
    ) -> tuple[str, list[int]]:
        """The text of ``ids`` and where in it the text of each begins."""

        def find() -> tuple[str, list[int]]:
            detokenizer = StreamDetokenizer(self.backend, skip_special_tokens=skip_special_tokens)
            text, offsets = "", []
            for token_id in ids:
                offsets.append(len(text))
                text += detokenizer.push(token_id)
            return text + detokenizer.flush(), offsets

        return await self._run(find)

    def token_of(self, marker: str) -> int | None:
        """The id of an added token; None: the text is written with ordinary tokens."""
        return self._added.get(marker)

    def is_hidden(self, marker: str) -> bool:
        """Whether it is a special token, which answers do not show."""
        return marker in self._special

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) for an id that the model has no row for."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise invalid(
                f"token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})", param
            )

    async def close(self) -> None:
        await self._templates.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _render(self, messages: Sequence[Mapping[str, object]], options: dict[str, object]) -> str:
        try:
            return str(self._chat.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # a template is a program
            raise unrenderable(str(error) or "it gives no reason") from error

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def _run(self, work: Callable[[], T]) -> T:
        """Raises ApiError, also for a panic of the Rust tokenizer, which is no Exception."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except (ApiError, asyncio.CancelledError):
            raise
        except BaseException as error:
            _log.exception("the tokenizer failed")
            self._faults.failed("tokenizer", error)
            raise ApiError(
                500,
                "the tokenizer failed on this text; try again, and "
                "report it if it stays: the server's log has the details",
                code="tokenizer_failed",
            ) from error
        self._faults.worked("tokenizer")
        return result
