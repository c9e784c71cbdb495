"""Loads text encoders, with the classifier of the checkpoint if it is one."""

from collections.abc import Mapping
from pathlib import Path

import orjson
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.families.beside_linears.heads import head_of_base
from loraplex_adapter_store.plan import HeadPlan, HeadTask
from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.loader import run_load

from .layouts import ENCODERS, EncoderLayout
from .text_encoder import TextEncoder


def is_text_encoder(path: Path) -> bool:
    """Return True if the model in ``path`` is an encoder of a known type. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


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
        model, info = run_load(lambda: _load(path, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    layout = ENCODERS[model.config.model_type]
    missing = frozenset(info["missing_keys"])
    _check_complete(path, layout, missing)
    model.eval().requires_grad_(False)
    head = None
    if not _parameters_of(layout.classifier, missing):
        head = _head(path, model, layout)
    for name in missing:  # drawn at random, which would give the base a new fingerprint each time
        model.get_parameter(name).zero_()
    return TextEncoder(
        model.to(device),
        model_id,
        head=head,
        lacking=frozenset(name.rpartition(".")[0] for name in missing) - {layout.classifier},
        self_check=self_check,
    )


def _load(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Mapping[str, set[str]]]:
    """Return the model, and its report. A missing classifier is usual, and worth no warning."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: tuple[PreTrainedModel, Mapping[str, set[str]]]
        loaded = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return loaded


def _check_complete(path: Path, layout: EncoderLayout, missing: frozenset[str]) -> None:
    """Raises ModelError if the trunk lacks weights; its pooler and the classifier may."""
    trunk = f"{layout.trunk}."
    lost = sorted(
        name
        for name in missing
        if name.startswith(trunk) and not name.startswith(f"{trunk}pooler.")
    )
    if lost:
        raise ModelError(
            f"the model at {str(path)!r} lacks {len(lost)} weights of its encoder, "
            f"as {lost[0]}; download it again"
        )


def _parameters_of(module: str, names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if name.rpartition(".")[0] == module)


def _head(path: Path, model: PreTrainedModel, layout: EncoderLayout) -> HeadPlan:
    """Return the checkpoint's own classifier. Raises ModelError for labels that do not fit."""
    classifier = model.get_submodule(layout.classifier)
    weight, bias = (getattr(classifier, part).detach() for part in ("weight", "bias"))
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
