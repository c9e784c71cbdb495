"""A prompt of a call for vectors: a text, a pair of texts or an image, ready for the engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex_server.model.vision.prompt_image import PromptImage

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The token ids of a text; an image has one id without meaning for each of its rows."""

    ids: Ids
    second_text_at: int | None = None  # where the second text of a pair begins, if types say so
    pixels: Tensor | None = None  # of an image, [channels, height, width]
    images: tuple[PromptImage, ...] = ()  # within the text, on a vision-language model

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of_image(pixels: Tensor, n_rows: int) -> Prompt:
        return Prompt((0,) * n_rows, pixels=pixels)
