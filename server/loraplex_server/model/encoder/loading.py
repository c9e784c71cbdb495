"""Loads encoders of texts and of images, with the classifier of the checkpoint if it is one."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import orjson
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.families.beside_linears.heads import head_of_base
from loraplex_adapter_store.plan import HeadPlan, HeadTask
from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.loader import run_load

from .encoder import Modality
from .image_encoder import ImageEncoder
from .image_layouts import IMAGE_ENCODERS
from .image_processor import ImageProcessor
from .layouts import ENCODERS
from .text_encoder import TextEncoder


def encoder_kind(path: Path) -> Modality | None:
    """Return what the encoder in ``path`` reads: texts, or images (and texts perhaps).

    None for other models. Raises ModelError.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    if config.model_type in IMAGE_ENCODERS:
        return Modality.IMAGE
    is_text = config.model_type in ENCODERS and not getattr(config, "is_decoder", False)
    return Modality.TEXT if is_text else None


def load_text_encoder(
    path: Path,
    model_id: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    self_check: bool = True,
) -> TextEncoder:
    """Load an encoder from a directory. Raises ModelError with the reason if it cannot."""
    try:
        model, info = run_load(partial(_load, AutoModelForSequenceClassification, path, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    layout = ENCODERS[model.config.model_type]
    missing = frozenset(info["missing_keys"])
    _check_complete(path, missing, layout.trunk)
    model.eval().requires_grad_(False)
    head = None
    if not _parameters_of(layout.classifier, missing):
        head = _head(path, model, layout.classifier)
    for name in missing:  # drawn at random, which would give the base a new fingerprint each time
        model.get_parameter(name).zero_()
    return TextEncoder(
        model.to(device),
        model_id,
        head=head,
        lacking=frozenset(name.rpartition(".")[0] for name in missing) - {layout.classifier},
        self_check=self_check,
    )


def load_image_encoder(
    path: Path,
    model_id: str,
    processor: ImageProcessor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    self_check: bool = True,
) -> ImageEncoder:
    """Load an image encoder from a directory. Raises ModelError with the reason if it cannot."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        layout = IMAGE_ENCODERS[config.model_type]
        kind = AutoModelForImageClassification if layout.classifier else AutoModel
        model, info = run_load(partial(_load, kind, path, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    missing = frozenset(info["missing_keys"])
    is_classifier = bool(layout.classifier) and not _parameters_of(layout.classifier, missing)
    _check_complete(path, missing - _parameters_of(layout.classifier, missing), "")
    model.eval().requires_grad_(False)
    return ImageEncoder(
        model.to(device),
        model_id,
        image_size=_image_size(path, config, processor),
        head=_head(path, model, layout.classifier) if is_classifier else None,
        self_check=self_check,
    )


def _image_size(
    path: Path, config: PreTrainedConfig, processor: ImageProcessor | None
) -> tuple[int, int]:
    """Return height and width of processed images. Raises ModelError if the model reads others."""
    side = int(getattr(config, "vision_config", config).image_size)
    if processor is None:
        return side, side
    size = processor.image_size()
    if size != (side, side) and config.model_type != "dinov2":  # which interpolates its positions
        raise ModelError(
            f"the image processor at {str(path)!r} makes images of {size[0]} x {size[1]} pixels, "
            f"and the model reads {side} x {side}; correct size and crop_size in "
            "preprocessor_config.json"
        )
    return size


def _load(
    kind: type[AutoModel], path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, Mapping[str, set[str]]]:
    """Return the model, and its report. A missing classifier is usual, and worth no warning."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: tuple[PreTrainedModel, Mapping[str, set[str]]]
        loaded = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return loaded


def _check_complete(path: Path, missing: frozenset[str], trunk: str) -> None:
    """Raises ModelError if the trunk lacks weights; its pooler and the classifier may.

    ``trunk``: the name of its module; empty for the whole model.
    """
    prefix = f"{trunk}." if trunk else ""
    lost = sorted(
        name
        for name in missing
        if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")
    )
    if lost:
        raise ModelError(
            f"the model at {str(path)!r} lacks {len(lost)} weights of its encoder, "
            f"as {lost[0]}; download it again"
        )


def _parameters_of(module: str, names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if name.rpartition(".")[0] == module)


def _head(path: Path, model: PreTrainedModel, classifier: str) -> HeadPlan:
    """Return the checkpoint's own classifier. Raises ModelError for labels that do not fit."""
    linear = model.get_submodule(classifier)
    weight, bias = (getattr(linear, part).detach() for part in ("weight", "bias"))
    named = model.config.architectures or ()
    of_tokens = any(str(name).endswith("ForTokenClassification") for name in named)
    config = orjson.loads((path / "config.json").read_bytes())
    try:
        return head_of_base(
            HeadTask.TOKEN_CLS if of_tokens else HeadTask.SEQ_CLS,
            weight.to("cpu", torch.float32, copy=True),
            bias.to("cpu", torch.float32, copy=True),
            config,
        )
    except AdapterRefused as error:
        raise ModelError(f"the model at {str(path)!r} cannot be served: {error}") from error
