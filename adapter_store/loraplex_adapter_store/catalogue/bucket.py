"""The calls of an object store that the catalogue needs, each with a timeout.

``create`` is the only call that excludes other writers. All object stores have it, and local
directories too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from loraplex_adapter_store.errors import CatalogueUnavailable, SourceError, StoreError
from loraplex_adapter_store.sources.prefix import canonical_uri

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "file")
_PART_BYTES = 8 << 20  # of a download, between two checks for cancellation
_PART_TIMEOUT = timedelta(seconds=30)  # of a request for a part of a file, or a listing
_SMALL_TIMEOUT = timedelta(seconds=5)  # of a request for a small object
_CONNECT_TIMEOUT = timedelta(seconds=3)
_RETRY_TIMEOUT = timedelta(seconds=5)  # from the first request
_N_RETRIES = 2
_log = logging.getLogger(__name__)


class StoredObject(NamedTuple):
    key: str
    n_bytes: int
    modified: float  # seconds since the epoch, by the clock of the object store


def check_url(url: str) -> str:
    """Return ``url`` in canonical form. Raises ValueError, which repeats no secret."""
    scheme = urlsplit(url).scheme.lower()
    if scheme not in SCHEMES:
        raise ValueError(f"a catalogue is one of {', '.join(f'{s}://' for s in SCHEMES)}")
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc or parts.query or parts.fragment or not Path(parts.path).is_absolute():
            raise ValueError("a catalogue in a directory is file:///absolute/path")
        return url
    try:
        return canonical_uri(url)
    except SourceError:
        raise ValueError(
            f"a catalogue is {scheme}://bucket/prefix, without user name, password, query or dots; "
            "credentials come from the environment"
        ) from None


class Bucket:
    """Stateless and thread-safe; every call blocks. Keys are relative to the URL's prefix.

    Raises CatalogueUnavailable if the object store fails.
    """

    def __init__(self, files: ObjectStore, small: ObjectStore) -> None:
        """Both stores access the same bucket, with timeouts for files and for small objects."""
        self._files = files
        self._small = small

    @staticmethod
    def open(url: str, prefix: str) -> Bucket:
        """Does not connect. Credentials come from the environment, as obstore reads them.

        Raises StoreError or ValueError.
        """
        url = check_url(url)
        try:
            from obstore.store import LocalStore, from_url
        except ImportError:
            raise StoreError(
                "a catalogue needs obstore: pip install 'loraplex[catalogue]'"
            ) from None
        if url.startswith("file:"):
            path = Path(unquote(urlsplit(url).path)) / prefix
            local = LocalStore(path, mkdir=True)
            return Bucket(local, local)
        endpoint = _endpoint()

        def connect(timeout: timedelta) -> ObjectStore:
            return from_url(
                f"{url}/{prefix}",
                client_options={
                    "timeout": timeout,
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "allow_http": endpoint.startswith("http://"),  # the operator's choice
                },
                retry_config={"max_retries": _N_RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            )

        try:
            return Bucket(connect(_PART_TIMEOUT), connect(_SMALL_TIMEOUT))
        except Exception as error:
            raise StoreError(
                f"the catalogue {url} cannot be opened: {_without_secrets(error)}"
            ) from None

    def create(self, key: str, data: bytes) -> bool:
        """Create an object. Returns False if the key exists, so only one writer succeeds.

        After CatalogueUnavailable the object may exist. A retry inside the client library may find
        the object of its own first try, so False can be wrong: compare the object.
        """
        from obstore.exceptions import AlreadyExistsError

        with _calls("write"):
            try:
                self._small.put(key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def write(self, key: str, data: bytes | Path) -> None:
        """Create or replace the object atomically."""
        with _calls("write"):
            self._files.put(key, data)

    def read(self, key: str, limit: int) -> bytes | None:
        """Return the object or None. Raises StoreError for more than ``limit`` bytes."""
        with _calls("read"):
            try:
                result = self._small.get(key)
            except FileNotFoundError:
                return None
            n_bytes = result.meta["size"]
            if n_bytes > limit:
                raise StoreError(f"object {key} of the catalogue has {n_bytes} bytes, over {limit}")
            return bytes(result.bytes())

    def parts(self, key: str, n_bytes: int) -> Iterator[bytes]:
        """Yield the first ``n_bytes`` of an object in parts. Raises FileNotFoundError."""
        for start in range(0, n_bytes, _PART_BYTES):
            length = min(_PART_BYTES, n_bytes - start)
            with _calls("read"):
                yield bytes(self._files.get_range(key, start=start, length=length))

    def objects(self, prefix: str) -> list[StoredObject]:
        """List the objects below ``prefix``, which ends with a slash or is empty."""
        with _calls("list"):
            listed = self._small.list(prefix or None, chunk_size=1000).collect()
            return [
                StoredObject(meta["path"], meta["size"], meta["last_modified"].timestamp())
                for meta in listed
            ]

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; missing ones are no error."""
        for key in keys:
            with _calls("delete"):
                try:
                    self._small.delete(key)
                except FileNotFoundError:
                    continue


def _endpoint() -> str:
    """Return the address of an S3 other than Amazon's, or "". Raises StoreError for bad URLs."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        parts = urlsplit(endpoint)
        if endpoint and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("no host")
    except ValueError:  # the client of the object store would panic
        raise StoreError("AWS_ENDPOINT_URL is not http(s)://host[:port]") from None
    return endpoint


@contextmanager
def _calls(what: str) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        _log.debug("the object store failed to %s: %s", what, _without_secrets(error))
        raise CatalogueUnavailable(f"the catalogue cannot be used now: {_kind(error)}") from None


def _kind(error: Exception) -> str:
    """Describe the error for clients, without its message."""
    return _KINDS.get(type(error).__name__, "the object store does not answer as it should")


def _without_secrets(error: Exception) -> str:
    """Return the first line, without values of variables that may be secrets."""
    text = (str(error).splitlines() or ["no reason given"])[0][:300]
    for name, value in os.environ.items():
        if len(value) >= 4 and any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS")):
            text = text.replace(value, "…")
    return text


_KINDS = {
    "PermissionDeniedError": "the object store denies permission",
    "UnauthenticatedError": "the object store does not accept the credentials",
}
