"""The Hugging Face Hub: ``hf://org/repo[/sub/folder][@revision]``, pinned to a commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import LimitExceeded, SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .library_errors import told
from .local import OPTIONAL_FILES, LocalFiles, read_directory

__all__ = ["HubClient", "HubCommit", "HubLike", "fetch_hub"]

_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
_FILES = (
    *(CONFIG_FILE, "mixlora_config.json", WEIGHTS_FILE),
    *OPTIONAL_FILES,
)


class HubCommit(NamedTuple):
    id: str
    n_bytes: Mapping[str, int | None]  # of each of its files, where the Hub says it


class HubLike(Protocol):
    """What is asked of the Hub. Both raise SourceError."""

    def resolve(self, repo: str, revision: str | None) -> HubCommit:
        """The commit that a branch, tag or commit prefix means now."""

    def snapshot(self, repo: str, commit: str, into: Path, patterns: tuple[str, ...]) -> None:
        """Downloads the files that match, under ``into``."""


class HubClient:
    """huggingface_hub; credentials and the default endpoint come from its own environment."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def resolve(self, repo: str, revision: str | None) -> HubCommit:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        try:
            info = api.model_info(repo, revision=revision, timeout=30, files_metadata=True)
        except Exception as error:
            raise SourceError(f"cannot fetch hf://{repo}: {told(error)}") from None
        if info.sha is None:
            raise SourceError(f"cannot fetch hf://{repo}: the Hub names no commit")
        return HubCommit(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def snapshot(self, repo: str, commit: str, into: Path, patterns: tuple[str, ...]) -> None:
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
            raise SourceError(f"cannot fetch hf://{repo}: {told(error)}") from None


def fetch_hub(
    uri: str, into: Path, limits: StoreLimits, *, client: HubLike | None = None
) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Resolves the revision to a commit first, then downloads exactly that commit."""
    match = _URI.fullmatch(uri)
    if match is None or ".." in uri:
        raise SourceError(f"{uri!r} is not hf://org/repo[/sub/folder][@revision]")
    client = client or HubClient()
    repo, sub = match["repo"], match["sub"].strip("/")
    commit = client.resolve(repo, match["revision"])
    prefix = f"{sub}/" if sub else ""
    wanted = {f"{prefix}{name}": name for name in _FILES}
    _check_sizes(commit, wanted, limits)
    known = tuple(path for path in wanted if path in commit.n_bytes)  # no other is downloaded
    client.snapshot(repo, commit.id, into, known)
    provenance: dict[str, JsonValue] = {"source": "hub", "repo": repo, "commit": commit.id}
    return read_directory(into / sub, limits), provenance


def _check_sizes(commit: HubCommit, wanted: Mapping[str, str], limits: StoreLimits) -> None:
    """Before the download: huggingface_hub writes whatever comes. Raises LimitExceeded."""
    for path, n_bytes in commit.n_bytes.items():
        name = wanted.get(path.replace("\\", "/"))  # as its patterns match
        if name is None:
            continue
        limit = limits.max_file_bytes if name == WEIGHTS_FILE else limits.max_config_bytes
        if n_bytes is None:
            raise SourceError(f"the Hub does not say how large {name} is; download it yourself")
        if n_bytes > limit:
            raise LimitExceeded(f"{name} exceeds {limit} bytes")
