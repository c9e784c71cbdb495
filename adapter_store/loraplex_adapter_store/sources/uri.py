"""Fetches the files of a URI: directory, file://, hf://, https://, object stores."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from loraplex_adapter_store.contents.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import LimitExceeded, SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .local import OPTIONAL_FILES, LocalFiles, contained, read_directory

_TIMEOUT_S = 60.0  # to connect, and between two chunks
_MAX_CHARS = 300
_PATH = re.compile(r"(?<![\w:/.\-])/[^\s/'\"<>|:]+/[^\s'\"<>|:]*")  # absolute; not in an address
_HUB_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
_HUB_FILES = (CONFIG_FILE, "mixlora_config.json", WEIGHTS_FILE, *OPTIONAL_FILES)

if TYPE_CHECKING:
    import httpx
    from obstore.store import ObjectStore


class Fetched(NamedTuple):
    files: LocalFiles
    provenance: Mapping[str, JsonValue]


def fetch(uri: str, into: Path, allowed_roots: Sequence[Path], limits: StoreLimits) -> Fetched:
    """Download an adapter's files to ``into``, or find them locally. Raises SourceError."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        path = Path(unquote(urlsplit(uri).path)) if scheme else Path(uri)
        real = contained(path, allowed_roots)
        provenance: dict[str, JsonValue] = {"source": "directory", "path": str(real)}
        return Fetched(read_directory(real, limits), provenance)
    if scheme == "hf":
        return Fetched(*fetch_hub(uri, into, limits))
    if scheme in ("http", "https"):
        return Fetched(*fetch_web(uri, into, limits))
    if scheme in ("s3", "gs", "az"):
        return Fetched(*fetch_objects(uri, into, limits))
    raise SourceError(
        f"unknown scheme {scheme!r} of {uri!r}; known: a directory, file, hf, s3, gs, az, https"
    )


def fetch_web(uri: str, into: Path, limits: StoreLimits) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Download an adapter. A redirect could lead from an allowed server into another network."""
    import httpx

    etags: dict[str, JsonValue] = {}
    with httpx.Client(follow_redirects=False, timeout=_TIMEOUT_S) as client:
        for file in source_files(limits):
            address = f"{uri.rstrip('/')}/{file.name}"
            try:
                with client.stream("GET", address) as response:
                    if response.status_code == 404 and not file.is_required:
                        continue
                    _check(response, address)
                    save(response.iter_bytes(), into, file)
                    etags[file.name] = response.headers.get("etag")
            except httpx.HTTPError as error:
                raise SourceError(f"cannot read {address}: {reason(error)}") from None
    provenance: dict[str, JsonValue] = {"source": "web", "uri": uri, "etags": etags}
    return read_directory(into, limits), provenance


def read_web(address: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return one file of a web server. Redirects are refused.

    Raises SourceError, also after ``timeout_s``, and LimitExceeded for more than ``max_bytes``.
    """
    import httpx

    data, end = bytearray(), time.monotonic() + timeout_s
    try:
        with (
            httpx.Client(follow_redirects=False, timeout=timeout_s) as client,
            client.stream("GET", address) as response,
        ):
            _check(response, address)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    raise LimitExceeded(f"{address} exceeds {max_bytes:,} bytes")
                if time.monotonic() > end:
                    raise SourceError(f"{address} took longer than {timeout_s:g} s")
    except httpx.HTTPError as error:
        raise SourceError(f"cannot read {address}: {reason(error)}") from None
    return bytes(data)


def _check(response: httpx.Response, address: str) -> None:
    if response.is_redirect:
        location = response.headers["location"]
        raise SourceError(f"{address} redirects to {location[:200]!r}: name the final address")
    if response.status_code != 200:
        raise SourceError(f"{address} answered {response.status_code}")


def fetch_objects(
    uri: str, into: Path, limits: StoreLimits
) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Download an adapter. obstore reads the credentials from the server's environment."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise SourceError(
            f"{uri.partition('://')[0]}:// needs obstore: pip install 'loraplex[objects]'"
        ) from None
    try:
        store = from_url(uri)
    except Exception as error:
        raise SourceError(f"{uri!r} is not an object store: {reason(error)}") from None
    etags = download(store, into, limits)
    provenance: dict[str, JsonValue] = {"source": "objects", "uri": uri, "etags": dict(etags)}
    return read_directory(into, limits), provenance


def download(store: ObjectStore, into: Path, limits: StoreLimits) -> dict[str, JsonValue]:
    """Stream the adapter's files under the store's prefix into ``into``; return their ETags."""
    from obstore.exceptions import BaseError, NotFoundError

    etags: dict[str, JsonValue] = {}
    for file in source_files(limits):
        try:
            result = store.get(file.name)
            save(result, into, file)
            etags[file.name] = result.meta.get("e_tag")
        except (FileNotFoundError, NotFoundError):
            if file.is_required:
                raise SourceError(f"the source has no {file.name}") from None
        except BaseError as error:
            raise SourceError(f"cannot read {file.name}: {reason(error)}") from None
    return etags


class SourceFile(NamedTuple):
    name: str
    max_bytes: int
    is_required: bool


def source_files(limits: StoreLimits) -> Sequence[SourceFile]:
    """Return the files to download, in this order."""
    return (
        SourceFile(CONFIG_FILE, limits.max_config_bytes, is_required=True),
        SourceFile(WEIGHTS_FILE, limits.max_file_bytes, is_required=True),
        *(SourceFile(name, limits.max_config_bytes, is_required=False) for name in OPTIONAL_FILES),
    )


def save(chunks: Iterable[bytes], into: Path, file: SourceFile) -> None:
    """Write the chunks to ``into``. Raises LimitExceeded, also before the download has ended."""
    n_bytes = 0
    target = into / file.name
    target.parent.mkdir(exist_ok=True)
    with target.open("xb") as opened:
        for chunk in chunks:
            n_bytes += len(chunk)
            if n_bytes > file.max_bytes:
                raise LimitExceeded(f"{file.name} exceeds {file.max_bytes} bytes")
            opened.write(chunk)


def reason(error: Exception) -> str:
    """Return the message of a library's error for a client: one line, without local paths."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the rest names the file
    lines = str(error).splitlines()
    return _PATH.sub("…", lines[0])[:_MAX_CHARS] if lines else "it gives no reason"


class HubCommit(NamedTuple):
    id: str
    n_bytes: Mapping[str, int | None]  # by file; None if the Hub gives no size


class HubClient:
    """huggingface_hub, with credentials and endpoint from its environment variables.

    All methods raise SourceError.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def resolve(self, repo: str, revision: str | None) -> HubCommit:
        """Return the current commit of a branch, tag or commit prefix."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        try:
            info = api.model_info(repo, revision=revision, timeout=30, files_metadata=True)
        except Exception as error:
            raise SourceError(f"cannot fetch hf://{repo}: {reason(error)}") from None
        if info.sha is None:
            raise SourceError(f"cannot fetch hf://{repo}: the Hub names no commit")
        return HubCommit(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def snapshot(self, repo: str, commit: str, into: Path, patterns: tuple[str, ...]) -> None:
        """Download the files that match ``patterns`` to ``into``."""
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(
                repo,
                revision=commit,
                local_dir=into,
                allow_patterns=list(patterns),
                endpoint=self._endpoint,
            )
        except Exception as error:
            raise SourceError(f"cannot fetch hf://{repo}: {reason(error)}") from None


def fetch_hub(
    uri: str, into: Path, limits: StoreLimits, *, client: HubClient | None = None
) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Resolve the revision to a commit, then download exactly that commit."""
    match = _HUB_URI.fullmatch(uri)
    if match is None or ".." in uri:
        raise SourceError(f"{uri!r} is not hf://org/repo[/sub/folder][@revision]")
    client = client or HubClient()
    repo, sub = match["repo"], match["sub"].strip("/")
    commit = client.resolve(repo, match["revision"])
    prefix = f"{sub}/" if sub else ""
    wanted = {f"{prefix}{name}": name for name in _HUB_FILES}
    _check_hub_sizes(commit, wanted, limits)
    known = tuple(path for path in wanted if path in commit.n_bytes)  # nothing else is downloaded
    client.snapshot(repo, commit.id, into, known)
    provenance: dict[str, JsonValue] = {"source": "hub", "repo": repo, "commit": commit.id}
    return read_directory(into / sub, limits), provenance


def _check_hub_sizes(commit: HubCommit, wanted: Mapping[str, str], limits: StoreLimits) -> None:
    """Raises LimitExceeded before the download, which huggingface_hub does not limit."""
    for path, n_bytes in commit.n_bytes.items():
        name = wanted.get(path.replace("\\", "/"))  # as huggingface_hub matches patterns
        if name is None:
            continue
        limit = limits.max_file_bytes if name == WEIGHTS_FILE else limits.max_config_bytes
        if n_bytes is None:
            raise SourceError(f"the Hub does not say how large {name} is; download it yourself")
        if n_bytes > limit:
            raise LimitExceeded(f"{name} exceeds {limit} bytes")
