"""Settings of the engine, fixed at start."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loraplex_server.options import Bytes, Options, Panel, option

_AtLeastOne = Annotated[int, Field(ge=1)]
_Size = Annotated[Bytes, Field(ge=1)]


class EngineConfig(Options, panel=Panel.ENGINE):
    """Settings of the engine.

    ``auto`` and None let the engine choose a value that fits the device and the model.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "Use this type for weights and activations: auto, bfloat16, float16 or float32.",
        panel=Panel.MODEL,
    )
    quantization: Literal["none", "int8", "int4", "fp8"] = option(
        "none", "Quantise the base's linear layers: none, int8, int4 or fp8.", panel=Panel.MODEL
    )
    device: str = option(
        "auto", "Compute on this device: auto, cpu, cuda or cuda:N.", panel=Panel.MODEL
    )
    tensor_parallel_size: _AtLeastOne = option(
        1,
        "Split every layer over this number of processes, one on each GPU.",
        panel=Panel.MODEL,
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = option(
        0.9,
        "Use this share of a GPU's memory for weights, KV cache and adapters.",
        panel=Panel.MODEL,
        metavar="SHARE",
    )
    max_model_len: _AtLeastOne | None = option(
        None,
        "Limit a prompt and its output together to this number of tokens. Default: the model's "
        "own.",
        panel=Panel.MODEL,
    )
    max_batch_size: _AtLeastOne | None = option(
        None, "Compute at most this number of requests in a step. Default: 256; 64 on a CPU."
    )
    max_step_tokens: _AtLeastOne | None = option(
        None,
        "Compute at most this number of tokens in a step, prefill included. Default: 2048; 128 "
        "on a CPU.",
    )
    max_queue: _AtLeastOne = option(
        512, "Let at most this number of requests of a tenant wait. Further requests get a 429."
    )
    kv_memory_bytes: _Size | None = option(
        None,
        "Reserve this memory for the KV cache, such as 2GiB. Default: what fits; 1GiB on a CPU.",
        name="kv_memory",
    )
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = option(
        "auto",
        "Keep the KV cache in the dtype of the base (auto), on a GPU in fp8 (e4m3), or on a CPU in "
        "int8. Both hold twice the tokens.",
    )
    drafts: Literal["auto", "off"] = option(
        "auto",
        "Guess next tokens from the text so far and verify them together, where few requests run "
        "and it pays (auto). Answers stay the same. A GPU needs --no-async-scheduling for it.",
    )
    jump_forward: bool = True  # compute the tokens that a grammar forces together, in one step
    prefix_cache: bool = option(True, "Share the KV cache of prompts with a common prefix.")
    prefix_cache_dir: Path | None = option(
        None,
        "Keep what leaves the prefix cache in files of this folder, which hold texts of requests "
        "and are readable by this user only. They are found again after a restart. Default: none.",
    )
    prefix_cache_disk_bytes: _Size = option(
        8 << 30,
        "Delete the oldest files of --prefix-cache-dir beyond this number of bytes.",
        name="prefix_cache_disk",
    )
    cuda_graphs: bool = option(True, "On a GPU, capture steps as CUDA graphs at start.")
    cuda_graph_tokens: Annotated[int, Field(ge=0)] = option(
        512, "Capture steps with prompt chunks up to this number of tokens. 0 captures none."
    )
    async_scheduling: bool = option(True, "On a GPU, schedule the next step while one runs.")
    attention_backend: Literal["auto", "triton", "flashinfer"] = option(
        "auto", "Compute attention on a GPU with triton, flashinfer (loraplex[flashinfer]) or auto."
    )
    deterministic: bool = option(
        False,
        "On a GPU, compute a row with the same bits in every batch, as a CPU does. This slows "
        "prefill.",
    )
    kernels: Literal["native", "reference"] = option(
        "native", "Run the native CPU kernels, or reference (PyTorch) for comparison."
    )
    fuse: bool = option(
        True, "Run the layers as one list of kernels instead of transformers' modules."
    )
    self_check: bool = option(True, "At start, compare the base with transformers' own forward.")
    threads: _AtLeastOne | None = option(
        None, "Run the engine on this number of CPU threads. Default: torch's."
    )
    max_loras: _AtLeastOne | None = option(
        None,
        "Keep at most this number of adapters on the device, and so in a step. Default: 512; 64 "
        "on a CPU.",
        panel=Panel.ADAPTERS,
    )
    max_lora_rank: _AtLeastOne = option(
        512, "Serve adapters and mixtures up to this rank.", panel=Panel.ADAPTERS
    )
    adapter_memory_bytes: _Size | None = option(
        None,
        "Reserve this memory for adapters on the device, such as 1GiB. Default: what fits; 1GiB "
        "on a CPU.",
        panel=Panel.ADAPTERS,
        name="adapter_memory",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prefix_cache_dir is not None:
            if not self.prefix_cache:
                raise ValueError("prefix-cache-dir needs prefix-cache, which is off")
            if self.tensor_parallel_size > 1:
                raise ValueError("prefix-cache-dir does not go with tensor-parallel-size")
        return self
