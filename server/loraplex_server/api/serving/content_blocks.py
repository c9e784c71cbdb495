"""Reads content blocks of APIs that are answered by chats."""

from collections.abc import Callable, Collection, Mapping

from pydantic import JsonValue

from loraplex_server.errors import ApiError, invalid


def texts_of(
    content: JsonValue,
    where: str,
    kinds: Collection[str],
    unsupported: Callable[[JsonValue, str], ApiError],
) -> list[str]:
    """Return the texts of ``content``: one string, or blocks of the types ``kinds``.

    Raises ApiError (400), for a block of another type that of ``unsupported(type, where)``.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise invalid("a text or a list of text blocks is needed", where)
    texts = []
    for number, block in enumerate(content):
        at = f"{where}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or kind not in kinds:
            raise unsupported(kind, at)
        texts.append(string_field(block, "text", at))
    return texts


def string_field(block: Mapping[str, JsonValue], name: str, where: str) -> str:
    """Raises ApiError (400) if the field is not a string."""
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"a string {name!r} is needed", f"{where}.{name}")
    return value
