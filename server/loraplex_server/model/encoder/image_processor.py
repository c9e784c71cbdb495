"""The image processor of a checkpoint, and the tokenizer of bases that read no text."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.loader import has_image_processor


class _Processor(Protocol):
    def __call__(self, *, images: Image.Image, return_tensors: str) -> dict[str, Tensor]: ...


class ImageProcessor:
    """Resizes, crops and normalises images. Thread-safe: every call is on its own arrays."""

    def __init__(self, processor: _Processor) -> None:
        self._processor = processor

    @staticmethod
    def load(path: Path) -> ImageProcessor | None:
        """Return the processor of the model in ``path``; None if the folder has no files of one.

        Raises ModelError for files that cannot be read.
        """
        if not has_image_processor(path):
            return None
        try:
            # Pillow's arithmetic, whether or not torchvision is installed
            processor = AutoImageProcessor.from_pretrained(
                path, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(
                f"the image processor at {str(path)!r} cannot be loaded: {error}"
            ) from error
        return ImageProcessor(processor)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels float32 [channels, height, width] of an image in RGB."""
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels[0].to(torch.float32).contiguous()

    def image_size(self) -> tuple[int, int]:
        """Return height and width of a square image after processing."""
        _, height, width = self(Image.new("RGB", (64, 64))).shape
        return int(height), int(width)


def no_tokens() -> PreTrainedTokenizerFast:
    """Return a tokenizer without tokens, which ``TextPipeline`` refuses every text for."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})))
