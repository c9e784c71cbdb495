"""What the prompt of a chat is made of: for chats, /tokenize and embeddings of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex_server.adapters.adapter_defaults import AdapterDefaults, read_defaults
from loraplex_server.adapters.resolver import ResolvedAdapter, Turns
from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.protocol.chat import ChatMessage

from .chat_protocol import ChatProtocol, chat_protocol
from .messages import plain_messages, routing_text, template_arguments, with_turns
from .text_pipeline import TextPipeline
from .tool_use import NO_TOOLS, ToolUse

__all__ = ["ChatPrompt", "defaults_of"]

_ANSWER_SHARE = 4  # one part of so many is left for an answer that may be of any length


class ChatPrompt:
    """Messages and tools of one call; the adapter adds its template and system prompt."""

    def __init__(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: ToolUse = NO_TOOLS,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        chat_template_kwargs: Mapping[str, object] | None,
        asks_for_answer: bool = True,
    ) -> None:
        """``asks_for_answer``: whether it opens one where ``add_generation_prompt`` is null.

        Raises ApiError (400).
        """
        self._messages = plain_messages(messages)
        self._tools = tools
        self._arguments = template_arguments(chat_template_kwargs)
        self._continues = bool(continue_final_message)
        if self._continues and add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        opens = asks_for_answer if add_generation_prompt is None else add_generation_prompt
        self._opens_answer = opens and not self._continues

    @property
    def routing_text(self) -> str:
        """What ``auto`` looks at."""
        return routing_text(self._messages)

    def protocol(
        self, text: TextPipeline, resolved: ResolvedAdapter, defaults: AdapterDefaults
    ) -> ChatProtocol:
        """``defaults``: of the adapter's card. Raises ApiError (400) for tools nobody can show."""
        has_calls = any(m["role"] == "tool" or "tool_calls" in m for m in self._messages)
        own = resolved.lease.plan.chat_template if resolved.lease else None
        return chat_protocol(
            defaults.chat_template or own,
            text.chat_template,
            with_tools=bool(self._tools.tools) or has_calls,
            reasoning=defaults.reasoning,
            response_template=defaults.response_template,
        )

    async def ids(
        self,
        text: TextPipeline,
        protocol: ChatProtocol,
        defaults: AdapterDefaults,
        *,
        tenant: str,
        turns: Turns = (),
    ) -> tuple[int, ...]:
        """With ``turns`` before the chat's own.

        Raises ApiError: 400, or 503 when nothing is free to render.
        """
        messages, arguments = self._messages, self._arguments
        system = defaults.system_prompt
        if system is not None and all(m["role"] != "system" for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        if turns:
            messages = with_turns(messages, turns)
        if self._tools.tools:
            arguments = {**arguments, "tools": self._tools.shown}
        return await text.encode_chat(
            messages,
            template=protocol.template,
            add_generation_prompt=self._opens_answer,
            continue_final_message=self._continues,
            template_arguments=arguments,
            tenant=tenant,
        )

    async def ids_within(
        self,
        n_tokens: int,
        text: TextPipeline,
        protocol: ChatProtocol,
        defaults: AdapterDefaults,
        *,
        tenant: str,
        turns: Turns,
        n_answer: int | None = None,
    ) -> tuple[tuple[int, ...], int]:
        """As ``ids``, and how many of ``turns`` it has: all that ``n_tokens`` hold beside an answer
        of ``n_answer`` tokens, or the first half of them, or of that half, and so on.

        Where nobody has said how long the answer may be, a part of ``n_tokens`` is left for it, but
        for the last turn. Raises ApiError as ``ids`` does, and where there is no room for any.
        """
        n_left = n_tokens - (n_tokens // _ANSWER_SHARE if n_answer is None else n_answer)
        n_most = n_tokens - (n_answer or 1)

        async def ids_with(n: int) -> tuple[int, ...] | None:
            """None: too long, with however many tokens."""
            try:
                return await self.ids(text, protocol, defaults, tenant=tenant, turns=turns[:n])
            except ApiError as error:
                if n == 0 or error.code != "context_length_exceeded":
                    raise
                return None

        n = len(turns)
        ids = await ids_with(n)
        if ids is not None and (n == 0 or len(ids) <= n_left):
            return ids, n
        one = await ids_with(1)  # before all the others: a chat that is too long fails soon
        if one is None or len(one) > n_most:
            raise invalid(
                f"{n_tokens} tokens are left for prompt and answer, and the chat leaves no room "
                "for one of its examples; shorten it or them, or let POST /v1/adapters/generate "
                "learn from them and name the adapter",
                "messages",
                "context_length_exceeded",
            )
        while n > 2:
            n //= 2
            ids = await ids_with(n)
            if ids is not None and len(ids) <= n_left:
                return ids, n
        return one, 1


def defaults_of(resolved: ResolvedAdapter) -> AdapterDefaults:
    """What the card of the resolved adapter says, if it has one."""
    lease = resolved.lease
    return read_defaults(lease.defaults) if lease and lease.defaults else AdapterDefaults()
