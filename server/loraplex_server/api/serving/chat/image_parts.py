"""The images of chat messages: parts of the type ``image_url``."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from loraplex_server.api.protocol.chat import ChatMessage
from loraplex_server.api.serving.content_blocks import string_field
from loraplex_server.errors import invalid


class ImagePart(NamedTuple):
    source: str  # a data URL or base64
    where: str  # the field, for errors


def image_parts(messages: Sequence[ChatMessage]) -> list[ImagePart]:
    """Return the images of all messages, in order. Raises ApiError (400)."""
    images = []
    for position, message in enumerate(messages):
        parts = [] if isinstance(message.content, str) else message.content or []
        for number, part in enumerate(parts):
            if part.get("type") == "image_url":
                at = f"messages[{position}].content[{number}].image_url"
                images.append(ImagePart(_url(part, at), f"{at}.url"))
    return images


def _url(part: Mapping[str, JsonValue], where: str) -> str:
    value = part.get("image_url")
    if not isinstance(value, dict):
        raise invalid("an image_url part needs an object {'url': 'data:…'}", where)
    return string_field(value, "url", where)
