"""Finds the images that chats name."""

from collections.abc import Sequence
from pathlib import Path

from loraplex_server.api.batches.image_files import image_path
from loraplex_server.api.state import AppState

from .image_parts import ImagePart


class ImageSources:
    """The limits of images, and the uploads of one tenant. Event loop only."""

    def __init__(self, state: AppState, tenant: str) -> None:
        self.limits = state.config.http.image_limits
        self._state, self._tenant = state, tenant

    async def find(self, parts: Sequence[ImagePart]) -> list[str | Path]:
        """Return the text of each image, and of an upload its file.

        Raises ApiError: 404 or 400 for an id that is no uploaded image of the tenant.
        """
        if not any(part.is_upload for part in parts):
            return [part.source for part in parts]
        batches, tenant = self._state.batches, self._tenant

        def find() -> list[str | Path]:
            return [
                image_path(batches.store, tenant, part.source, param=part.where)
                if part.is_upload
                else part.source
                for part in parts
            ]

        return await batches.do(tenant, find)
