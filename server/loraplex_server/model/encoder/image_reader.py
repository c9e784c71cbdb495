"""Reads the images of requests for a base with an image tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex_server.images import ImageLimits, ImageRefused, read_image

from .encoder import Modality
from .image_encoder import ImageEncoder, Similarity
from .image_processor import ImageProcessor


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Turns images into the inputs of the tower. Thread-safe."""

    processor: ImageProcessor | None  # None: the checkpoint has none, so no image can be read
    encoder: ImageEncoder  # for its shapes alone

    @property
    def reads_texts(self) -> bool:
        """Return True for a base with a tower of texts, too."""
        return Modality.TEXT in self.encoder.towers

    @property
    def max_text_tokens(self) -> int:
        return self.encoder.max_text_tokens

    def padded(self, ids: tuple[int, ...], pad: int) -> tuple[int, ...]:
        """Return the ids of a text, with padding if the base reads it, as SigLIP does."""
        if not self.encoder.layout.pads_texts:
            return ids
        return ids + (pad,) * (self.max_text_tokens - len(ids))

    @property
    def similarity(self) -> Similarity | None:
        """Return how images fit texts; None for a base that reads images alone."""
        return self.encoder.similarity

    def read(self, source: str, limits: ImageLimits) -> tuple[Tensor, int]:
        """Return the pixels of an image, and the rows that it has in the tower.

        ``source``: a ``data:`` URL or base64. Takes milliseconds: call it on a thread. Raises
        ImageRefused.
        """
        if self.processor is None:
            raise ImageRefused(
                f"{self.encoder.spec.model_id} has no image processor, so it reads no images; add "
                "preprocessor_config.json to its folder",
                "no_image_processor",
            )
        pixels = self.processor(read_image(source, limits))
        _, height, width = pixels.shape
        return pixels, self.encoder.n_rows(height, width)
