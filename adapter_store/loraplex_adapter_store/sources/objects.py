"""Object stores through obstore: ``s3://``, ``gs://``, ``az://``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import LimitExceeded, SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .library_errors import told
from .local import OPTIONAL_FILES, LocalFiles, read_directory

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["download", "fetch_objects"]


def fetch_objects(
    uri: str, into: Path, limits: StoreLimits
) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Credentials come from the environment of the server, as obstore reads them."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise SourceError(
            f"{uri.partition('://')[0]}:// needs obstore: pip install 'loraplex[objects]'"
        ) from None
    try:
        store = from_url(uri)
    except Exception as error:
        raise SourceError(f"{uri!r} is not an object store: {told(error)}") from None
    etags = download(store, into, limits)
    provenance: dict[str, JsonValue] = {"source": "objects", "uri": uri, "etags": dict(etags)}
    return read_directory(into, limits), provenance


def download(store: ObjectStore, into: Path, limits: StoreLimits) -> dict[str, JsonValue]:
    """Streams the adapter's files under the store's prefix into ``into``; returns their ETags."""
    etags: dict[str, JsonValue] = {}
    for name, limit, needed in (
        (CONFIG_FILE, limits.max_config_bytes, True),
        (WEIGHTS_FILE, limits.max_file_bytes, True),
        *((n, limits.max_config_bytes, False) for n in OPTIONAL_FILES),
    ):
        (into / name).parent.mkdir(exist_ok=True)
        try:
            _stream(store, name, into / name, limit, etags)
        except FileNotFoundError:
            if needed:
                raise SourceError(f"the source has no {name}") from None
    return etags


def _stream(
    store: ObjectStore, name: str, target: Path, limit: int, etags: dict[str, JsonValue]
) -> None:
    import obstore
    from obstore.exceptions import BaseError, NotFoundError

    try:
        result = obstore.get(store, name)
        n_bytes = 0
        with target.open("xb") as file:
            for chunk in result:
                n_bytes += len(chunk)
                if n_bytes > limit:
                    raise LimitExceeded(f"{name} exceeds {limit} bytes")
                file.write(chunk)
    except NotFoundError:
        raise FileNotFoundError(name) from None
    except BaseError as error:
        raise SourceError(f"cannot read {name}: {told(error)}") from None
    etags[name] = result.meta.get("e_tag")
