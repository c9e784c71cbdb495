"""The one sentence encoder of the process: the router and the generator share it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_server.api.errors import ApiError, unavailable
from loraplex_server.model.loader import Lazy

if TYPE_CHECKING:
    from loraplex_generation.sentences import SentenceEncoder

__all__ = ["SharedEncoder"]

_log = logging.getLogger(__name__)


class SharedEncoder:
    """An ``Encoder`` of ``loraplex_router.adapters``, loaded at its first use. Thread-safe.

    A load that fails is not kept: the next use tries again.
    """

    def __init__(
        self,
        find_directory: Callable[[], Path],
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
    ) -> None:
        """``find_directory`` raises ApiError with a remedy where there is no encoder."""
        self._find_directory = find_directory
        self._faults = faults
        self._encoder = Lazy(self._load)

    @property
    def dim(self) -> int:
        return self.get().width

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Raises ApiError."""
        encoder = self.get()
        try:
            vectors = encoder.sentences(texts)
        except Exception as error:
            _log.exception("the sentence encoder failed")
            raise self._unavailable("failed", error) from error
        self._faults.worked("encoder")
        return vectors

    def get(self) -> SentenceEncoder:
        """Raises ApiError: what ``find_directory`` raises, or 503 if the load failed."""
        return self._encoder.get()

    def _load(self) -> SentenceEncoder:
        from loraplex_generation.sentences import SentenceEncoder

        directory = self._find_directory()
        try:
            return SentenceEncoder(directory)
        except ApiError:
            raise
        except Exception as error:
            _log.exception("the sentence encoder in %s cannot be loaded", directory)
            raise self._unavailable("cannot be loaded", error) from error

    def _unavailable(self, what: str, error: Exception) -> ApiError:
        self._faults.failed("encoder", error)
        return unavailable(
            f"the sentence encoder {what}; the server's log says why, and "
            "the next request tries again; or name an adapter instead",
            "encoder_unavailable",
        )
