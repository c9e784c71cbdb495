"""The Hugging Face Hub: ``hf://org/repo[/sub/folder][@revision]``, pinned to a commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .library_errors import told
from .local import OPTIONAL_FILES, LocalFiles, read_directory

__all__ = ["HubClient", "HubLike", "fetch_hub"]

_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
_FILES = (
    *(CONFIG_FILE, "mixlora_config.json", WEIGHTS_FILE),
    *OPTIONAL_FILES,
)


class HubLike(Protocol):
    """What is asked of the Hub. Both raise SourceError."""

    def resolve(self, repo: str, revision: str | None) -> str:
        """The commit that a branch, tag or commit prefix means now."""

    def snapshot(self, repo: str, commit: str, into: Path, patterns: tuple[str, ...]) -> None:
        """Downloads the files that match, under ``into``."""


class HubClient:
    """huggingface_hub; credentials and the default endpoint come from its own environment."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def resolve(self, repo: str, revision: str | None) -> str:
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=self._endpoint).model_info(repo, revision=revision, timeout=30)
        except Exception as error:
            raise SourceError(f"cannot fetch hf://{repo}: {told(error)}") from None
        if info.sha is None:
            raise SourceError(f"cannot fetch hf://{repo}: the Hub names no commit")
        return info.sha

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
    client.snapshot(repo, commit, into, tuple(f"{prefix}{name}" for name in _FILES))
    provenance: dict[str, JsonValue] = {"source": "hub", "repo": repo, "commit": commit}
    return read_directory(into / sub, limits), provenance
