"""The Hugging Face Hub: ``hf://org/repo[/sub/folder][@revision]``, pinned to a commit."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import SourceError
from ..limits import StoreLimits
from ..report import JsonValue
from .local import LocalFiles, read_directory

__all__ = ["fetch_hub"]

_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
_FILES = (
    "adapter_config.json",
    "mixlora_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
)


def fetch_hub(uri: str, into: Path, limits: StoreLimits) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """Resolves the revision to a commit first, then downloads exactly that commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    match = _URI.fullmatch(uri)
    if match is None or ".." in uri:
        raise SourceError(f"{uri!r} is not hf://org/repo[/sub/folder][@revision]")
    repo, sub = match["repo"], match["sub"].strip("/")
    try:
        info = HfApi().model_info(repo, revision=match["revision"])
        prefix = f"{sub}/" if sub else ""
        snapshot_download(
            repo,
            revision=info.sha,
            local_dir=into,
            allow_patterns=[f"{prefix}{name}" for name in _FILES],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"cannot fetch {uri}: {error}") from None
    provenance: dict[str, JsonValue] = {"source": "hub", "repo": repo, "commit": info.sha}
    return read_directory(into / sub, limits), provenance
