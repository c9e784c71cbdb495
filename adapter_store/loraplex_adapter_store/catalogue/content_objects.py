"""Contents in the catalogue: each upload is a folder ``contents/<ab>/<digest>/<upload>/``.

    adapter_config.json  adapter_model.safetensors  [chat_template.jinja]  plan.bin  manifest.json

The manifest is written last: an upload without a manifest does not exist. Uploads never change and
belong to one name. So an old upload without a name can never get one, and may be deleted (see
``catalogue.sweep``). Equal contents of several names are stored once for each.
"""

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from loraplex_adapter_store.contents.content_check import check_content
from loraplex_adapter_store.contents.content_files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
)
from loraplex_adapter_store.errors import (
    LimitExceeded,
    LoadCancelled,
    StoredAdapterDamaged,
)
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.name_state import content_from_json, seal, unseal
from loraplex_adapter_store.report import LoadReport, json_fields

from .bucket import Bucket

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_FILES = (CONFIG_FILE, WEIGHTS_FILE, CHAT_TEMPLATE_FILE, PLAN_FILE)
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_PLAN_FACTOR = 64  # plans are float32, and some families unfold; honest plans are smaller
_CHUNK = 1 << 20


class ContentMissing(StoredAdapterDamaged):
    """No name has the content any more, or its files were deleted by hand."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"the catalogue has no files of adapter {digest[:12]}; add it again")


class Manifest(NamedTuple):
    content: Content
    report: LoadReport
    files: dict[str, tuple[int, str]]  # name → bytes, sha256
    tenant: str  # for which the digest was computed


class Upload(NamedTuple):
    """All objects of one upload, complete or not."""

    digest: str
    upload: str
    keys: tuple[str, ...]
    modified: float  # seconds since the epoch, of its newest object, by the store's clock


class ContentObjects:
    """Stateless and thread-safe. Each call blocks, and may raise CatalogueUnavailable."""

    def __init__(self, bucket: Bucket, limits: StoreLimits) -> None:
        self._bucket = bucket
        self._limits = limits

    def put(self, folder: Path, content: Content, report: LoadReport, tenant: str) -> Content:
        """Upload the files of a content, and return the content with its upload.

        A name must refer to it within ``name_log.GRACE_S``: older uploads without one are deleted.
        """
        stored = replace(content, upload=uuid.uuid4().hex)
        files = {}
        for path in sorted(folder.iterdir()):
            files[path.name] = (path.stat().st_size, _sha256(path))
            self._bucket.write(_key(stored.digest, stored.upload, path.name), path)
        manifest = {
            "format": _FORMAT,
            "content": json_fields(stored),
            "tenant": tenant,
            "files": {name: {"n_bytes": n, "sha256": sha} for name, (n, sha) in files.items()},
            "report": report.to_json(),
        }
        self._bucket.write(_key(stored.digest, stored.upload, MANIFEST_FILE), seal(manifest))
        return stored

    def manifest(self, digest: str, upload: str) -> Manifest:
        """Raises StoredAdapterDamaged if the manifest is missing or of another content."""
        data = self._bucket.read(_key(digest, upload, MANIFEST_FILE), _MAX_MANIFEST_BYTES)
        if data is None:
            raise ContentMissing(digest)
        return _parse_manifest(data, digest, upload)

    def find(self, digest: str, plan_sha256: str | None = None) -> Manifest | None:
        """Return the manifest of any complete upload of ``digest`` with that plan, or None."""
        for upload in self.uploads(digest):
            if any(key.endswith(f"/{MANIFEST_FILE}") for key in upload.keys):
                manifest = self.manifest(digest, upload.upload)
                if plan_sha256 in (None, manifest.content.plan_sha256):
                    return manifest
        return None

    def fetch(
        self,
        content: Content,
        write: Callable[[str, Iterator[bytes]], Path],
        cancelled: threading.Event | None = None,
    ) -> LoadReport:
        """Download the files of a content. ``write`` gets each file's name and its parts.

        Each file is checked against the manifest, and all files against the digest. Raises
        StoredAdapterDamaged, LimitExceeded, LoadCancelled within a part, or CatalogueUnavailable;
        the written files are then useless.
        """
        manifest = self.manifest(content.digest, content.upload)
        folder = _key(content.digest, content.upload, "")
        sizes = {each.key: each.n_bytes for each in self._bucket.objects(folder)}
        paths: dict[str, Path] = {}
        for name, (n_bytes, sha256) in manifest.files.items():
            self._check_size(name, n_bytes)
            if sizes.get(folder + name) != n_bytes:
                raise _damaged(content.digest)
            hashed = hashlib.sha256()
            try:
                paths[name] = write(name, self._parts(folder + name, n_bytes, hashed, cancelled))
            except FileNotFoundError:
                raise _damaged(content.digest) from None
            if hashed.hexdigest() != sha256:
                raise _damaged(content.digest)
        try:
            check_content(content, manifest.tenant, paths, self._limits)
        except StoredAdapterDamaged as error:
            raise _damaged(content.digest) from error
        return manifest.report

    def uploads(self, digest: str | None = None) -> list[Upload]:
        """Return all uploads, or those of one digest."""
        folder = "contents/" if digest is None else f"contents/{digest[:2]}/{digest}/"
        folders: dict[tuple[str, str], list[tuple[str, float]]] = {}
        for each in self._bucket.objects(folder):
            parts = each.key.split("/")
            if len(parts) == 5:
                folders.setdefault((parts[2], parts[3]), []).append((each.key, each.modified))
        return [
            Upload(of, upload, tuple(key for key, _ in objects), max(time for _, time in objects))
            for (of, upload), objects in folders.items()
        ]

    def delete(self, upload: Upload) -> None:
        """Delete an upload, its manifest first, so that readers find no partial upload."""
        keys = sorted(upload.keys, key=lambda key: not key.endswith(MANIFEST_FILE))
        self._bucket.delete(keys)

    def _parts(
        self, key: str, n_bytes: int, hashed: Any, cancelled: threading.Event | None
    ) -> Iterator[bytes]:
        for part in self._bucket.parts(key, n_bytes):
            LoadCancelled.raise_if(cancelled)
            hashed.update(part)
            yield part

    def _check_size(self, name: str, n_bytes: int) -> None:
        largest = self._limits.max_file_bytes
        limit = largest * _MAX_PLAN_FACTOR if name == PLAN_FILE else largest
        if n_bytes > limit:
            raise LimitExceeded(f"{name} of the catalogue has {n_bytes} bytes, over {limit}")


def _parse_manifest(data: bytes, digest: str, upload: str) -> Manifest:
    try:
        value = unseal(data)
        if value["format"] != _FORMAT:
            raise ValueError("another format")
        content = content_from_json(value["content"])
        files = {
            name: (int(each["n_bytes"]), str(each["sha256"]))
            for name, each in value["files"].items()
        }
        if (content.digest, content.upload) != (digest, upload):
            raise ValueError("another content's")
        if not {CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE} <= set(files) <= set(_FILES):
            raise ValueError("other files")
        report = LoadReport.from_json(value["report"])
        return Manifest(content, report, files, str(value["tenant"]))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise _damaged(digest) from error


def _key(digest: str, upload: str, file: str) -> str:
    return f"contents/{digest[:2]}/{digest}/{upload}/{file}"


def _damaged(digest: str) -> StoredAdapterDamaged:
    return StoredAdapterDamaged(
        f"the catalogue's files of adapter {digest[:12]} are damaged; add it again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
