"""/v1/adapters, its generator, and the routes of vLLM that load and unload."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .body import Body, Few

__all__ = ["AdapterSourceBody", "GenerateAdapterBody", "LoadLoraBody", "UnloadLoraBody"]

_Wording = Annotated[str, Field(max_length=2000)]
_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]


class AdapterSourceBody(Body):
    """``source``: the name of a directory under a registered root, or a URI."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    description: _Wording | None = None
    examples: Annotated[Few[_Wording], Field(max_length=100)] | None = None
    wait: bool | None = None  # False: answer 202 with a job at once


class LoadLoraBody(Body):
    lora_name: Annotated[str, Field(max_length=512)] = ""
    lora_path: Annotated[str, Field(max_length=2048)] = ""
    load_inplace: bool | None = None


class UnloadLoraBody(Body):
    lora_name: Annotated[str, Field(max_length=512)] = ""
    lora_int_id: int | None = None


class GenerateAdapterBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(min_length=1, max_length=2000)]
    examples: Annotated[Few[_Wording], Field(max_length=100)] = []  # further wordings
    prompts: Annotated[Few[_Prompt], Field(max_length=64)] = []  # unlabelled inputs; icm-lora
    method: Literal[
        "auto", "end-to-end", "sg-lora", "icm-lora", "weighted", "nearest", "analogy"
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    name: Annotated[str, Field(max_length=128)] | None = None
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    samples: Annotated[int, Field(ge=0, le=16)] = 0
    force: bool = False
    probe: bool = True  # measure the agreement with the base on unrelated prompts
