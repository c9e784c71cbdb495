"""Bases that lie on the stand-in for a GPU, built once."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.model.base_model import BaseModel
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_models import tiny_llama
from tests.support.gpu.meta_engine import base_on_host

BaseOf = Callable[..., BaseModel]


@pytest.fixture(scope="session")
def family_model() -> PreTrainedModel:
    """The one that ``adapter_samples`` are made for."""
    return tiny_llama()


@pytest.fixture(scope="session")
def family_base(family_model: PreTrainedModel) -> BaseModel:
    return base_on_host(family_model, pytest.MonkeyPatch())


@pytest.fixture(scope="session")
def base_of() -> BaseOf:
    """``base_of(model_type, **config)``: built at its first use."""
    made: dict[str, BaseModel] = {}

    def base(
        model_type: str = "llama", quantization: WeightFormat | None = None, **changes: object
    ) -> BaseModel:
        key = repr((model_type, quantization, changes))
        if key not in made:
            made[key] = base_on_host(
                tiny_model(model_type, **changes), pytest.MonkeyPatch(), quantization=quantization
            )
        return made[key]

    return base
