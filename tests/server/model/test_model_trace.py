"""What a base asks of attention, mask and head is seen in its own forward, or it is refused."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.tracing.model_trace import trace_model
from tests.support.bases.architectures import RARE_BASES, tiny_model

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# why → model type, config, what the message says
_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}, "takes no position_ids"),
    "alibi-of-mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "takes no position_ids"),
    "attention-of-its-own": ("falcon", {"alibi": False}, "of its 2 layers 0 attend"),
    "bidirectional": ("bert", {}, "neither causal nor"),
    "by-chunk": (
        "llama4_text",
        {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2},
        "by chunk",
    ),
    "mask-of-its-own": ("doge", {"head_dim": 8}, "mask or bias that the model computes itself"),
    "two-attentions": ("diffllama", {"head_dim": 8}, "more than once in a step"),
    "state-space": ("mamba", {"state_size": 4}, "recurrent state"),
    "hybrid": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "head_dim": 8},
        "recurrent state",
    ),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "of its 2 layers 1"),
    "layers-that-differ": (
        "gemma4_text",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
        "differ in key-value heads x head size",
    ),
}


@pytest.mark.parametrize("why", _REFUSED)
def test_what_cannot_be_served_right_is_refused_with_its_reason(why: str) -> None:
    model_type, changes, message = _REFUSED[why]
    config = AutoConfig.for_model(model_type, **(_SMALL | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UnsupportedBase, match=message) as error:
        BaseModel(model.eval(), "org/model", self_check=False)
    assert str(error.value).startswith(f"the base 'org/model' ({type(model).__name__}) cannot be")


def test_heads_are_counted_in_the_call_not_in_the_config() -> None:
    model_type, config = RARE_BASES["gpt-neox"]
    spec = BaseModel(tiny_model(model_type, **config), "tiny").spec
    assert (spec.n_heads, spec.n_kv_heads, spec.head_dim) == (4, 4, 16)


def test_windows_are_read_off_each_layers_mask() -> None:
    trace = trace_model(tiny_model("gemma2"))
    assert [spec.window for spec in trace.attention.values()] == [16, None, 16]
    assert [spec.softcap for spec in trace.attention.values()] == [50.0] * 3


def test_layers_and_their_attention_are_named_in_order() -> None:
    trace = trace_model(tiny_model("gpt2"))
    assert trace.layer_names == ("transformer.h.0", "transformer.h.1", "transformer.h.2")
    assert list(trace.attention) == [f"{name}.attn" for name in trace.layer_names]


def test_the_trace_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gemma2")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    trace_model(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_positions_end_where_longrope_would_turn_a_whole_batch_otherwise() -> None:
    model_type, config = RARE_BASES["rope-longrope"]
    model = tiny_model(model_type, **config)
    assert model.config.max_position_embeddings == 256
    assert BaseModel(model, "tiny").max_positions == 128


def test_a_router_that_is_read_as_a_linear_but_returns_two_tensors_is_not_one() -> None:
    model_type, config = RARE_BASES["phimoe"]
    base = BaseModel(tiny_model(model_type, **config), "tiny")
    assert not any("router" in name for name in base.spec.modules)
    assert "model.layers.0.self_attn.q_proj" in base.spec.modules
