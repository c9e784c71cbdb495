"""Some hundred operations in families, each written as rows of tables (`zoo.rows`)."""

from ..draws import Operation
from .arithmetic import ARITHMETIC
from .calendar import CALENDAR
from .clocks import CLOCKS
from .fields import FIELDS
from .grammar import GRAMMAR
from .letters import LETTERS
from .listings import LISTINGS
from .notation import NOTATION
from .phrases import PHRASES
from .verdicts import VERDICTS
from .wrappings import WRAPPINGS

__all__ = ["FAMILIES"]

_TABLES = (
    LETTERS,
    PHRASES,
    LISTINGS,
    ARITHMETIC,
    NOTATION,
    CALENDAR,
    CLOCKS,
    WRAPPINGS,
    FIELDS,
    VERDICTS,
    GRAMMAR,
)
FAMILIES: dict[str, Operation] = {
    name: operation for rows in _TABLES for name, operation in rows.items()
}
assert len(FAMILIES) == sum(map(len, _TABLES)), "two operations share a name"
