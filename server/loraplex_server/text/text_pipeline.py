"""Renders chat templates and tokenises off the event loop, in threads or worker processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from loraplex_adapter_store.part_log import worked
from loraplex_server.errors import ApiError, invalid
from loraplex_server.images import ImageLimits, ImageRefused
from loraplex_server.tenant_shares import TenantThreads, lower_priority

from .detokenizer import StreamDetokenizer
from .image_prompts import ImagePrompts, ReadImage, as_parts
from .templates import Templates, unrenderable
from .token_text import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
TextPair = tuple[str, str | None]
_log = logging.getLogger(__name__)
_N_THREADS = 3
_PIECE_CHARS = 1 << 18  # encoded at once, unless one text is longer


class EncodedText(NamedTuple):
    """The token ids of a text or of a pair of texts."""

    ids: tuple[int, ...]
    second_text_at: int | None = None  # where token types say that the second text begins


class TextPipeline:
    """The tokenizer and templates of one server. Slow work runs in threads of its own.

    The Rust tokenizer is called directly. transformers' wrapper sets truncation on the shared
    object in every call, which is not safe in two threads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        vocab_size: int | None = None,
        max_model_len: int | None = None,
        images: ImagePrompts | None = None,
        image_threads: TenantThreads | None = None,
    ) -> None:
        """``vocab_size``: width of the logits, and the limit of ids. ``max_model_len``: texts that
        are too long for this many tokens, whatever their content, are refused unread. ``images``:
        the processor of a vision-language base, whose chat template wins. It runs on
        ``image_threads``.
        """
        self.images = images
        if images is not None and images.chat_template is not None:
            tokenizer.chat_template = images.chat_template
        self._chat = tokenizer
        self._templates = Templates()
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # of sentence-transformers' files; texts are cut on request
        self.backend.no_padding()
        self.vocab_size = vocab_size or len(tokenizer)
        self.token_texts = TokenTexts(self.backend)
        added = self.backend.get_added_tokens_decoder().items()
        self._added = {token.content: token_id for token_id, token in added}
        self._special = {token.content for _, token in added if token.special}
        self._max_chars: int | None = None
        self._max_tokens = max_model_len
        if max_model_len is not None:
            longest = max(map(len, self.backend.get_vocab()), default=1)
            self._max_chars = max_model_len * longest
        self._threads = TenantThreads(
            "text", _N_THREADS, _N_THREADS - 1, initializer=lower_priority
        )
        self._image_threads = image_threads

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The base's own template."""
        template: str | dict[str, str] | None = self._chat.chat_template
        return template

    def check_length(self, n_chars: int, param: str) -> None:
        """Raises ApiError (400), also for any text to a base that reads images alone."""
        self._check_reads_texts(param)
        if self._max_chars is not None and n_chars > self._max_chars:
            raise invalid(
                f"prompt is too long: {n_chars:,} characters, of which at most "
                f"{self._max_chars:,} can fit. This model's maximum context length is in tokens; "
                "shorten the prompt.",
                param,
                "context_length_exceeded",
            )

    async def encode_many(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        add_special_tokens: bool = True,
        param: str = "prompt",
        tenant: str,
    ) -> list[tuple[int, ...]]:
        """Encode each text as a prompt. The tokenizer joins a pair of texts to one prompt."""
        encode = partial(self._encode_all, add_special_tokens=add_special_tokens)
        return await self._encode_in_pieces(texts, encode, param, tenant)

    async def encode_whole(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        max_tokens: int | None,
        cut_left: bool,
        param: str,
        tenant: str,
    ) -> list[EncodedText]:
        """Encode texts or pairs with the special tokens and token types of an encoder.

        ``max_tokens``: texts are cut to it between their special tokens, of a pair the longer one
        first; None: no text is cut.
        """
        encode = partial(self._encode_cut, max_tokens=max_tokens, cut_left=cut_left)
        return await self._encode_in_pieces(texts, encode, param, tenant)

    async def _encode_in_pieces(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        encode: Callable[[Sequence[TextPair]], list[T]],
        param: str,
        tenant: str,
    ) -> list[T]:
        inputs = [(text, None) if isinstance(text, str) else text for text in texts]
        lengths = [len(first) + len(second or "") for first, second in inputs]
        for length in lengths:
            self.check_length(length, param)
        encoded: list[T] = []
        while len(encoded) < len(inputs):  # texts of other tenants go between two pieces
            at, n_chars = len(encoded), 0
            end = at
            while end < len(inputs) and (end == at or n_chars + lengths[end] <= _PIECE_CHARS):
                n_chars += lengths[end]
                end += 1
            encoded += await self._run(partial(encode, inputs[at:end]), tenant)
        return encoded

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_arguments: Mapping[str, object],
        tenant: str,
        images: Sequence[ReadImage] = (),
    ) -> tuple[int, ...]:
        """Render a chat and return its token ids. ``template`` None means the base's template.

        ``images``: those of the messages' parts, in order. Raises ApiError: 400, or 503 if no
        worker process is free.
        """
        self.check_length(sum(len(str(m.get("content", ""))) for m in messages), "messages")

        if template is None and not self._chat.chat_template:
            raise invalid(
                "this base model has no chat template; use /v1/completions, or an adapter that "
                "ships its own",
                "messages",
                "no_chat_template",
            )
        if self.images is not None:
            messages = as_parts(messages, template or str(self.chat_template), self.images.token)
        options = {"add_generation_prompt": add_generation_prompt, **template_arguments}
        if template is not None or template_arguments:  # arguments can make a template endless
            text = await self._templates.render(
                template or self._chat.get_chat_template(tools=template_arguments.get("tools")),
                messages,
                {**self._chat.special_tokens_map, **options},
                continue_final_message=continue_final_message,
                tenant=tenant,
                remember=template is not None,
            )
            self.check_length(len(text), "messages")
            return await self._run(partial(self._encode_rendered, text, images), tenant)

        def render_and_encode() -> tuple[int, ...]:
            options["continue_final_message"] = continue_final_message
            return self._encode_rendered(self._render(messages, options), images)

        return await self._run(render_and_encode, tenant)

    async def read_images(
        self, sources: Sequence[str | Path], limits: ImageLimits, *, tenant: str
    ) -> list[ReadImage | ImageRefused]:
        """Decode and prepare images one by one, up to the first that is refused.

        Raises ApiError: 400 for more than the context holds, 429 if the tenant's queue is full,
        503 if other images take all memory.
        """
        processor, threads = self.images, self._image_threads
        assert processor is not None, "the base sees no images"
        assert threads is not None

        def read(source: str | Path) -> ReadImage | ImageRefused:
            try:
                return processor.read(source, limits)
            except ImageRefused as error:
                return error

        images: list[ReadImage | ImageRefused] = []
        n_tokens = 0
        for source in sources:
            images.append(await threads.run(tenant, partial(read, source)))
            if isinstance(images[-1], ImageRefused):
                break
            n_tokens += images[-1].n_tokens
            if self._max_tokens is not None and n_tokens > self._max_tokens:
                raise invalid(
                    f"the first {len(images)} images take {n_tokens} tokens, the context holds "
                    f"{self._max_tokens}; send fewer or smaller images",
                    "messages",
                    "context_length_exceeded",
                )
        return images

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, tenant: str) -> str:
        decode = self.backend.decode
        work = partial(decode, list(ids), skip_special_tokens=skip_special_tokens)
        return await self._run(work, tenant)

    async def offsets(
        self, ids: Sequence[int], *, skip_special_tokens: bool, tenant: str
    ) -> tuple[str, list[int]]:
        """Return the text of ``ids``, and the position of each id's text in it."""

        def find() -> tuple[str, list[int]]:
            detokenizer = StreamDetokenizer(self.backend, skip_special_tokens=skip_special_tokens)
            text, offsets = "", []
            for token_id in ids:
                offsets.append(len(text))
                text += detokenizer.push(token_id)
            return text + detokenizer.flush(), offsets

        return await self._run(find, tenant)

    def token_of(self, marker: str) -> int | None:
        """Return the id of an added token; None for a text of ordinary tokens."""
        return self._added.get(marker)

    def is_hidden(self, marker: str) -> bool:
        """Return True for a special token, which answers do not show."""
        return marker in self._special

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) for an id outside the model's vocabulary."""
        self._check_reads_texts(param)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise invalid(
                f"token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})", param
            )

    async def close(self) -> None:
        await self._templates.close()
        self._threads.close()

    def _check_reads_texts(self, param: str) -> None:
        if not self.vocab_size:
            raise invalid(
                "this base reads images and no texts; send each image as a data: URL",
                param,
                "base_reads_images",
            )

    def _render(self, messages: Sequence[Mapping[str, object]], options: dict[str, object]) -> str:
        try:
            return str(self._chat.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # a template is a program and can raise anything
            raise unrenderable(str(error) or "it gives no reason") from error

    def _encode_rendered(self, text: str, images: Sequence[ReadImage]) -> tuple[int, ...]:
        """Return the ids of a rendered chat. Processors of images add the token of the beginning
        unless the template does, be it behind images; tokenizers leave it to the template.
        """
        special = False
        if self.images is not None:
            bos = self._chat.bos_token
            special = not (bos and text.replace(self.images.token, "").startswith(bos))
        if self.images is not None and images:
            text = self.images.expand(text, images)
        (ids,) = self._encode_all([(text, None)], add_special_tokens=special)
        return ids

    def _encode_all(
        self, inputs: Sequence[TextPair], add_special_tokens: bool
    ) -> list[tuple[int, ...]]:
        # Only the batch methods let other threads run meanwhile.
        texts = [first if second is None else (first, second) for first, second in inputs]
        encode = self.backend.encode_batch_fast
        return [tuple(each.ids) for each in encode(texts, add_special_tokens=add_special_tokens)]

    def _encode_cut(
        self, inputs: Sequence[TextPair], *, max_tokens: int | None, cut_left: bool
    ) -> list[EncodedText]:
        encode, finish = self.backend.encode_batch_fast, self.backend.post_process
        firsts = encode([first for first, _ in inputs], add_special_tokens=False)
        seconds = iter(encode([b for _, b in inputs if b is not None], add_special_tokens=False))
        texts = []
        for first, (_, text) in zip(firsts, inputs, strict=True):
            second = None if text is None else next(seconds)
            if max_tokens is not None:
                n_special = self.backend.num_special_tokens_to_add(second is not None)
                sizes = len(first), 0 if second is None else len(second)
                n_first, n_second = _longest_first(*sizes, max(0, max_tokens - n_special))
                side = "left" if cut_left else "right"
                first.truncate(n_first, direction=side)
                if second is not None:
                    second.truncate(n_second, direction=side)
            whole = finish(first, second)
            at = whole.type_ids.index(1) if 1 in whole.type_ids else None
            texts.append(EncodedText(tuple(whole.ids), at))
        return texts

    async def _run(self, work: Callable[[], T], tenant: str) -> T:
        """Raises ApiError, also for a Rust panic of the tokenizer, which is no Exception."""
        try:
            result = await self._threads.run(tenant, work)
        except (ApiError, asyncio.CancelledError):
            raise
        except BaseException as error:
            _log.exception("the tokenizer failed", extra={"part": "tokenizer"})
            raise ApiError(
                500,
                "the tokenizer failed on this text; try again, and report the error if it stays: "
                "the server's log has the details",
                code="tokenizer_failed",
            ) from error
        worked("tokenizer")
        return result


def _longest_first(n_first: int, n_second: int, n_tokens: int) -> tuple[int, int]:
    """Return how many tokens of two texts stay if the longer one is cut first, as tokenizers do."""
    if n_first + n_second <= n_tokens:
        return n_first, n_second
    shorter = min(n_first, n_second)
    longer = max(shorter, n_tokens - shorter)
    if shorter + longer > n_tokens:
        shorter, longer = n_tokens // 2, n_tokens - n_tokens // 2
    return (shorter, longer) if n_first <= n_second else (longer, shorter)
