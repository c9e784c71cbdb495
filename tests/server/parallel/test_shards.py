"""The cut of a base: what its ranks compute together is what transformers computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.parallel.sharded_model import build_sharded
from loraplex_server.model.base_model import BaseModel, load_base_model
from loraplex_server.model.errors import ModelError, UnsupportedBase
from loraplex_server.model.layers.tensor_parallel import GatheredHead, ShardLayout
from loraplex_server.model.loading.shard_loader import Checkpoint
from tests.server.parallel.threads import ThreadGroup, load_ranks, run_ranks
from tests.support.bases.architectures import tiny_model
from tests.support.bases.awq_checkpoint import save_as_awq
from tests.support.bases.tiny_models import tiny_llama

TOKENS = torch.tensor([5, 9, 33, 7, 60, 12, 3])


def bind(model: BaseModel) -> None:
    """One request of all tokens."""
    n = len(TOKENS)
    model.attach_kv(model.new_kv(1, 16), model.new_kv(1, 16))
    step = model.step
    step.positions, step.slot_mapping = torch.arange(n), torch.arange(n)
    step.page_table = torch.zeros(1, 1, dtype=torch.int32)
    step.query_starts = torch.tensor([0, n], dtype=torch.int32)
    step.kv_lens = torch.tensor([n], dtype=torch.int32)


def logits_of(ranks: list[BaseModel]) -> torch.Tensor:
    """float32 [n_tokens, vocab_size]."""
    embeddings = ranks[0].embed(TOKENS)

    def run(rank: int) -> torch.Tensor | None:
        with torch.inference_mode():
            model = ranks[rank]
            bind(model)
            hidden = model.forward(embeddings.clone())
            if rank == 0:
                return model.logits(hidden)
            assert isinstance(model.head.packed, GatheredHead)
            model.head.packed.compute(hidden)
            return None

    found = run_ranks(len(ranks), run)[0]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model_type", "size"),
    [
        *(("llama", 2), ("llama", 4), ("mistral", 2), ("qwen2", 2), ("qwen3", 2), ("biases", 2)),
        ("odd vocabulary", 2),
    ],
)
def test_ranks_compute_what_transformers_does(model_type: str, size: int, tmp_path: Path) -> None:
    """Over four ranks each of the two KV heads is held twice."""
    makers = {
        "biases": lambda: tiny_llama(bias=True),
        "odd vocabulary": lambda: tiny_model("llama", vocab_size=301),
    }
    model = makers.get(model_type, lambda: tiny_model(model_type))()
    model.save_pretrained(tmp_path)
    group = ThreadGroup(size)
    ranks = load_ranks(tmp_path, size, group)
    assert all(rank.fused is not None for rank in ranks)
    with torch.no_grad():
        expected = model(TOKENS.unsqueeze(0)).logits[0]
    torch.testing.assert_close(logits_of(ranks), expected, rtol=1e-4, atol=1e-4)
    assert group.n_reduced == 2 * len(ranks[0].layers)


def test_a_rank_holds_its_part_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    ranks = load_ranks(tmp_path, 2, ThreadGroup(2))
    whole = BaseModel(model, "tiny")

    def n_bytes(base: BaseModel) -> int:
        return sum(group.packed.n_bytes for group in base.groups.values())

    assert all(n_bytes(rank) <= 0.55 * n_bytes(whole) for rank in ranks)  # panels are padded
    assert ranks[1].embed(torch.tensor([0, 1])).shape == (2, 64)
    assert ranks[1]._embedding.weight.shape[0] == 2
    assert ranks[0].n_kv_heads == whole.n_kv_heads // 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_readers_of_adapters_see_the_whole_base(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied, bias=True)
    model.save_pretrained(tmp_path)
    spec = Checkpoint(tmp_path, 2).spec("tiny", torch.float32)
    expected = BaseSpec.of(model, "tiny")
    for name in ("fingerprint", "modules", "embeddings", "parameters", "norms", "n_heads"):
        assert getattr(spec, name) == getattr(expected, name), name
    for name in expected.modules:
        assert torch.equal(spec.weight(name), expected.weight(name))


def config_of(**changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(
        "llama",
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 100,
            **changes,
        },
    )


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 3, "8 attention heads, which 3 processes cannot share"),
        ({"intermediate_size": 99}, 2, "99 columns in the MLP"),
        (
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            "4 KV heads: 6 processes can neither",
        ),
        ({"vocab_size": 3}, 4, "vocabulary is too small"),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(
    changes: dict[str, object], size: int, said: str
) -> None:
    with pytest.raises(UnsupportedBase, match=said):
        ShardLayout.of(config_of(**changes), size)


@pytest.mark.parametrize("model_type", ["gemma2", "phi3"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBase, match="without --tensor-parallel-size"):
        Checkpoint(tmp_path, 2)


@pytest.mark.parametrize("format", list(WeightFormat))
@pytest.mark.parametrize("size", [2, 4])
def test_quantised_ranks_have_the_weights_of_one_process(
    format: WeightFormat, size: int, tmp_path: Path
) -> None:
    """Those of one process are transformers' over dequantised weights elsewhere."""
    tiny_model("llama", intermediate_size=128, hidden_size=128).save_pretrained(tmp_path)
    alone = load_base_model(
        tmp_path, "tiny", dtype=torch.float32, device=torch.device("cpu"), quantization=format
    )
    group = ThreadGroup(size)
    ranks = load_ranks(tmp_path, size, group, format)
    check_parts(ranks, alone)
    spec = Checkpoint(tmp_path, size, format).spec("tiny", torch.float32)
    check_spec(spec, alone.spec)
    bind(alone)
    with torch.inference_mode():
        expected = alone.logits(alone.forward(alone.embed(TOKENS)))
    torch.testing.assert_close(logits_of(ranks), expected, rtol=1e-4, atol=1e-4)
    assert group.n_reduced == 2 * len(ranks[0].layers)


@pytest.mark.parametrize("size", [1, 2])
def test_a_quantised_checkpoint_is_cut_as_codes(size: int, tmp_path: Path) -> None:
    tiny_model("qwen3", intermediate_size=192).save_pretrained(tmp_path)
    wanted = save_as_awq(tmp_path, 32)
    alone = load_base_model(tmp_path, "tiny", dtype=torch.float32, device=torch.device("cpu"))
    ranks = load_ranks(tmp_path, size, ThreadGroup(size))
    check_parts(ranks, alone)
    assert all(torch.equal(alone.spec.weight(name), weight) for name, weight in wanted.items())
    check_spec(Checkpoint(tmp_path, size).spec("tiny", torch.float32), alone.spec)


def check_parts(ranks: list[BaseModel], alone: BaseModel) -> None:
    """Every rank's linears are a part of ``alone``'s, to the bit."""
    for rank, model in enumerate(ranks):
        assert model.shard is not None
        layout = model.shard.layout
        assert model.spec.quantization == alone.spec.quantization
        for name in alone.spec.modules:
            if layout.is_cut(name):
                part = layout.cut_weight(name, alone.spec.weight(name), rank)
                assert torch.equal(model.spec.weight(name), part), name


def check_spec(spec: BaseSpec, expected: BaseSpec) -> None:
    for name in ("fingerprint", "quantization", "modules", "parameters", "norms"):
        assert getattr(spec, name) == getattr(expected, name), name
    for name in expected.modules:
        assert torch.equal(spec.weight(name), expected.weight(name)), name


def test_a_cut_within_a_small_group_is_refused(tmp_path: Path) -> None:
    """Half of 96 inputs is no multiple of 32."""
    tiny_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path, 2, WeightFormat.INT4)
    said = r"mlp.down_proj: inputs 0 … 48 of 96 .* choose another --tensor-parallel-size"
    with pytest.raises(ModelError, match=said):
        checkpoint.load(0, dtype=torch.float32, device=torch.device("cpu"))


def test_codes_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=64).save_pretrained(tmp_path)
    save_as_awq(tmp_path, 32)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    load = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ModelError, match="quantised already; leave --quantization out"):
        Checkpoint(tmp_path, 2, WeightFormat.INT8)
    up = {k: t for k, t in tensors.items() if k.startswith("model.layers.1.mlp.up_proj.")}
    extra = {k.replace("mlp.up_proj", "mlp.more_proj"): t.clone() for k, t in up.items()}
    save_file(tensors | extra, file)
    with pytest.raises(ModelError, match=r"quantised model\.layers\.1\.mlp\.more_proj"):
        Checkpoint(tmp_path, 2).load(0, **load)
    narrow = {k: t[:, : t.shape[1] // 2].contiguous() for k, t in up.items()}
    save_file(tensors | narrow, file)
    with pytest.raises(ModelError, match=r"up_proj \[32, 64\], and the model one of \[64, 64\]"):
        Checkpoint(tmp_path, 2).load(0, **load)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    config = EngineConfig(tensor_parallel_size=2, fuse=False)
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        build_sharded(tmp_path, "tiny", config, dtype=torch.float32, device=torch.device("cpu"))


def test_every_output_and_input_is_on_one_rank() -> None:
    layout = ShardLayout.of(config_of(), 4)
    for leaf, width in (("q_proj", 64), ("k_proj", 32), ("gate_proj", 96), ("lm_head", 100)):
        name = "lm_head" if leaf == "lm_head" else f"model.layers.0.x.{leaf}"
        parts = [layout.outputs(name, rank) for rank in range(4)]
        assert [i for part in parts if part for i in range(width)[part]] == list(range(width))
        assert layout.inputs(name, 0) is None
    for leaf, width in (("o_proj", 64), ("down_proj", 96)):
        cuts = [layout.inputs(f"model.layers.0.x.{leaf}", rank) for rank in range(4)]
        assert [i for cut in cuts if cut for i in range(width)[cut]] == list(range(width))
