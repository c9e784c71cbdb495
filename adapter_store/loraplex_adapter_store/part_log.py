"""The log of parts that work again: how ``HealthTracker`` learns that a failure is over."""

import logging

PART_LOG = "loraplex.parts"
_log = logging.getLogger(PART_LOG)


def worked(part: str) -> None:
    """Report that a part did its work. Takes microseconds; without a health tracker it is lost."""
    _log.debug("%s works", part, extra={"part": part})
