"""The adapters that ship with the server, and the code that makes their training data."""

from .extraction import EXTRACT_EMAIL, JSON_ANSWERS
from .labels import EMOJI, SENTIMENT
from .numbers import GERMAN_NUMBERS
from .queries import SQL
from .style import PIRATE
from .task import Demo, Pair, chats, held_out_pairs
from .tool_calls import TOOL_CALLS

__all__ = ["DEMOS", "Demo", "Pair", "chats", "held_out_pairs"]

DEMOS: dict[str, Demo] = {
    demo.name: demo
    for demo in (
        JSON_ANSWERS,
        SENTIMENT,
        EXTRACT_EMAIL,
        GERMAN_NUMBERS,
        PIRATE,
        SQL,
        EMOJI,
        TOOL_CALLS,
    )
}
