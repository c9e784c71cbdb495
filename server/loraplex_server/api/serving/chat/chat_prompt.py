"""Makes the prompt of a chat: for chats, /tokenize and embeddings of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.protocol.chat import ChatMessage
from loraplex_server.api.serving.text_generation.sampling import defaults_of
from loraplex_server.errors import ApiError, from_image, invalid
from loraplex_server.images import ImageRefused, check_count
from loraplex_server.model.vision.prompt_image import PromptImage
from loraplex_server.text.image_prompts import ReadImage
from loraplex_server.text.text_pipeline import TextPipeline

from .chat_messages import plain_messages, routing_text, template_arguments, with_turns
from .image_parts import image_parts
from .image_sources import ImageSources
from .tool_markup import chat_markup
from .tool_use import NO_TOOLS, ToolUse

_ANSWER_SHARE = 4  # 1/4 of the tokens is left for an answer without a limit


class ChatPrompt:
    """The messages and tools of one call."""

    def __init__(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: ToolUse = NO_TOOLS,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        chat_template_kwargs: Mapping[str, object] | None,
        default_generation_prompt: bool = True,
    ) -> None:
        """``default_generation_prompt`` stands for a null ``add_generation_prompt``.

        Raises ApiError (400).
        """
        self.messages = plain_messages(messages)
        self.images = image_parts(messages)
        self.tools = tools
        self.template_arguments = template_arguments(chat_template_kwargs)
        self.continues = bool(continue_final_message)
        if self.continues and add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        if add_generation_prompt is None:
            add_generation_prompt = default_generation_prompt
        self.opens_answer = add_generation_prompt and not self.continues

    @property
    def routing_text(self) -> str:
        """The text that ``auto`` routing is based on."""
        return routing_text(self.messages)


class AdapterChat:
    """A chat with its adapter's template, system prompt and examples."""

    def __init__(
        self,
        prompt: ChatPrompt,
        text: TextPipeline,
        resolved: ResolvedAdapter,
        tenant: str,
        image_sources: ImageSources,
    ) -> None:
        """Raises ApiError (400) for tools or images that the base cannot show or read."""
        self.defaults = defaults_of(resolved)
        self._prompt, self._text, self._tenant = prompt, text, tenant
        self._image_sources = image_sources
        self._images: Sequence[ReadImage] = ()
        if prompt.images and text.images is None:
            raise invalid(
                "this base reads no images; send text, or serve a vision-language model",
                prompt.images[0].where,
                "unsupported_content",
            )
        self._turns, self._system = resolved.few_shot, resolved.system_prompt
        has_calls = any(m["role"] == "tool" or "tool_calls" in m for m in prompt.messages)
        adapter_template = resolved.lease.plan.chat_template if resolved.lease else None
        self.markup = chat_markup(
            self.defaults.chat_template or adapter_template,
            text.chat_template,
            with_tools=bool(prompt.tools.tools) or has_calls,
            reasoning=self.defaults.reasoning,
            response_template=self.defaults.response_template,
        )

    async def ids(self, n_turns: int = 0) -> tuple[int, ...]:
        """Return the prompt's ids, with the adapter's first ``n_turns`` examples.

        Raises ApiError: 400, or 503 if no worker process is free to render.
        """
        messages, arguments = self._prompt.messages, self._prompt.template_arguments
        system = self.defaults.system_prompt or self._system
        if system is not None and all(m["role"] != "system" for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        if n_turns:
            messages = with_turns(messages, self._turns[:n_turns])
        if self._prompt.tools.tools:
            arguments = {**arguments, "tools": self._prompt.tools.shown}
        return await self._text.encode_chat(
            messages,
            template=self.markup.template,
            add_generation_prompt=self._prompt.opens_answer,
            continue_final_message=self._prompt.continues,
            template_arguments=arguments,
            tenant=self._tenant,
            images=self._images,
        )

    async def read_images(self) -> None:
        """Decode the chat's images, before ``ids`` and ``images_in``. Raises ApiError."""
        parts, limits = self._prompt.images, self._image_sources.limits
        if not parts:
            return
        try:
            check_count(len(parts), limits)
        except ImageRefused as error:
            raise from_image(error, "messages") from error
        sources = await self._image_sources.find(parts)
        images = await self._text.read_images(sources, limits, tenant=self._tenant)
        for image, part in zip(images, parts, strict=False):  # ends with the first refused one
            if isinstance(image, ImageRefused):
                raise from_image(image, part.where)
        self._images = [image for image in images if isinstance(image, ReadImage)]

    def images_in(self, ids: Sequence[int]) -> tuple[PromptImage, ...]:
        """Return the chat's images, with their positions in the prompt's ids."""
        if not self._images or self._text.images is None:
            return ()
        return self._text.images.placed(ids, self._images)

    async def ids_within(
        self, n_tokens: int, *, n_answer: int | None = None
    ) -> tuple[tuple[int, ...], int]:
        """Return the prompt's ids and the number of the adapter's examples in it.

        The number of examples is halved until prompt and answer fit ``n_tokens``. Without
        ``n_answer``, a quarter of ``n_tokens`` is left for the answer, unless one example remains.
        Raises ApiError as ``ids`` does, and if not even one example fits.
        """
        await self.read_images()
        n_left = n_tokens - (n_tokens // _ANSWER_SHARE if n_answer is None else n_answer)
        n_most = n_tokens - (n_answer or 1)

        async def ids_with(n: int) -> tuple[int, ...] | None:
            """Return None if the prompt exceeds the context."""
            try:
                return await self.ids(n)
            except ApiError as error:
                if n == 0 or error.code != "context_length_exceeded":
                    raise
                return None

        n = len(self._turns)
        ids = await ids_with(n)
        if ids is not None and (n == 0 or len(ids) <= n_left):
            return ids, n
        one = await ids_with(1)  # first, so that a chat that is too long fails soon
        if one is None or len(one) > n_most:
            raise invalid(
                f"{n_tokens} tokens are left for prompt and answer, and the chat leaves no room "
                "for one of its examples; shorten the chat or the examples, or let POST "
                "/v1/adapters/generate learn from the examples and name the adapter",
                "messages",
                "context_length_exceeded",
            )
        while n > 2:
            n //= 2
            ids = await ids_with(n)
            if ids is not None and len(ids) <= n_left:
                return ids, n
        return one, 1
