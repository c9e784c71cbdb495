"""The replaced model computes what transformers computes."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from loraplex_kernels.cpu import native
from loraplex_server.engine.memory.kv_cache import KvCache, KvGeometry
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.engine.steps.forward_batch import build_batch
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.targets import group_modules
from tests.support.bases.architectures import ARCHITECTURES, RARE_BASES, VOCAB_SIZE, tiny_model

_CPU = torch.device("cpu")
# The other rare bases are rows of tests/conformance/base_rows.py, which asks them through a server.
_NO_ROW = {"gpt-neox", "inverse-layer-scale", "mixtral-window", "nanochat", "stablelm"}


def _paged_logits(model: PreTrainedModel, token_ids: list[int], *, fuse: bool) -> Tensor:
    """Logits of all positions, computed in three chunks over the paged cache."""
    base = BaseModel(copy.deepcopy(model), "tiny", fuse=fuse)
    geometry = KvGeometry(len(base.layers), base.n_kv_heads, base.head_dim)
    kv = KvCache(
        geometry,
        n_pages=20,
        page_size=16,
        max_requests=4,
        max_model_len=256,
        dtype=torch.float32,
        device=_CPU,
        prefix_cache=True,
    )
    base.attach_kv(kv.keys, kv.values)
    source = GenerationRequest("a", tuple(token_ids), SamplingParams(max_tokens=1))
    request = Request(source, print, token_ids, len(token_ids))
    kv.admit("a", bytes(16), token_ids)
    rows = []
    with torch.inference_mode():
        for start, end in ((0, 23), (23, 24), (24, len(token_ids))):
            batch = build_batch([ScheduledChunk(request, start, end - start)], kv, _CPU)
            batch.bind(base.step)
            hidden = base.forward(base.embed(batch.token_ids))
            raw = base.head.packed(hidden)
            rows.append(base.finish_logits(raw, torch.empty_like(raw, dtype=torch.float32)))
    return torch.cat(rows)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "modules"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_chunked_logits_equal_transformers_forward(model_type: str, fuse: bool) -> None:
    _check(tiny_model(model_type), fuse=fuse)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _NO_ROW else [pytest.mark.nightly])
        for name in RARE_BASES
    ],
)
def test_a_base_with_something_of_its_own_equals_transformers_forward(name: str) -> None:
    model_type, config = RARE_BASES[name]
    model = tiny_model(model_type, **config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)  # attention and gates matter
    _check(model, fuse=True)


def _check(model: PreTrainedModel, *, fuse: bool) -> None:
    token_ids = torch.randint(VOCAB_SIZE, (60,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0]
    found = _paged_logits(model, token_ids, fuse=fuse)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_style_models_run_fused(model_type: str) -> None:
    assert BaseModel(tiny_model(model_type), "tiny").fused is not None


@pytest.mark.skipif(not native.available(), reason="no C++ compiler built the kernels")
def test_layers_of_a_mixture_run_fused_where_its_experts_are_native() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert BaseModel(tiny_model("qwen3_moe", **sizes), "tiny").fused is not None


def test_other_architectures_run_transformers_modules() -> None:
    assert BaseModel(tiny_model("gemma2"), "tiny").fused is None


def test_every_linear_is_in_exactly_one_group() -> None:
    names = ["m.0.self_attn.q_proj", "m.0.self_attn.k_proj", "m.0.self_attn.v_proj", "lm_head"]
    assert group_modules("llama", names) == [tuple(names[:3]), ("lm_head",)]


def test_an_unknown_architecture_is_not_packed() -> None:
    names = ["m.0.self_attn.q_proj", "m.0.self_attn.k_proj", "m.0.self_attn.v_proj"]
    assert group_modules("unheard-of", names) == [(name,) for name in names]


def test_no_weight_is_held_twice() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    linears = {
        name: StorageWeakRef(module.weight.untyped_storage())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    base = BaseModel(model, "tiny")
    gc.collect()
    assert [name for name, storage in linears.items() if not storage.expired()] == []
    assert base.spec.weight("lm_head").shape == (VOCAB_SIZE, 64)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_the_lean_spec_gives_back_the_weights_of_the_checkpoint(model_type: str) -> None:
    model = tiny_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = BaseModel(model, "tiny").spec
    for name in spec.modules:
        stored = before[f"{name}.weight"]
        expected = stored.t() if name in spec.conv1d else stored
        assert torch.equal(spec.weight(name), expected), name
        assert torch.equal(spec.parameter(f"{name}.weight"), stored), name
