"""The embeddings of images in the rows of their placeholder tokens."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.model.vision.image_trunk import ImageTrunk
from loraplex_server.model.vision.prompt_image import PromptImage

from .adapter_rows import AdapterRows

_CACHE_BYTES = 256 << 20


class ImageRows:
    """Owner of the features of recent images. Engine thread only.

    The tower runs once for an image, and once more for each adapter that changes it. Features that
    were dropped before a later chunk needs them are computed again.
    """

    def __init__(self, trunk: ImageTrunk, adapters: AdapterRows) -> None:
        self._trunk, self._adapters = trunk, adapters
        # The keys are the digests of image and adapter, and the tenant's salt: the time tells no
        # tenant whether another one sent an image. The last used are at the end.
        self._features: OrderedDict[tuple[bytes, str, str], Tensor] = OrderedDict()
        self._n_bytes = 0

    def put(
        self, embeddings: Tensor, chunks: Sequence[ScheduledChunk], rows: Sequence[slice]
    ) -> None:
        """Writes the images of the chunks to ``embeddings`` [n_rows, hidden_size].

        ``rows``: of each chunk.
        """
        for chunk, of_chunk in zip(chunks, rows, strict=True):
            first_position = chunk.start - chunk.request.n_virtual
            for image in chunk.request.source.images:
                if image.positions[-1] < first_position:
                    continue  # as in every step that writes the answer
                positions = np.array(image.positions) - first_position
                first, end = np.searchsorted(positions, (0, chunk.n_tokens))
                if first < end:
                    features = self._features_of(image, chunk)
                    index = torch.from_numpy(positions[first:end] + of_chunk.start)
                    embeddings[index.to(embeddings.device)] = features[first:end]

    def _features_of(self, image: PromptImage, chunk: ScheduledChunk) -> Tensor:
        """Return the embeddings [n_tokens, hidden_size] of an image under the chunk's adapter."""
        digest, adapter = chunk.adapter_digest, chunk.request.source.adapter
        if not digest or adapter is None or not _changes(adapter.plan, self._trunk.layout.parts):
            digest = ""
        key = (image.digest, digest, chunk.request.source.cache_salt)
        features = self._features.get(key)
        if features is None:
            features = self._features[key] = self._compute(image, digest)
            self._n_bytes += features.nbytes
            while self._n_bytes > _CACHE_BYTES and len(self._features) > 1:
                self._n_bytes -= self._features.popitem(last=False)[1].nbytes
        self._features.move_to_end(key)
        return features

    def _compute(self, image: PromptImage, digest: str) -> Tensor:
        step = self._trunk.step

        def bind(n_rows: int) -> None:
            if digest:
                step.segments, step.fallback = self._adapters.of_one(digest, n_rows)

        features = self._trunk.features(image.inputs, bind)
        if len(features) != len(image.positions):
            raise RuntimeError(
                f"the tower made {len(features)} embeddings for {len(image.positions)} tokens"
            )
        return features


def _changes(plan: AdapterPlan, parts: tuple[str, ...]) -> bool:
    """Return True if the adapter changes a module within ``parts``."""
    changed: tuple[Collection[str], ...] = (plan.modules, plan.replaced_weights, plan.norms)
    return any(name.startswith(parts) for names in changed for name in names)
