"""Prepares the images of chats with the processor of a vision-language model.

a template's text → one placeholder for each image → the image's own text
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loraplex_server.errors import invalid, unavailable
from loraplex_server.images import ImageLimits, decode_image, image_bytes
from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.loader import (
    IMAGE_PROCESSOR_FILES,
    has_image_processor,
    run_load,
)
from loraplex_server.model.vision.layouts import Sight, VisionLayout, layout_of
from loraplex_server.model.vision.prompt_image import Block, PromptImage

_MAX_BYTES = 4 << 30  # of all prepared images, of requests that wait or run

if TYPE_CHECKING:
    from torch import Tensor


class ReadImage(NamedTuple):
    """An image that is ready for the tower."""

    digest: bytes  # of the file
    inputs: Mapping[str, Tensor]  # of the tower
    text: str  # stands in place of the image's placeholder
    n_tokens: int  # whose embeddings the tower computes
    grid: tuple[int, int] | None  # see ``PromptImage``


class Processor(Protocol):
    """The members of transformers' processors that are used here."""

    image_processor: Any
    image_token: str
    chat_template: str | None

    def replace_image_token(self, image_inputs: Any, image_idx: int) -> str: ...


class ImagePrompts:
    """The image processor of a base, and the memory of prepared images. Any thread may use it."""

    def __init__(
        self,
        processor: Processor,
        layout: VisionLayout,
        image_token: str,
        image_token_id: int,
        *,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        """``image_token``: the token that the tower's embeddings replace.

        ``max_bytes``: of all prepared images that are held at a time.
        """
        self._memory = _ImageMemory(max_bytes)
        self._processor, self._layout = processor, layout
        self._options: Mapping[str, object] = getattr(type(processor), "images_kwargs", None) or {}
        self._image_token, self._token_id = image_token, image_token_id
        self.token = processor.image_token  # the placeholder in templates
        self.chat_template = processor.chat_template or layout.chat_template

    @staticmethod
    def of(path: Path, *, max_bytes: int = _MAX_BYTES) -> ImagePrompts | None:
        """Return the processor of the model in ``path``; None if the model sees no images.

        Raises ModelError if the processor cannot be loaded.
        """
        layout = layout_of(path)
        if layout is None:
            return None
        if not has_image_processor(path):
            raise ModelError(
                f"the vision-language model at {str(path)!r} has no image processor: add its "
                f"{' or '.join(IMAGE_PROCESSOR_FILES)}, which processor.save_pretrained writes"
            )
        try:
            processor, token, token_id = run_load(lambda: _load(path))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"the image processor of {str(path)!r} cannot be loaded: {error}"
            ) from error
        return ImagePrompts(processor, layout, token, token_id, max_bytes=max_bytes)

    def read(self, source: str | Path, limits: ImageLimits) -> ReadImage:
        """Decode an image and prepare it. ``source``: as ``image_bytes`` reads it.

        Takes up to tenths of a second, and ten seconds more to fetch. Raises ImageRefused, and
        ApiError (503) while other images take all memory.
        """
        data = image_bytes(source, limits)
        image = decode_image(data, limits)
        prepared = self._processor.image_processor([image], return_tensors="pt", **self._options)
        text = self._processor.replace_image_token(prepared, 0)
        inputs = {name: prepared[name] for name in self._layout.inputs if name in prepared}
        self._memory.hold(*inputs.values())
        grid = None
        if "image_grid_thw" in prepared:
            _, height, width = prepared["image_grid_thw"][0].tolist()
            merge = self._processor.image_processor.merge_size
            grid = height // merge, width // merge
        n_tokens = text.count(self._image_token)
        return ReadImage(hashlib.sha256(data).digest(), inputs, text, n_tokens, grid)

    def expand(self, text: str, images: Sequence[ReadImage]) -> str:
        """Replace each placeholder in ``text`` by the text of its image.

        Raises ApiError (400) if the numbers of placeholders and images differ.
        """
        first, *others = text.split(self.token)
        word, n_shown = self.token, len(others)
        if self._image_token != self.token and self._image_token in text:
            word, n_shown = self._image_token, n_shown + text.count(self._image_token)
        if n_shown != len(images):
            raise invalid(
                f"the chat has {len(images)} images, and its prompt {n_shown} placeholders "
                f"{word!r}: leave this word out of texts, and let the chat template write "
                "it for each image",
                "messages",
                "image_placeholders",
            )
        pairs = zip((image.text for image in images), others, strict=True)
        return first + "".join(itertools.chain.from_iterable(pairs))

    def placed(self, ids: Sequence[int], images: Sequence[ReadImage]) -> tuple[PromptImage, ...]:
        """Return the images with the positions of their placeholders in ``expand``'s result."""
        positions = iter([at for at, token_id in enumerate(ids) if token_id == self._token_id])
        placed = []
        for image in images:
            own = tuple(itertools.islice(positions, image.n_tokens))
            block = {
                Sight.NONE: None,
                Sight.IMAGE: Block(own[0], own[-1] + 1, has_windows=True),
                Sight.PROMPT: Block(0, len(ids), has_windows=False),
            }[self._layout.sight]
            placed.append(PromptImage(image.digest, image.inputs, own, image.grid, block))
        return tuple(placed)


class _ImageMemory:
    """Counts the bytes of tensors that live, so that requests that wait cannot fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._lock = threading.RLock()  # a collection of garbage may release within ``hold``

    def hold(self, *tensors: Tensor) -> None:
        """Count the tensors until they are freed. Raises ApiError (503) if there is no room."""
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            if self._n_bytes and self._n_bytes + n_bytes > self._max_bytes:
                raise unavailable(
                    "the images of other requests take all memory for images; try again",
                    "images_busy",
                )
            self._n_bytes += n_bytes
        for tensor in tensors:
            weakref.finalize(tensor, self._release, tensor.nbytes).atexit = False

    def _release(self, n_bytes: int) -> None:
        with self._lock:
            self._n_bytes -= n_bytes


class _PatchProcessor:
    """The processor of Qwen-VL without its part for videos, which needs more packages."""

    def __init__(self, path: Path, tokenizer: Any, image_token_id: int) -> None:
        from transformers import AutoImageProcessor

        self.image_processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))
        self.chat_template = tokenizer.chat_template

    def replace_image_token(self, image_inputs: Any, image_idx: int) -> str:
        n_patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (n_patches // int(self.image_processor.merge_size) ** 2)


def _load(path: Path) -> tuple[Processor, str, int]:
    """Return the processor, and the token that embeddings replace with its id."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    token_id = int(config.image_token_id)
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    return _processor(path, config, tokenizer), token, token_id


def _processor(path: Path, config: Any, tokenizer: Any) -> Processor:
    from transformers import AutoImageProcessor, AutoProcessor, Idefics3Processor

    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        return _PatchProcessor(path, tokenizer, config.image_token_id)
    if config.model_type != "smolvlm":
        processor: Processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        return processor

    # SmolVLM's own processor needs packages for videos. Its images are those of Idefics3.
    vision = config.vision_config
    n_patches = (vision.image_size // vision.patch_size) ** 2
    made: Processor = Idefics3Processor(
        AutoImageProcessor.from_pretrained(path, local_files_only=True),
        tokenizer,
        image_seq_len=n_patches // config.scale_factor**2,
        chat_template=tokenizer.chat_template,
    )
    return made


def as_parts(
    messages: Sequence[Mapping[str, object]], template: str, image_token: str
) -> list[dict[str, object]]:
    """Return the messages as ``template`` reads them: contents as lists of parts, or as texts.

    A template that names images reads lists. For another one, each image is its placeholder.
    """
    reads_parts = "image" in template
    shown = []
    for message in messages:
        content = message["content"]
        if reads_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif not reads_parts and isinstance(content, list):
            texts = (image_token if p["type"] == "image" else p["text"] for p in content)
            content = "".join(texts)
        shown.append({**message, "content": content})
    return shown
