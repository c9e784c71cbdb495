"""Uploaded images, which chats name by the ids of their files."""

import os
from pathlib import Path

from loraplex_server.errors import invalid
from loraplex_server.images import ImageLimits, decode_image, image_bytes, media_type

from .batch_store import BatchStore
from .records import IMAGE_PURPOSES, InputSummary


def check_image(path: Path, limits: ImageLimits) -> InputSummary:
    """Decode an uploaded image and flush its file to the disk. Raises ImageRefused."""
    data = image_bytes(path, limits)
    decode_image(data, limits)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return InputSummary(0, (media_type(data),))


def image_path(store: BatchStore, tenant: str, file_id: str, *, param: str) -> Path:
    """Return the file of a tenant's image. Called on the store's thread.

    Raises ApiError: 404 for an unknown id, 400 for a file of calls or of examples.
    """
    file = store.file(tenant, file_id, param=param)
    if file.purpose not in IMAGE_PURPOSES:
        raise invalid(
            f"{file_id!r} has the purpose {file.purpose}; upload an image with the purpose vision",
            param,
            "invalid_image",
        )
    return store.path(file.id)
