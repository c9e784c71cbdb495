"""The inputs of a body: texts, token ids, images or a chat."""

from __future__ import annotations

from typing import NamedTuple, cast

from loraplex_server.api.protocol.vectors import ImageInput, InputBody, VectorBody
from loraplex_server.api.serving.chat.chat_prompt import ChatPrompt
from loraplex_server.api.serving.completion.completion import split_prompts
from loraplex_server.api.state import AppState
from loraplex_server.errors import invalid
from loraplex_server.images import is_image_url

from .prompt import Ids, Prompt
from .vector_source import Cut, VectorSource


class ImageSource(NamedTuple):
    """An image of a request that is not decoded yet."""

    text: str  # a data: URL or base64


class Inputs:
    """The ``input`` or ``messages`` of a body."""

    def __init__(self, state: AppState, body: InputBody) -> None:
        """Raises ApiError (400)."""
        if (body.input is None) == (body.messages is None):
            raise invalid("give either input or messages", "input")
        self._body = body
        self._items: list[str | ImageSource] = []
        self._id_lists: list[Ids] = []
        self._chat: ChatPrompt | None = None
        if body.messages is not None:
            self._chat = ChatPrompt(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
                default_generation_prompt=False,
            )
        elif _are_ids(body.input):
            _, self._id_lists = split_prompts(cast("list[int]", body.input))
        else:
            self._items = items_of(state, body, cast("ImageInput", body.input))

    def __len__(self) -> int:
        return len(self._items) or len(self._id_lists) or 1

    @property
    def n_images(self) -> int:
        return sum(isinstance(item, ImageSource) for item in self._items)

    @property
    def routing_text(self) -> str:
        if self._chat is not None:
            return self._chat.routing_text
        return "\n".join(item for item in self._items if isinstance(item, str))

    async def prompts(self, source: VectorSource, cut: Cut) -> list[Prompt]:
        """Return the prompts, texts truncated and images processed. Raises ApiError."""
        if self._chat is not None:
            return cut.of_chat(await source.encode_chat(self._chat), source)
        if self._items:
            special = self._body.add_special_tokens is not False
            texts = [item for item in self._items if isinstance(item, str)]
            images = [item.text for item in self._items if isinstance(item, ImageSource)]
            encoded = iter(await source.encode(texts, param="input", special=special, cut=cut))
            processed = iter(await source.encode_images(images, param="input") if images else ())
            return [
                next(encoded) if isinstance(item, str) else next(processed) for item in self._items
            ]
        for ids in self._id_lists:
            source.check_ids(ids, "input")
        return cut.apply(self._id_lists, source, "input")


def _are_ids(given: object) -> bool:
    return isinstance(given, list) and isinstance(given[0], int | list)


def items_of(
    state: AppState, body: VectorBody, given: ImageInput, *, images_alone: bool = False
) -> list[str | ImageSource]:
    """Return the texts and images of ``input``. Raises ApiError (400).

    A text is an image if it is a ``data:`` URL of one, or if there can be no texts: on a base that
    reads images alone, or with ``images_alone``.
    """
    model, images = state.model, state.model.image_encoder
    if model.encoder is not None and body.model == model.encoder.name:
        images = None
    no_texts = images_alone or (images is not None and not images.reads_texts)
    items: list[str | ImageSource] = []
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, str):
            items.append(ImageSource(item) if no_texts or is_image_url(item) else item)
        elif (item.image is None) == (item.text is None):
            raise invalid("an item of input has either image or text", "input")
        elif item.image is not None:
            items.append(ImageSource(item.image))
        elif no_texts:
            raise invalid("input has a text where images alone are read", "input")
        else:
            items.append(item.text or "")
    if images is None and any(isinstance(item, ImageSource) for item in items):
        remedy = "serve an image encoder, such as CLIP or ViT, for them"
        if model.images is not None:
            remedy = "send them as image_url parts of messages, in place of input"
        raise invalid(
            f"{body.model or state.resolver.base_name} reads no images as input; {remedy}",
            "input",
            "base_reads_no_images",
        )
    return items
