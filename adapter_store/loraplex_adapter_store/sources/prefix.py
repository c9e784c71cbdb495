"""Prefixes of addresses that the operator allows clients to fetch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from loraplex_adapter_store.errors import SourceError

SCHEMES = ("hf", "s3", "gs", "az", "https", "http")
_PLAIN = re.compile(r"[!-~]*")  # printable ASCII, no blank
_FORBIDDEN = re.compile(r"[\\?#]|%(2[ef]|5c|25|[01][0-9a-f]|7f)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """A prefix of sources: ``s3://bucket/team`` covers itself and ``s3://bucket/team/…``."""

    text: str  # canonical; ``s3://`` alone is every address of the scheme

    @staticmethod
    def parse(text: str) -> SourcePrefix:
        """Parse a prefix. Raises ValueError."""
        scheme, separator, rest = text.partition("://")
        if separator and not rest and scheme.lower() in SCHEMES:
            return SourcePrefix(text.lower())
        try:
            return SourcePrefix(canonical_uri(text))
        except SourceError as error:
            raise ValueError(f"{error}; a directory is allowed with --adapters-dir") from None

    def covers(self, uri: str) -> bool:
        """Return True if the prefix covers ``uri``, which must be canonical.

        A Hub prefix without a revision covers every revision.
        """
        if self.text.endswith("://"):
            return uri.startswith(self.text)
        if self.text.startswith("hf://"):
            if "@" in self.text:
                return uri == self.text
            uri = uri.partition("@")[0]
        return uri == self.text or uri.startswith(f"{self.text}/")


def canonical_uri(uri: str) -> str:
    """Return ``uri`` in the spelling that prefixes are compared with.

    Raises SourceError for an unknown scheme, and for ambiguous addresses: dots, empty segments,
    encoded slashes, user names, queries.
    """
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        raise SourceError(
            f"unknown scheme of {uri[:200]!r}; known: a directory, file, {', '.join(SCHEMES)}"
        )
    authority, slash, path = rest.removesuffix("/").partition("/")
    segments = [authority, *(unquote(path).split("/") if slash else ())]
    odd = any(not segment.strip(".") for segment in segments)
    named = scheme != "hf" and "@" in authority  # user:password@host
    if odd or named or _FORBIDDEN.search(rest) or not _PLAIN.fullmatch(rest):
        raise SourceError(
            f"{uri[:200]!r} is not a plain address: it may hold no empty or dotted segments, no "
            "user name, query, fragment, blank or backslash"
        )
    if scheme in ("http", "https"):
        authority = authority.lower()
    return f"{scheme}://{authority}{slash}{path}"
