"""Zero-shot classes of images: how well each fits label texts that the request names.

probabilities = softmax(scale · cos(image, labels))            CLIP
                sigmoid(scale · cos(image, labels) + bias)     SigLIP
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from loraplex_adapter_store.plan import PoolingMode
from loraplex_server.api.protocol.vectors import ZeroShotBody
from loraplex_server.api.state import AppState
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.errors import invalid
from loraplex_server.model.encoder.image_encoder import Similarity

from .inputs import ImageSource, items_of
from .vector_call import VectorCall, in_turns
from .vector_source import VectorSource

_PLACE = "{}"  # of the label in a template


async def answer_zero_shot(state: AppState, request: Request, body: ZeroShotBody) -> Response:
    """Answer with the labels of images. Raises ApiError."""
    items = items_of(state, body, body.input, images_alone=True)
    images = [item.text for item in items if isinstance(item, ImageSource)]
    texts = _texts_of(body)
    n_inputs = len(images) + len(texts)
    call = VectorCall(
        state, request, body, "zero-shot", "input", n_inputs=n_inputs, n_images=len(images)
    )
    similarity = None if state.model.image_encoder is None else state.model.image_encoder.similarity
    if similarity is None:
        raise invalid(
            f"{state.resolver.base_name} does not compare images with texts; serve CLIP or SigLIP, "
            "or ask /classify with an adapter that has a head",
            "model",
            "base_reads_no_labels",
        )

    async def answer(source: VectorSource) -> bytes:
        prompts = await source.encode_images(images, param="input")
        cache, salt = state.label_vectors, f"{call.info.tenant}/{body.cache_salt or ''}"
        keys = {text: cache.key(text, source.digest, salt) for text in texts}
        known = {
            text: vector for text, key in keys.items() if (vector := cache.get(key)) is not None
        }
        missing = [text for text in keys if text not in known]
        if missing:
            prompts += await source.encode(missing, param="labels", special=True, cut=call.cut)
        rows = await source.read(prompts, Pooling(PoolingMode.MEAN))
        vectors = await in_turns(F.normalize(row, dim=-1) for row in rows)
        for text, vector in zip(missing, vectors[len(images) :], strict=True):
            known[text] = vector
            cache.put(keys[text], vector)
        labels = torch.stack([known[text] for text in texts])
        logits = _logits(torch.stack(vectors[: len(images)]), labels, similarity)
        scores = logits if body.use_activation is False else _probabilities(logits, similarity)
        classes = (
            {
                "index": index,
                "label": body.labels[int(row.argmax())],
                "probs": row.numpy(),
                "num_classes": len(texts),
            }
            for index, row in enumerate(scores.float())
        )
        return await call.write(source, classes, sum(map(len, prompts)))

    return await call.respond("", answer)


def _texts_of(body: ZeroShotBody) -> list[str]:
    """Return the text of each label. Raises ApiError (400)."""
    if body.template is None:
        return list(body.labels)
    if body.template.count(_PLACE) != 1:
        raise invalid(
            f"template is {body.template!r}; it needs one {_PLACE} in place of the label",
            "template",
        )
    return [body.template.replace(_PLACE, label) for label in body.labels]


def _logits(images: Tensor, labels: Tensor, similarity: Similarity) -> Tensor:
    """Return float64 [n_images, n_labels]; both inputs are rows of length 1."""
    return similarity.scale * (images.double() @ labels.double().T) + similarity.bias


def _probabilities(logits: Tensor, similarity: Similarity) -> Tensor:
    return logits.softmax(-1) if similarity.sums_to_one else logits.sigmoid()
