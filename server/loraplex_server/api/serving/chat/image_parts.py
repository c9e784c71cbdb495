"""The images of chat messages: parts of the types ``image_url`` and ``file``."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from loraplex_server.api.protocol.chat import ChatMessage
from loraplex_server.api.serving.content_blocks import string_field
from loraplex_server.errors import invalid

IMAGE_TYPES = ("image_url", "file")


class ImagePart(NamedTuple):
    source: str  # a data URL, base64 or an address; of an upload, the id of its file
    where: str  # the field, for errors
    is_upload: bool = False


def image_parts(messages: Sequence[ChatMessage]) -> list[ImagePart]:
    """Return the images of all messages, in order. Raises ApiError (400)."""
    images = []
    for position, message in enumerate(messages):
        parts = [] if isinstance(message.content, str) else message.content or []
        for number, part in enumerate(parts):
            where = f"messages[{position}].content[{number}]"
            if part.get("type") == "image_url":
                url = _field(part, "image_url", "url", "data:…", where)
                images.append(ImagePart(url, f"{where}.image_url.url"))
            elif part.get("type") == "file":
                file_id = _field(part, "file", "file_id", "file-…", where)
                images.append(ImagePart(file_id, f"{where}.file.file_id", is_upload=True))
    return images


def _field(part: Mapping[str, JsonValue], kind: str, name: str, example: str, where: str) -> str:
    value = part.get(kind)
    if not isinstance(value, dict):
        raise invalid(
            f"a part {kind!r} needs an object {{{name!r}: {example!r}}}", f"{where}.{kind}"
        )
    return string_field(value, name, f"{where}.{kind}")
